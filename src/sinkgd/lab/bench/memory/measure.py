"""State and scratch of one optimizer, in a process of its own.

On a CPU every allocation and release of torch's allocator is listed by the profiler, in order:
    state: the tensors in ``optimizer.state`` after two steps
    held: what the first step allocated and never released, less the state; the compiled loops keep
        their scratch in a tensor of torch's, so it counts here
    transient: the highest sum of allocations less releases within the third step
What does not go through torch's allocator is not seen: code, Python objects, and the buffers that
a library such as oneDNN takes from the C library. On CUDA the allocator's own counters are read.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from sinkgd.lab.bench.contenders import Contender, contenders
from sinkgd.lab.bench.memory.records import MemoryUse
from sinkgd.lab.bench.problem import Problem, build_problem
from sinkgd.lab.bench.workloads import WORKLOADS, Workload
from sinkgd.lab.launch import stop_with_parent
from sinkgd.lab.train.device import synchronize

Asked = TypeVar("Asked")
Found = TypeVar("Found")

_STDERR = 2


def in_fresh_process(function: Callable[[Asked], Found], asked: Asked) -> Found:
    """Call a function of a module's top level; what it raises is raised here.

    Raises:
        BrokenProcessPool: If the process was killed.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=stop_with_parent) as pool:
        return pool.submit(_quietly, function, asked).result()


def _quietly(function: Callable[[Asked], Found], asked: Asked) -> Found:
    # The profiler writes lines to the standard error that no setting turns off.
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDERR)
    return function(asked)


@dataclass(frozen=True)
class Subject:
    """What to measure, by name, so that it can be told to another process."""

    contender: str
    workload: str
    dtype: str
    device: str
    threads: int


def measure_in_fresh_process(subject: Subject) -> MemoryUse | str:
    """Measure one optimizer in a process of its own, whose scratch nobody has allocated before.

    Returns:
        What it uses, or why it cannot run.
    """
    return in_fresh_process(_measure_named, subject)


def measure(
    contender: Contender, workload: Workload, dtype: str, device: torch.device
) -> MemoryUse:
    """Measure one optimizer in this process."""
    problem = build_problem(workload, dtype, device)
    optimizer = contender.build(problem)
    survivors = allocations(optimizer.step, device)
    optimizer.step()
    transient = allocations(optimizer.step, device)
    state = _state_bytes(optimizer)
    return MemoryUse(
        name=contender.name,
        title=contender.title,
        workload=workload.name,
        dtype=dtype,
        parameter_bytes=problem.bytes,
        state_bytes=state,
        held_bytes=max(0, survivors.kept - state),
        transient_bytes=transient.peak,
        limit_bytes=scratch_limit(problem, torch.get_num_threads()),
    )


def scratch_limit(problem: Problem, threads: int) -> int:
    """Return the target for scratch: 1 MiB, and 4(m + n) bytes of the largest matrix a thread."""
    longest = max(sum(p.shape[-2:]) for p in problem.params if p.ndim > 1)
    return 2**20 + 4 * threads * longest


@dataclass(frozen=True)
class Allocations:
    """What a call allocated, in bytes."""

    kept: int  # still there at its end
    peak: int  # the most that was there at once


def allocations(call: Callable[[], object], device: torch.device) -> Allocations:
    """Call, and count what the allocator of ``device`` gave out meanwhile."""
    if device.type == "cuda":
        return _cuda_allocations(call, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    return running_sum([event.nbytes() for event in events if event.name() == "[memory]"])


def running_sum(changes: Sequence[int]) -> Allocations:
    """Add up allocations, positive, and releases, negative, in the order they came.

    >>> running_sum([100, 20, -20, 50, -50])
    Allocations(kept=100, peak=150)
    """
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return Allocations(held, peak)


def _cuda_allocations(call: Callable[[], object], device: torch.device) -> Allocations:
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    kept = torch.cuda.memory_allocated(device) - before
    return Allocations(kept, torch.cuda.max_memory_allocated(device) - before)


def _measure_named(subject: Subject) -> MemoryUse | str:
    torch.set_num_threads(subject.threads)
    workload, device = WORKLOADS[subject.workload], torch.device(subject.device)
    named = {contender.name: contender for contender in contenders(workload, device)}
    contender = named[subject.contender]
    reason = contender.absent()
    return reason if reason is not None else measure(contender, workload, subject.dtype, device)


def _state_bytes(optimizer: Optimizer) -> int:
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
