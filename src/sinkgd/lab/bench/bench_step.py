"""`sinkgd bench step`: time optimizer steps on matrices with the shapes of real models.

Steps are compared with those of AdamW, and with a floor: a lower bound on their time that follows
from the bandwidth of memory.

There are also three checks. The accuracy check compares the scales with those of the definition,
`sinkgd.kernels.eager`, on the gradient in float64. The scratch check measures what a step
allocates. The first-call check times the first call in a fresh process, to show what compiling
costs. It keeps compiled code in a new temporary folder, so it neither uses nor changes the
user's cache. Importing torch and sinkgd is not counted; the backend's own imports are.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from sinkgd import kernels
from sinkgd.kernels import Scales
from sinkgd.lab.bench.bench_memory import Subject, measure_in_fresh_process
from sinkgd.lab.bench.contenders import (
    ADAMW,
    ITERATIONS,
    Contender,
    backends,
    contenders,
    our_name,
)
from sinkgd.lab.bench.interleaved import (
    Bandwidth,
    Pace,
    Probe,
    RoundSeconds,
    environment_with_load,
    fastest,
    floor_seconds,
    probe_calls,
    probes,
    quartiles,
    ratios,
    summarize_bandwidth,
    time_interleaved,
    timed_rounds,
)
from sinkgd.lab.bench.memory_report import MemoryUse
from sinkgd.lab.bench.step_record import (
    Absent,
    Accuracy,
    FirstCall,
    StepRecord,
    Timing,
    WorkloadTiming,
    evaluate,
    worst_of,
)
from sinkgd.lab.bench.workloads import (
    DTYPES,
    WORKLOADS,
    Problem,
    Workload,
    available_bytes,
    build_problem,
)
from sinkgd.lab.report.console import Progress

# The checks, which are not timings of steps. A plan names them in its list of workloads.
FIRST_CALL, ACCURACY, SCRATCH = "first-call", "accuracy", "scratch"
CHECKS = (FIRST_CALL, ACCURACY, SCRATCH)
CHECKED_WORKLOADS = ("llama-60m", "llama-1b-layer")
_CHECK_WEIGHT = 60e6  # weight of a check in the progress; `_weight` returns that of a workload
_USABLE = 0.9  # fraction of the free memory that a workload may take


@dataclass(frozen=True)
class StepPlan:
    """What to measure."""

    workloads: tuple[str, ...]  # names in WORKLOADS and CHECKS
    dtypes: tuple[str, ...]  # names in DTYPES
    contenders: tuple[str, ...]  # names of optimizers; empty for all
    pace: Pace
    device: torch.device
    command: str  # the command that repeats the measurement


def bench_step(plan: StepPlan, show: Callable[[WorkloadTiming], None]) -> StepRecord:
    """Measure what the plan says.

    Args:
        plan: What to measure.
        show: Called with each workload's timings as soon as they are complete.

    Returns:
        The record, including the results of the targets.
    """
    environment = environment_with_load(plan.device)
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
    workload: Workload, dtype: str, plan: StepPlan, progress: Progress
) -> WorkloadTiming | Absent:
    stage = progress.stage(f"{workload.name} {dtype}", _weight(workload, dtype))
    reason = None if dtype in workload.dtypes else f"it is timed in {workload.dtypes[0]} only"
    reason = reason or why_no_room(workload, dtype, plan.device)
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


def _weight(workload: Workload, dtype: str) -> float:
    # Slow contenders take most of the time. Their time depends on the number of entries, not on
    # the type.
    entries = workload_bytes(workload, dtype) / DTYPES[dtype].itemsize
    return entries if workload.without_slow else 4 * entries


@dataclass(frozen=True)
class Participants:
    """The optimizers and probes that are timed on a workload, and the absent optimizers."""

    contenders: list[Contender]
    probes: list[Probe]
    absent: list[Absent]


def workload_bytes(workload: Workload, dtype: str) -> int:
    """Return the bytes of a workload's parameters."""
    entries = sum(torch.Size(shape).numel() for shape in workload.shapes())
    return entries * DTYPES[dtype].itemsize


def why_no_room(workload: Workload, dtype: str, device: torch.device) -> str | None:
    """Return why a workload, with AdamW's state, does not fit into memory, or None if it does."""
    free = available_bytes(device)
    needed = 4 * workload_bytes(workload, dtype)  # parameters, gradients, AdamW's state
    if free is None or needed <= _USABLE * free:
        return None
    return (
        f"AdamW needs {needed / 2**30:.1f} GiB, more than {_USABLE:.0%} of the "
        f"{free / 2**30:.1f} GiB that are free"
    )


def time_workload(
    workload: Workload,
    dtype: str,
    device: torch.device,
    pace: Pace,
    *,
    wanted: Callable[[str], bool],
    progress: Callable[[float], None],
) -> WorkloadTiming:
    """Time the wanted optimizers on a workload.

    An optimizer is left out, and listed with the reason, if it cannot run here, if memory is short,
    or if it is slow and the workload leaves out slow ones.

    Args:
        workload: The parameters to update.
        dtype: The type of parameters and gradients, a name in `DTYPES`.
        device: The device to run on.
        pace: Number of rounds, and time for each contender.
        wanted: Says, given an optimizer's name, whether to time it; fused AdamW is always timed.
        progress: Called with the fraction of the work that is done, 0 to 1.
    """
    size = workload_bytes(workload, dtype)
    free = available_bytes(device)
    room = float("inf") if free is None else _USABLE * free / size - 2
    participants = _choose_participants(workload, device, room, wanted)
    problem = build_problem(workload, dtype, device)
    calls: dict[str, Callable[[], object]] = {
        one.name: one.build(problem).step for one in participants.contenders
    }
    calls.update(probe_calls(participants.probes, problem))
    seconds = time_interleaved(calls, pace, device, progress, reference=ADAMW)
    timing = _summarize(workload, dtype, problem, participants, seconds)
    del calls, problem
    gc.collect()
    return timing


def _choose_participants(
    workload: Workload, device: torch.device, room: float, wanted: Callable[[str], bool]
) -> Participants:
    """Choose optimizers and probes as long as memory is left for them.

    ``room`` is the memory for all optimizers and probes, as a multiple of the workload's bytes.
    """
    participants = Participants([], [], [])
    for probe in probes(device):
        if probe.copies == 0:
            participants.probes.append(probe)
    for contender in contenders(workload, device):
        if contender.name != ADAMW and not wanted(contender.name):
            continue
        reason = workload.without_slow if contender.slow else None
        reason = reason or contender.absent()
        if reason is None and contender.copies > room:
            reason = f"not enough memory: it needs {contender.copies} more copies of the matrices"
        if reason is not None:
            participants.absent.append(Absent(contender.name, contender.title, reason))
        else:
            room -= contender.copies
            participants.contenders.append(contender)
    participants.probes.extend(p for p in probes(device) if 0 < p.copies <= room)
    return participants


def _summarize(
    workload: Workload,
    dtype: str,
    problem: Problem,
    participants: Participants,
    seconds: Mapping[str, Sequence[float | None]],
) -> WorkloadTiming:
    candidates = [
        *(
            summarize_bandwidth(p.name, p.passes * problem.bytes, seconds[p.name])
            for p in participants.probes
        ),
        *(
            summarize_bandwidth(one.title, one.floor_bytes(problem), seconds[one.name])
            for one in participants.contenders
            if one.floor_bytes is not None and one.streams
        ),
    ]
    best = fastest(candidates)
    return WorkloadTiming(
        workload=workload.name,
        title=workload.title,
        dtype=dtype,
        matrices=len(problem.params),
        entries=sum(p.numel() for p in problem.params),
        timings=tuple(
            summarize_timing(
                one.name,
                one.title,
                seconds[one.name],
                adamw=seconds[ADAMW],
                floor_bytes=None if one.floor_bytes is None else one.floor_bytes(problem),
                best=best,
            )
            for one in participants.contenders
        ),
        absent=tuple(participants.absent),
        bandwidths=tuple(candidates),
        bandwidth=best.name,
    )


def summarize_timing(
    name: str,
    title: str,
    seconds: RoundSeconds,
    *,
    adamw: RoundSeconds,
    floor_bytes: int | None,
    best: Bandwidth,
) -> Timing:
    """Compare an optimizer with AdamW and with its floor, round by round."""
    floor = None if floor_bytes is None else floor_seconds(floor_bytes, best)
    return Timing(
        name=name,
        title=title,
        seconds=tuple(seconds),
        step_seconds=quartiles(timed_rounds(seconds)),
        of_adamw=quartiles(ratios(seconds, adamw)),
        of_floor=None if floor is None else quartiles(ratios(seconds, floor)),
        floor_bytes=floor_bytes,
        floor_of_adamw=None if floor is None else quartiles(ratios(floor, adamw)).median,
    )


def _check(
    record: StepRecord, checks: Sequence[str], plan: StepPlan, progress: Progress
) -> StepRecord:
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


def _scratch(backend: str, plan: StepPlan) -> tuple[MemoryUse, ...]:
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
            assert isinstance(use, MemoryUse), use  # "auto" takes only a backend that runs
            uses.append(use)
    return tuple(uses)


def measure_accuracy(workload: Workload, backend: str, device: torch.device) -> Accuracy:
    """Compare scales with those in float64, for a gradient of each shape of a workload."""
    problem = build_problem(workload, "float32", device)
    iterations = ITERATIONS[0]
    found = kernels.select(backend, device)
    errors = []
    for grad in _one_of_each_shape(problem.grads):
        (scales,) = found.scales([grad], iterations)
        (exact,) = kernels.select("eager", device).scales([grad.double()], iterations)
        errors.append(relative_error(scales, exact))
    return Accuracy(backend, workload.name, iterations, worst_of(errors))


def relative_error(scales: Scales, exact: Scales) -> float:
    """Return the largest relative error of the products r·c, over all rows and columns.

    Products are compared because a factor may have moved from r to c. No product is formed: if a
    and b are the ratios of the row and of the column scales to the exact ones, the ratios of the
    products lie between min a · min b and max a · max b.
    """
    rows, cols = scales.row.double() / exact.row, scales.col.double() / exact.col
    ends = rows.min() * cols.min() - 1, rows.max() * cols.max() - 1
    return worst_of(abs(end.item()) for end in ends)


def _one_of_each_shape(grads: list[Tensor]) -> Iterator[Tensor]:
    yield from {grad.shape: grad for grad in grads}.values()


CACHES = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR")
WARM_PROCESSES = 3
_PROGRAM = """\
import sys, time, torch, sinkgd
from sinkgd.lab.launch import end_with_parent
end_with_parent()
backend, device = sys.argv[1:]
grad = torch.randn(256, 256, dtype=torch.float32, device=device)
started = time.perf_counter()
sinkgd.sinkhorn_scales(grad, backend=backend).col.sum().item()
print(time.perf_counter() - started)
"""


def measure_first_call(backend: str, device: torch.device) -> FirstCall:
    """Time a backend's first call with an empty cache, and then with the cache that it left."""
    with TemporaryDirectory(prefix="sinkgd-bench-") as cache:
        cold = _call(backend, device, Path(cache))
        warm = tuple(_call(backend, device, Path(cache)) for _ in range(WARM_PROCESSES))
    return FirstCall(backend, cold, warm)


def _call(backend: str, device: torch.device, cache: Path) -> float:
    environment = {**os.environ, **dict.fromkeys(CACHES, str(cache))}
    command = [sys.executable, "-c", _PROGRAM, backend, device.type]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"the first call of backend {backend!r} failed: {done.stderr.strip()}")
    return float(done.stdout)
