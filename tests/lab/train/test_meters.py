"""A person sees loss, speed and the time left, in a terminal and outside one."""

import io

import pytest

from sinkgd.lab.results import Evaluation, Record, Resume, TrainStep
from sinkgd.lab.train.sinks import BarMeter, LineMeter, StepRate, clock, make_meter


def step(number: int, seconds: float = 0.5) -> TrainStep:
    return TrainStep(
        step=number,
        tokens=100 * number,
        seconds=seconds * number,
        loss=2.5,
        lr=0.1,
        gradient_norm=1.0,
        step_seconds=seconds,
        optimizer_seconds=0.1,
    )


EVALUATION = Evaluation(4, 400, 2.0, 2.25, 9.5, 0.75, 1000)


def lines(records: list[Record], *, steps: int = 10, every: int = 4) -> list[str]:
    stream = io.StringIO()
    with LineMeter("first", steps, every, stream) as meter:
        for record in records:
            meter(record)
    return stream.getvalue().splitlines()


def test_lines_come_every_few_steps_and_at_the_last():
    assert lines([step(i) for i in range(1, 11)]) == [
        "first  step  4/10  loss 2.500  200 tok/s  0:03 left",
        "first  step  8/10  loss 2.500  200 tok/s  0:01 left",
        "first  step 10/10  loss 2.500  200 tok/s  0:00 left",
    ]


def test_evaluations_and_resumes_have_a_line():
    assert lines([Resume(3), EVALUATION]) == [
        "first  step  3/10  going on",
        "first  step  4/10  validation 2.250 nats, 0.750 bits/byte",
    ]


def test_the_pace_follows_a_slower_machine():
    pace = StepRate(1000)
    assert pace.tokens_per_second == 0.0
    for number in range(1, 200):
        pace.add(step(number, seconds=0.5 if number < 100 else 1.0))
    assert pace.tokens_per_second == pytest.approx(100.0, rel=1e-3)
    assert pace.seconds_left(900) == pytest.approx(100.0, rel=1e-3)


def test_a_slow_first_step_is_no_forecast():
    pace = StepRate(400)
    pace.add(step(1, seconds=40.0))
    pace.add(step(2, seconds=0.5))
    pace.add(step(3, seconds=0.5))
    assert pace.seconds_left(3) == pytest.approx(397 * 0.5)
    assert pace.tokens_per_second == pytest.approx(200.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (36_000, "10:00:00")]
)
def test_the_clock_reads_as_one(seconds, text):
    assert clock(seconds) == text


def test_the_bar_shows_the_same_figures(monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with BarMeter("[red]first", 10) as meter:
        meter(Resume(3))
        meter(step(4))
        meter(EVALUATION)
    shown = capfd.readouterr().err
    for text in ("[red]first", "4/10", "loss 2.500", "200 tok/s", "0:03 left", "val 2.250"):
        assert text in shown


def test_lines_are_for_what_is_no_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert isinstance(make_meter("first", steps=3, print_every_steps=1), LineMeter)
