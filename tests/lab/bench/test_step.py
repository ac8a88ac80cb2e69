"""`bench_step` times every contender that runs, lists the others, and keeps every turn."""

import io
import json

import pytest
import torch

from lab.bench.synthetic import step_record, workload
from sinkgd.kernels import Scales
from sinkgd.lab.bench import bench_step
from sinkgd.lab.bench.bench_step import (
    measure_accuracy,
    measure_first_call,
    relative_error,
    time_workload,
    why_no_room,
)
from sinkgd.lab.bench.contenders import ADAMW, backends, contenders
from sinkgd.lab.bench.interleaved import Pace
from sinkgd.lab.bench.step_record import StepRecord
from sinkgd.lab.bench.workloads import Workload
from sinkgd.lab.commands.bench.shared import read_record, write_record
from sinkgd.lab.report.console import Progress
from sinkgd.lab.results import ResultsError

CPU = torch.device("cpu")
TINY = Workload("tiny", "tiny", lambda: ((6, 4), (5, 7)))
PACE = Pace(rounds=4, seconds=1.0)


def time(wanted, tiny=TINY):
    return time_workload(tiny, "float32", CPU, PACE, wanted=wanted, progress=lambda _: None)


def test_those_who_are_wanted_are_timed_with_adamw_first():
    timing = time({"sinkgd-eager", "sgd-fused"}.__contains__)
    assert [row.name for row in timing.timings] == [ADAMW, "sgd-fused", "sinkgd-eager"]
    for row in timing.timings:
        assert len(row.seconds) == 4
        assert all(turn > 0 for turn in row.seconds)
        assert row.of_floor is not None
    assert timing.timings[0].of_adamw.median == 1.0
    assert timing.bandwidth in {candidate.name for candidate in timing.bandwidths}
    assert {"AdamW fused", "SGD fused", "copy", "torch.sum"} <= {
        candidate.name for candidate in timing.bandwidths
    }
    assert (timing.matrices, timing.entries) == (2, 59)


def test_slow_contenders_are_listed_with_the_reason_where_they_are_left_out():
    tiny = Workload("tiny", "tiny", TINY.shapes, without_slow="timed elsewhere")
    timing = time(lambda _: True, tiny)
    slow = {one.name for one in contenders(TINY, CPU) if one.slow}
    absent = {row.name: row.reason for row in timing.absent}
    assert {name: absent[name] for name in slow} == dict.fromkeys(slow, "timed elsewhere")
    everyone = {one.name for one in contenders(TINY, CPU)}
    assert {row.name for row in timing.timings} | set(absent) == everyone


def test_who_does_not_fit_into_memory_is_listed(monkeypatch):
    size = 59 * 4
    monkeypatch.setattr(bench_step, "available_bytes", lambda device: 5 * size)
    timing = time({"adamw-foreach", "sgd-fused"}.__contains__)
    assert [row.name for row in timing.timings] == [ADAMW, "sgd-fused"]
    (row,) = timing.absent
    assert (row.name, row.reason) == (
        "adamw-foreach",
        "not enough memory: it needs 3 more copies of the matrices",
    )
    assert why_no_room(TINY, "float32", CPU) is None
    monkeypatch.setattr(bench_step, "available_bytes", lambda device: 3 * size)
    assert "AdamW needs 0.0 GiB" in why_no_room(TINY, "float32", CPU)


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    record = step_record(workload(), workload("many-small"))
    path = tmp_path / "new" / "step.json"
    write_record(path, record)
    assert read_record(path, StepRecord) == record
    assert json.loads(path.read_text(encoding="utf-8"))["workloads"][0]["timings"][0]["seconds"]


@pytest.mark.parametrize("content", ["{", "{}", "[1]"])
def test_a_file_that_holds_no_record_is_refused_by_name(tmp_path, content):
    path = tmp_path / "step.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ResultsError, match=r"step\.json holds no StepRecord"):
        read_record(path, StepRecord)


def test_the_error_of_scales_is_that_of_their_products():
    exact = Scales(torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[3.0, 4.0]]).double())
    moved = Scales((exact.row * 4).float(), (exact.col / 4).float())
    assert relative_error(moved, exact) == 0
    wrong = Scales(exact.row * torch.tensor([[1.0], [1.01]]), exact.col * 1.02)
    assert relative_error(wrong, exact) == pytest.approx(1.01 * 1.02 - 1)


@pytest.mark.parametrize("backend", [name for name, reason in backends(CPU) if reason is None])
def test_float32_scales_are_near_float64s(backend):
    found = measure_accuracy(TINY, backend, CPU)
    assert (found.backend, found.workload) == (backend, "tiny")
    assert 0 < found.relative_error < 3e-6


@pytest.mark.slow
def test_the_first_call_is_made_in_fresh_processes():
    found = measure_first_call("eager", CPU)
    assert found.cold_seconds > 0
    assert len(found.warm_seconds) == 3


def test_a_first_call_that_fails_says_why():
    with pytest.raises(OSError, match=r"backend 'none' failed: (?s:.*)backend must be one of"):
        measure_first_call("none", CPU)


def test_progress_says_what_is_done_and_what_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("sinkgd.lab.report.console.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(200, stream)
    progress.stage("first", 100)
    now[0] = 30.0
    progress.stage("second", 100)(0.5)
    now[0] = 60.0
    progress.stage("nothing", 0)(1.0)
    said = stream.getvalue().replace("\N{NO-BREAK SPACE}", " ").splitlines()
    assert said == ["first: 0 %", "second: 50 %, 30.0 s left", "nothing: 100 %, 0 s left"]
