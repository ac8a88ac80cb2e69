"""A study's record keeps means of steps between evaluations, and means of statistics."""

from dataclasses import asdict, replace

import pytest

from lab.experiments.synthetic_study import SESSION, made_up_record
from lab.report.synthetic_runs import write_run
from sinkgd.lab.devices import DEVICES
from sinkgd.lab.experiments.studies import find_study
from sinkgd.lab.experiments.study_record import Session, StudyRecord, StudyWriter, thinned
from sinkgd.lab.experiments.study_report import sessions_table, study_page
from sinkgd.lab.experiments.study_results import StudyResults
from sinkgd.lab.report import cost_sources
from sinkgd.lab.results import ModelStatistics, ResultsError


@pytest.fixture
def run(tmp_path):
    run = write_run(tmp_path, "tempered", {4: 5.0, 10: 4.0})
    run.statistics += [
        ModelStatistics(step, {"gate/mean": 0.123456789 / step, "gate/min": 0.0, "gate/block_0": 1})
        for step in (4, 10)
    ]
    return run


def test_a_step_is_kept_for_every_evaluation_with_the_means_since_the_one_before(run):
    kept = thinned(run)
    assert [step.step for step in kept.steps] == [4, 10]
    losses = [step.loss for step in run.steps]
    assert kept.steps[0].loss == pytest.approx(sum(losses[:4]) / 4)
    assert kept.steps[1].loss == pytest.approx(sum(losses[4:]) / 6)
    assert kept.steps[1].seconds == run.steps[-1].seconds
    assert kept.evaluations == run.evaluations


def test_of_statistics_the_means_are_kept_to_six_digits(run):
    kept = thinned(run).statistics
    assert kept == [
        ModelStatistics(4, {"gate/mean": 0.0308642}),
        ModelStatistics(10, {"gate/mean": 0.0123457}),
    ]


def test_statistics_are_in_the_record_and_drawn_on_the_page(run, tmp_path):
    study = find_study("lens")
    record = made_up_record(study, {"S0": (4.0, 4.1), "S1": (4.2, 4.3)})
    inner = thinned(run).statistics
    runs = {
        name: replace(result, run=replace(result.run, statistics=inner))
        for name, result in record.runs.items()
    }
    path = tmp_path / "study.jsonl"
    writer = StudyWriter(path)
    writer.begin(record.plan, record.command)
    for result in runs.values():
        writer.add_run(result)
    writer.close()
    again = StudyRecord.read(path)
    assert {name: one.run.statistics for name, one in again.runs.items()} == dict.fromkeys(
        runs, inner
    )
    results = StudyResults.of(again)
    page = study_page(study, again, results, study.judge(results))
    assert 'id="inner-gate"' in page


@pytest.mark.parametrize(
    ("devices", "jobs", "device"),
    [
        (["NVIDIA H100 80GB HBM3"] * 2, 1, "NVIDIA H100 80GB HBM3"),
        (["NVIDIA H100 80GB HBM3"] * 2, 2, None),
        (["NVIDIA H100 80GB HBM3", "NVIDIA L4"], 1, None),
        ([], 1, None),
    ],
)
def test_the_calculator_of_a_page_knows_the_device_of_all_sessions(devices, jobs, device, tmp_path):
    record = made_up_record(find_study("table1"), {"sinkgd": (4.0,), "adamw": (4.1,)})
    path = tmp_path / "study.jsonl"
    writer = StudyWriter(path)
    writer.begin(record.plan, record.command)
    for result in record.runs.values():
        writer.add_run(result)
    for i, one in enumerate(devices, start=1):
        session = Session(jobs, 1, 1.0, 1.0, 0.0, {"device": one, "threads": 2})
        writer.begin_session(i, session)
    writer.close()
    again = StudyRecord.read(path)
    for result in again.runs.values():
        assert result.run.start.environment.get("device") == device
        assert result.run.start.environment.get("threads") == (2 if devices else None)
    sheet = cost_sources.device_of(StudyResults.of(again).analysis("adamw"))
    assert sheet is (DEVICES["h100"] if device else None)


SITTING = {"kind": "sitting", **asdict(SESSION)}  # the whole session, as older versions wrote it


def record_with(path, sessions):
    """Write a record that begins with a sitting of an older version; ``sessions`` writes more."""
    record = made_up_record(find_study("table1"), {"sinkgd": (4.0,), "adamw": (4.1,)})
    writer = StudyWriter(path)
    writer.begin(record.plan, record.command)
    writer._write(SITTING)
    sessions(writer)
    writer.close()
    return StudyRecord.read(path)


def test_later_lines_of_a_session_replace_its_times_and_add_no_session(tmp_path):
    new = Session(2, 0, 1.0, 0.0, 0.0, {"cpu": "new"})
    later = replace(new, runs=3, wall_seconds=9.0, runs_wall_seconds=12.0, idle_seconds=2.0)

    def write(writer):
        writer.begin_session(2, new)
        writer.update_session(2, replace(later, runs=1))
        writer.update_session(2, later)

    record = record_with(tmp_path / "study.jsonl", write)
    assert record.sessions == [SESSION, later]
    assert len(sessions_table(record).rows) == 2
    assert record.sessions[1].overhead == pytest.approx((2 * 9.0 - 2.0) / 12.0 - 1)


@pytest.mark.parametrize("number", [0, 3, "2"])
def test_a_session_that_follows_no_other_is_refused(number, tmp_path):
    with pytest.raises(ResultsError, match=r"study\.jsonl:3 is not a record"):
        record_with(tmp_path / "study.jsonl", lambda writer: writer.begin_session(number, SESSION))
