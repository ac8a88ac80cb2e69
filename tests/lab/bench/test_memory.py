"""`bench_memory` counts state, kept scratch and what a step allocates, each by itself."""

import pytest
import torch
from torch import nn

from lab.bench.synthetic import memory_record
from sinkgd.lab.bench.bench_memory import (
    Subject,
    allocations,
    measure,
    measure_in_fresh_process,
    scratch_limit,
)
from sinkgd.lab.bench.contenders import Contender, contenders
from sinkgd.lab.bench.memory_report import MemoryRecord, MemoryUse
from sinkgd.lab.bench.workloads import Problem, Workload
from sinkgd.lab.commands.bench.shared import read_record, write_record

CPU = torch.device("cpu")
SIZE = 64 * 48 * 4
TINY = Workload("tiny", "tiny", lambda: ((64, 48),))


def named(name):
    return next(one for one in contenders(TINY, CPU) if one.name == name)


def test_what_is_kept_and_the_most_at_once_are_counted():
    held = []

    def call():
        held.append(torch.empty(100, dtype=torch.uint8))
        passing = torch.empty(1000, dtype=torch.uint8)
        del passing
        torch.empty(500, dtype=torch.uint8)

    found = allocations(call, CPU)
    assert (found.kept, found.peak) == (100, 1100)


@pytest.mark.parametrize(("name", "copies"), [("adamw-fused", 2), ("sgd-fused", 0), ("muon", 1)])
def test_state_is_counted_in_copies_of_the_matrices(name, copies):
    use = measure(named(name), TINY, "float32", CPU)
    assert use.state_bytes // SIZE == copies
    assert use.held_bytes < 1000
    assert use.parameter_bytes == SIZE


def test_the_plain_loop_allocates_whole_matrices():
    use = measure(named("naive-loop"), TINY, "float32", CPU)
    assert use.state_bytes == 0
    assert 2 * SIZE <= use.transient_bytes < 3 * SIZE


def test_scratch_that_the_first_step_keeps_is_told_from_what_a_step_gives_back():
    class Hoarder(torch.optim.SGD):
        def step(self):
            if not hasattr(self, "scratch"):
                self.scratch = torch.empty(3000, dtype=torch.uint8)
            torch.empty(200, dtype=torch.uint8)

    hoarder = Contender("hoarder", "Hoarder", lambda problem: Hoarder(problem.params))
    use = measure(hoarder, TINY, "float32", CPU)
    assert (use.held_bytes, use.transient_bytes, use.scratch_bytes) == (3000, 200, 3200)


def test_the_limit_grows_with_the_largest_matrix_and_the_threads():
    problem = Problem([nn.Parameter(torch.empty(*shape)) for shape in ((3, 5), (10, 20), (999,))])
    assert scratch_limit(problem, 2) == 2**20 + 2 * 4 * 30


@pytest.mark.slow
def test_a_fresh_process_measures_the_same():
    use = measure_in_fresh_process(Subject("sgd-fused", "many-small", "float32", "cpu", 1))
    assert isinstance(use, MemoryUse)
    assert (use.state_bytes, use.parameter_bytes) == (0, 2000 * 64 * 64 * 4)


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    write_record(tmp_path / "memory.json", memory_record())
    assert read_record(tmp_path / "memory.json", MemoryRecord) == memory_record()
