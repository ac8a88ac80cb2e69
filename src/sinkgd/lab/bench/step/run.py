"""The whole of `sinkgd bench step`: workload after workload, then what is no timing of steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from sinkgd import kernels
from sinkgd.lab.bench.contenders import ITERATIONS, backends, our_name
from sinkgd.lab.bench.doubts import environment_before
from sinkgd.lab.bench.memory.measure import Subject, measure_in_fresh_process
from sinkgd.lab.bench.memory.records import MemoryUse
from sinkgd.lab.bench.progress import Progress
from sinkgd.lab.bench.step.measure import (
    fits,
    measure_accuracy,
    measure_first_call,
    time_workload,
    workload_bytes,
)
from sinkgd.lab.bench.step.records import Absent, Accuracy, StepRecord, WorkloadTiming
from sinkgd.lab.bench.step.targets import evaluate
from sinkgd.lab.bench.turns import Pace
from sinkgd.lab.bench.workloads import DTYPES, WORKLOADS, Workload

# What is measured besides times of steps, under names that stand beside the workloads'.
FIRST_CALL, ACCURACY, SCRATCH = "first-call", "accuracy", "scratch"
CHECKS = (FIRST_CALL, ACCURACY, SCRATCH)
CHECKED_WORKLOADS = ("llama-60m", "llama-1b-layer")
_CHECK_WEIGHT = 60e6  # of the progress of a check, in bytes of a workload


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    workloads: tuple[str, ...]  # names in WORKLOADS and CHECKS
    dtypes: tuple[str, ...]  # names in DTYPES
    contenders: tuple[str, ...]  # names; all where empty
    pace: Pace
    device: torch.device
    command: str  # that repeats it


def bench_step(plan: Plan, show: Callable[[WorkloadTiming], None]) -> StepRecord:
    """Measure what the plan says.

    Args:
        plan: What to measure.
        show: Given each workload's timings when they are there.

    Returns:
        The record, its targets evaluated.
    """
    environment = environment_before(plan.device)
    jobs = [
        (WORKLOADS[name], dtype)
        for name in plan.workloads
        if name in WORKLOADS
        for dtype in plan.dtypes
    ]
    checks = [name for name in plan.workloads if name in CHECKS]
    progress = Progress(
        sum(_weight(workload, dtype) for workload, dtype in jobs) + _CHECK_WEIGHT * len(checks)
    )
    timings: list[WorkloadTiming] = []
    skipped: list[Absent] = []
    for workload, dtype in jobs:
        found = _time(workload, dtype, plan, progress)
        if isinstance(found, Absent):
            skipped.append(found)
        else:
            timings.append(found)
            show(found)
    record = StepRecord(
        command=plan.command,
        environment=environment,
        ours=kernels.select("auto", plan.device).name,
        rounds=plan.pace.rounds,
        workloads=tuple(timings),
        skipped=tuple(skipped),
        first_calls=(),
        accuracies=(),
        scratch=(),
        targets=(),
    )
    record = _check(record, checks, plan, progress)
    progress.end()
    return replace(record, targets=evaluate(record))


def _time(
    workload: Workload, dtype: str, plan: Plan, progress: Progress
) -> WorkloadTiming | Absent:
    stage = progress.stage(f"{workload.name} {dtype}", _weight(workload, dtype))
    reason = None if dtype in workload.dtypes else f"it is timed in {workload.dtypes[0]} alone"
    reason = reason or fits(workload, dtype, plan.device)
    if reason is not None:
        return Absent(workload.name, f"{workload.name}, {dtype}", reason)
    timing = time_workload(
        workload,
        dtype,
        plan.device,
        plan.pace,
        wanted=lambda name: not plan.contenders or name in plan.contenders,
        progress=stage,
    )
    progress.end()
    return timing


def _check(record: StepRecord, checks: Sequence[str], plan: Plan, progress: Progress) -> StepRecord:
    running = [name for name, reason in backends(plan.device) if reason is None]
    for check in checks:
        progress.stage(check, _CHECK_WEIGHT)
        if check == FIRST_CALL:
            first_calls = tuple(measure_first_call(name, plan.device) for name in running)
            record = replace(record, first_calls=first_calls)
        elif check == ACCURACY:
            record = replace(record, accuracies=_accuracies(running, plan.device))
        else:
            record = replace(record, scratch=_scratch(record.ours, plan))
    return record


def _accuracies(running: Sequence[str], device: torch.device) -> tuple[Accuracy, ...]:
    return tuple(
        measure_accuracy(WORKLOADS[workload], backend, device)
        for workload in CHECKED_WORKLOADS
        for backend in running
    )


def _scratch(backend: str, plan: Plan) -> tuple[MemoryUse, ...]:
    uses = []
    for workload in CHECKED_WORKLOADS:
        for dtype in plan.dtypes:
            subject = Subject(
                our_name(backend, ITERATIONS[0]),
                workload,
                dtype,
                str(plan.device),
                torch.get_num_threads(),
            )
            use = measure_in_fresh_process(subject)
            assert isinstance(use, MemoryUse), use  # "auto" takes only what runs
            uses.append(use)
    return tuple(uses)


def _weight(workload: Workload, dtype: str) -> float:
    # Slow contenders take most of the time, and theirs depends on the entries, not on the type.
    entries = workload_bytes(workload, dtype) / DTYPES[dtype].itemsize
    return entries if workload.without_slow else 4 * entries
