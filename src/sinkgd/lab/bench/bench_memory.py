"""`sinkgd bench memory`: state and scratch of each optimizer, and the peaks of training steps.

Each measurement runs in a process of its own; `training_memory` makes those of training steps. An
optimizer's own steps, without forward and backward, are measured on a CPU with the profiler, which
lists every allocation and release of torch's allocator in order. Three sizes follow:
    state: the tensors in ``optimizer.state`` after three steps
    held: what the first step allocated and did not release, minus the state. This includes the
        scratch of the compiled loops, which is a torch tensor
    transient: the highest running sum of allocations minus releases within the third step
Memory outside torch's allocator is not counted: code, Python objects, and the buffers that a
library such as oneDNN takes from the C library. On CUDA the allocator's counters are read
instead.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from sinkgd.lab.bench.contenders import Contender, contenders
from sinkgd.lab.bench.memory_report import (
    MemoryRecord,
    MemoryUse,
    NotMeasured,
    StepSettings,
    TrainingMemory,
    TrainingNotMeasured,
    TrainingUse,
)
from sinkgd.lab.bench.training_memory import Case, measure_in_fresh_processes, why_no_room
from sinkgd.lab.bench.workloads import WORKLOADS, Problem, Workload, build_problem
from sinkgd.lab.launch import in_fresh_process
from sinkgd.lab.models import preset_config
from sinkgd.lab.report.console import Progress
from sinkgd.lab.train.machine import describe_environment, synchronize
from sinkgd.lab.train.recipes import find_recipe


@dataclass(frozen=True)
class TrainingPlan:
    """Training steps to measure."""

    models: tuple[str, ...]  # presets
    recipes: tuple[str, ...]
    # Whether to free each gradient during backward; True is skipped for recipes that cannot.
    releases: tuple[bool, ...]
    settings: StepSettings
    device: torch.device


@dataclass(frozen=True)
class MemoryPlan:
    """What to measure: steps of optimizers alone, and training steps."""

    workloads: tuple[str, ...]  # names in WORKLOADS
    dtypes: tuple[str, ...]  # names in DTYPES
    contenders: tuple[str, ...]  # names of optimizers; empty for all
    device: torch.device
    command: str  # the command that repeats the measurement
    training: TrainingPlan | None = None


def bench_memory(plan: MemoryPlan) -> MemoryRecord:
    """Measure what the plan says."""
    environment = describe_environment(plan.device)
    uses, absent = _bench_optimizers(plan)
    training = None if plan.training is None else bench_training(plan.training)
    return MemoryRecord(plan.command, environment, tuple(uses), tuple(absent), training)


def bench_training(plan: TrainingPlan) -> TrainingMemory:
    """Measure every case of the plan; cases that do not fit into memory are listed, not run."""
    cases = list(cases_of(plan))
    progress = Progress(sum(_weight(case) for case in cases))
    uses: list[TrainingUse] = []
    absent: list[TrainingNotMeasured] = []
    for case in cases:
        progress.stage(f"training {case.model}, {case.title}", _weight(case))
        found = why_no_room(case) or measure_in_fresh_processes(case)
        if isinstance(found, TrainingUse):
            uses.append(found)
        else:
            absent.append(TrainingNotMeasured(case.model, case.title, found))
    progress.end()
    return TrainingMemory(plan.settings, tuple(uses), tuple(absent))


def cases_of(plan: TrainingPlan) -> Iterator[Case]:
    """Yield the cases; recipes that need all gradients at once have no case with release."""
    for model in plan.models:
        for recipe in plan.recipes:
            for release in plan.releases:
                if not release or find_recipe(recipe).can_release:
                    threads = torch.get_num_threads()
                    yield Case(model, recipe, release, plan.settings, str(plan.device), threads)


def _weight(case: Case) -> float:
    return preset_config(case.model).parameter_count


def _bench_optimizers(plan: MemoryPlan) -> tuple[list[MemoryUse], list[NotMeasured]]:
    subjects = _subjects(plan)
    progress = Progress(len(subjects))
    uses: list[MemoryUse] = []
    absent: list[NotMeasured] = []
    for subject in subjects:
        progress.stage(f"{subject.workload} {subject.dtype} {subject.contender}", 1)
        found = measure_in_fresh_process(subject)
        if isinstance(found, MemoryUse):
            uses.append(found)
        else:
            row = NotMeasured(subject.contender, subject.workload, subject.dtype, found)
            absent.append(row)
    progress.end()
    return uses, absent


@dataclass(frozen=True)
class Subject:
    """An optimizer to measure, described by names that another process can look up."""

    contender: str
    workload: str
    dtype: str
    device: str
    threads: int


def _subjects(plan: MemoryPlan) -> list[Subject]:
    threads = torch.get_num_threads()
    return [
        Subject(contender.name, name, dtype, str(plan.device), threads)
        for name in plan.workloads
        for dtype in plan.dtypes
        if dtype in WORKLOADS[name].dtypes
        for contender in contenders(WORKLOADS[name], plan.device)
        if not plan.contenders or contender.name in plan.contenders
    ]


def measure_in_fresh_process(subject: Subject) -> MemoryUse | str:
    """Measure one optimizer in a process of its own, in which no scratch exists yet.

    Returns:
        The memory that the optimizer uses, or why it cannot run.
    """
    return in_fresh_process(_measure_named, subject)


def _measure_named(subject: Subject) -> MemoryUse | str:
    torch.set_num_threads(subject.threads)
    workload, device = WORKLOADS[subject.workload], torch.device(subject.device)
    named = {contender.name: contender for contender in contenders(workload, device)}
    contender = named[subject.contender]
    reason = contender.absent()
    return reason if reason is not None else measure(contender, workload, subject.dtype, device)


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
    """Return the target for scratch: 1 MiB plus, for each thread, 4(m + n) bytes.

    m and n are the sides of the matrix whose m + n is largest.
    """
    longest = max(sum(p.shape[-2:]) for p in problem.params if p.ndim > 1)
    return 2**20 + 4 * threads * longest


@dataclass(frozen=True)
class Allocations:
    """What a call allocated, in bytes."""

    kept: int  # bytes that are still allocated when the call ends
    peak: int  # the most bytes that were allocated at the same time


def allocations(call: Callable[[], object], device: torch.device) -> Allocations:
    """Run ``call``, and count what it allocates from the allocator of ``device``."""
    if device.type == "cuda":
        return _cuda_allocations(call, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    return running_sum([event.nbytes() for event in events if event.name() == "[memory]"])


def running_sum(changes: Sequence[int]) -> Allocations:
    """Add up allocations (positive) and releases (negative) in their order.

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


def _state_bytes(optimizer: Optimizer) -> int:
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
