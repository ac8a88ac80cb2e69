"""`bench_kernels` times every operation of every backend that runs, and lists the others."""

import pytest
import torch

from lab.bench.synthetic import kernels_record
from sinkgd.lab.bench import bench_kernels as kernels
from sinkgd.lab.bench.bench_kernels import KernelsPlan, KernelsRecord, bench_kernels
from sinkgd.lab.bench.contenders import backends
from sinkgd.lab.bench.interleaved import Pace
from sinkgd.lab.commands.bench.shared import read_record, write_record

CPU = torch.device("cpu")


@pytest.fixture
def record(monkeypatch):
    monkeypatch.setitem(kernels.CASES, "tiny", ((6, 4), (2, 3, 5)))
    plan = KernelsPlan(("tiny",), ("bfloat16",), Pace(3, 1.0), CPU, "sinkgd bench kernels")
    return bench_kernels(plan, lambda case: None)


def test_every_operation_of_every_backend_is_timed(record):
    running = [name for name, reason in backends(CPU) if reason is None]
    (case,) = record.cases
    assert [(t.backend, t.operation) for t in case.timings] == [
        (backend, operation) for backend in running for operation in kernels.OPERATIONS
    ]
    assert {row.name for row in record.absent} == {n for n, reason in backends(CPU) if reason}
    assert case.shapes == ((6, 4), (2, 3, 5))


def test_bytes_are_passes_over_the_matrices(record):
    size = 2 * (24 + 30)
    for timing in record.cases[0].timings:
        passes = {"scales, L=1": 1, "scales, L=5": 5, "update": 3}[timing.operation]
        assert timing.moved_bytes == passes * size
        assert len(timing.seconds) == 3


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    write_record(tmp_path / "kernels.json", kernels_record())
    found = read_record(tmp_path / "kernels.json", KernelsRecord)
    assert found.cases[0].timings == kernels_record().cases[0].timings
    assert found == kernels_record()
