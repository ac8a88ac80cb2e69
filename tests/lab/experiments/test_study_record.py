"""A study's record keeps means of steps between evaluations, and means of statistics."""

from dataclasses import replace

import pytest

from lab.experiments.synthetic_study import made_up_record
from lab.report.synthetic_runs import write_run
from sinkgd.lab.devices import DEVICES
from sinkgd.lab.experiments.studies import find_study
from sinkgd.lab.experiments.study_record import Session, StudyRecord, StudyWriter, thinned
from sinkgd.lab.experiments.study_report import study_page
from sinkgd.lab.experiments.study_results import StudyResults
from sinkgd.lab.report import cost_sources
from sinkgd.lab.results import ModelStatistics


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
    for one in devices:
        writer.add_session(Session(jobs, 1, 1.0, 1.0, 0.0, {"device": one, "threads": 2}))
    writer.close()
    again = StudyRecord.read(path)
    for result in again.runs.values():
        assert result.run.start.environment.get("device") == device
        assert result.run.start.environment.get("threads") == (2 if devices else None)
    sheet = cost_sources.device_of(StudyResults.of(again).analysis("adamw"))
    assert sheet is (DEVICES["h100"] if device else None)
