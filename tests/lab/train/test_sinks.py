"""Sinks get every record; meters show progress on a terminal and elsewhere."""

import io
import sys
import types
from dataclasses import replace

import pytest

from sinkgd.lab.results import Evaluation, ModelStatistics, Record, Resume, RunStart, TrainStep
from sinkgd.lab.train.config import ConfigError
from sinkgd.lab.train.sinks import (
    SINKS,
    BarMeter,
    LineMeter,
    StepRate,
    clock,
    make_meter,
    open_sinks,
    scalars,
)

START = RunStart("first", "sgd", 0, "sinkgd train", {"a": {"b": 1}}, {}, 1, 1)
STEP = TrainStep(3, 300, 1.5, 2.5, 0.1, 1.0, 0.5, 0.1)
EVALUATION = Evaluation(3, 300, 1.5, 2.25, 9.5, 0.75, 1000)
STATISTICS = ModelStatistics(3, {"attention_entropy/mean": 1.25})


def test_the_table_has_every_sink():
    assert set(SINKS) == {"tensorboard", "wandb", "trackio"}


def test_figures_are_named_after_their_fields():
    assert scalars(STEP)["train/loss"] == 2.5
    assert scalars(EVALUATION)["validation/bits_per_byte"] == 0.75
    assert "validation/galore_perplexity" not in scalars(EVALUATION)  # an old record has none
    both = replace(EVALUATION, galore_perplexity=9.25)
    assert scalars(both)["validation/galore_perplexity"] == 9.25
    assert scalars(STATISTICS) == {"model/attention_entropy/mean": 1.25}
    assert "train/step" not in scalars(STEP)
    assert scalars(Resume(3)) == {}


def test_tensorboard_files_hold_the_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_sinks(("tensorboard",), tmp_path, START) as sinks:
        for record in (START, STEP, EVALUATION, STATISTICS):
            sinks[0](record)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (loss,) = events.Scalars("train/loss")
    (validation,) = events.Scalars("validation/val_loss")
    assert (loss.step, loss.value) == (3, 2.5)
    assert (validation.step, validation.value) == (3, 2.25)
    (entropy,) = events.Scalars("model/attention_entropy/mean")
    assert (entropy.step, entropy.value) == (3, 1.25)


@pytest.mark.parametrize("resumed_at", [0, 2])
def test_tensorboard_hides_the_steps_that_a_resumed_run_takes_again(tmp_path, resumed_at):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def log(steps, loss, resumed_at=None):
        with open_sinks(("tensorboard",), tmp_path, START, resumed_at=resumed_at) as (sink,):
            for step in steps:
                sink(replace(EVALUATION, step=step, val_loss=loss))

    log(range(5), 10.0)
    again = [3, 4] if resumed_at else [0, 1, 2, 3, 4]
    log(again, 5.0, resumed_at)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    curve = {event.step: event.value for event in events.Scalars("validation/val_loss")}
    assert len(events.Scalars("validation/val_loss")) == 5
    assert curve == {step: 5.0 if step in again else 10.0 for step in range(5)}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_logging_services_get_configuration_figures_and_an_end(monkeypatch, tmp_path, name):
    calls: list[tuple] = []
    package = types.ModuleType(name)
    package.init = lambda **options: calls.append(("init", options["name"], options["config"]))
    package.log = lambda figures, step: calls.append(("log", step, figures["train/loss"]))
    package.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, package)
    with open_sinks((name,), tmp_path, START) as sinks:
        for record in (START, STEP):
            sinks[0](record)
    assert calls == [("init", "first", {"a": {"b": 1}}), ("log", 3, 2.5), ("finish",)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_an_absent_package_is_named_with_the_command(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    message = rf"{name}, which is not installed; .* pip install '\.\[{name}\]'"
    with pytest.raises(ConfigError, match=message), open_sinks((name,), tmp_path, START):
        pytest.fail("the sink was opened")


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


SHOWN_EVALUATION = Evaluation(4, 400, 2.0, 2.25, 9.5, 0.75, 1000)


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
    assert lines([Resume(3), SHOWN_EVALUATION]) == [
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
        meter(SHOWN_EVALUATION)
    shown = capfd.readouterr().err
    for text in ("[red]first", "4/10", "loss 2.500", "200 tok/s", "0:03 left", "val 2.250"):
        assert text in shown


def test_lines_are_for_what_is_no_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert isinstance(make_meter("first", steps=3, print_every_steps=1), LineMeter)
