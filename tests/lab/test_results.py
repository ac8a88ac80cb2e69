"""Results files: what was written is read back, and what a killed process left does no harm."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sinkgd.lab.results import (
    Evaluation,
    Memory,
    ModelStatistics,
    ResultsError,
    ResultsWriter,
    Resume,
    Run,
    RunEnd,
    RunStart,
    TrainStep,
    checked,
)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
START = RunStart(
    name="sinkgd-seed0",
    recipe="sinkgd",
    seed=0,
    command="sinkgd train",
    config={"model": {"preset": "llama-nano"}},
    environment={"torch": "2.6"},
    parameters=10,
    tokens_per_step=4,
)
END = RunEnd("finished", 2, 8, 2.0, 2.5, Memory(1, 2, 3, 4))


def step(number: int, loss: float = 1.0) -> TrainStep:
    return TrainStep(number, 4 * number, float(number), loss, 0.1, 1.0, 1.0, 0.5)


def statistics(number: int) -> ModelStatistics:
    return ModelStatistics(number, {"attention_entropy/mean": 0.5 * number})


def evaluation(number: int) -> Evaluation:
    return Evaluation(number, 4 * number, float(number), 1.0, math.e, 0.5, 16)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "run.jsonl"


def write(path, *records):
    with ResultsWriter(path) as writer:
        for record in records:
            writer.write(record)


def test_what_was_written_is_read_back(path):
    write(path, START, step(1), step(2), evaluation(2), statistics(2), END)
    run = Run.read(path)
    assert run == Run(path, START, [step(1), step(2)], [evaluation(2)], END, [statistics(2)])
    assert run.finished


def test_a_loss_that_is_no_number_is_kept(path):
    write(path, START, step(1, math.nan), step(2, math.inf))
    assert math.isnan(Run.read(path).steps[0].loss)
    assert Run.read(path).steps[1].loss == math.inf


def test_a_record_is_on_the_disk_before_the_file_is_closed(path):
    with ResultsWriter(path) as writer:
        writer.write(START)
        assert Run.read(path).start == START


def test_mirrors_see_every_record_after_it_was_written(path):
    seen = []

    def mirror(record):
        seen.append((record, path.read_text().count("\n")))

    with ResultsWriter(path, mirrors=(mirror,)) as writer:
        writer.write(START)
        writer.write(step(1))
    assert seen == [(START, 1), (step(1), 2)]


def test_a_run_without_an_end_is_not_finished(path):
    write(path, START, step(1))
    assert Run.read(path).end is None
    assert not Run.read(path).finished


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_a_run_that_ended_otherwise_is_not_finished(path, status):
    write(path, START, RunEnd(status, 1, 4, 1.0, 1.0, Memory(1, 2, 3, 4), "why"))
    assert not Run.read(path).finished


def test_a_line_without_its_end_is_passed_over(path):
    write(path, START, step(1), step(2))
    path.write_bytes(path.read_bytes()[:-10])
    assert Run.read(path).steps == [step(1)]


def test_writing_goes_on_after_a_line_without_its_end(path):
    write(path, START, step(1), step(2))
    path.write_bytes(path.read_bytes()[:-10])
    write(path, step(2), END)
    assert Run.read(path) == Run(path, START, [step(1), step(2)], [], END)


def test_a_file_that_is_one_unfinished_line_is_begun_anew(path):
    path.parent.mkdir()
    path.write_text('{"kind": "sta')
    write(path, START)
    assert Run.read(path).start == START


def test_a_resume_makes_the_later_records_void(path):
    interrupted = RunEnd("interrupted", 3, 12, 3.0, 3.0, Memory(1, 2, 3, 4))
    write(path, START, step(1), evaluation(1), statistics(1), step(2), step(3), evaluation(3))
    write(path, statistics(3), interrupted)
    write(path, Resume(1), step(2, loss=0.5))
    run = Run.read(path)
    assert run.steps == [step(1), step(2, loss=0.5)]
    assert run.evaluations == [evaluation(1)]
    assert run.statistics == [statistics(1)]
    assert run.end is None


def test_a_resume_keeps_the_step_it_went_on_from(path):
    write(path, START, step(1), step(2), Resume(2))
    assert Run.read(path).steps == [step(1), step(2)]


def test_a_missing_file_is_named_with_the_command_that_makes_it(path):
    with pytest.raises(ResultsError, match=r"no results at .*run\.jsonl; `sinkgd train` writes"):
        Run.read(path)


def test_an_empty_file_is_no_results_file(path):
    write(path)
    with pytest.raises(ResultsError, match="does not begin with a start record"):
        Run.read(path)


def test_a_file_that_begins_with_a_step_is_no_results_file(path):
    write(path, step(1))
    with pytest.raises(ResultsError, match="does not begin with a start record"):
        Run.read(path)


def test_two_starts_are_two_runs(path):
    write(path, START, START)
    with pytest.raises(ResultsError, match="two start records"):
        Run.read(path)


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "epoch", "step": 1}',
        '{"step": 1}',
        '{"kind": "resume", "step": 1, "colour": "red"}',
        '{"kind": "resume"}',
        '{"kind": "end", "status": "finished", "memory": 3}',
        "not json",
        "3",
        "[]",
        "null",
    ],
)
def test_a_line_that_is_no_record_is_named_by_its_number(path, line):
    write(path, START)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ResultsError, match=r"run\.jsonl:2 is not a record"):
        Run.read(path)


def test_a_file_of_another_kind_is_no_results_file(path):
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe\x00\x01\n")
    with pytest.raises(ResultsError, match="is not UTF-8 text"):
        Run.read(path)


def test_every_line_is_json_that_names_its_kind(path):
    write(path, START, step(1), evaluation(1), Resume(1), END)
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["start", "step", "evaluation", "resume", "end"]


def test_runs_recorded_before_a_field_was_added_are_read(path):
    write(path, START, step(1), evaluation(1), END)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line.pop("galore_perplexity", None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [found.galore_perplexity for found in Run.read(path).evaluations] == [None]


def test_both_perplexities_are_read_back(path):
    both = replace(evaluation(1), galore_perplexity=2.7)
    write(path, START, step(1), both)
    assert Run.read(path).evaluations == [both]


@pytest.mark.parametrize("value", [10**400, -(10**400), True])
def test_a_number_that_is_none_of_a_float_is_refused(value):
    with pytest.raises(TypeError, match="loss is"):
        checked(TrainStep(1, 1, 1.0, value, 1.0, 1.0, 1.0, 1.0))


@pytest.mark.parametrize("name", ["model", "data", "training", "mesh", "optimizer"])
@pytest.mark.parametrize("table", [3, None, [1], "x"])
def test_a_configuration_of_no_tables_is_refused(tmp_path, name, table):
    path = tmp_path / "run.jsonl"
    start = {**asdict(RunStart("r", "sgd", 0, "", {}, {}, 1, 1)), "config": {name: table}}
    path.write_text(json.dumps({"kind": "start", **start}) + "\n")
    with pytest.raises(ResultsError, match=rf"config\.{name} is"):
        Run.read(path)
