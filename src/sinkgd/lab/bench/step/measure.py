"""Time the optimizers on a workload in turns: what each takes of AdamW and of its floor.

Beside the times, two checks. Scales are compared with those of the definition,
`sinkgd.kernels.eager`, on the gradient in float64. The first call in a fresh process shows what
compiling costs: compiled code is kept in an empty folder made for this, so the user's own cache
changes nothing and is not changed. Importing torch and sinkgd is not counted; the backend's own
imports are.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from sinkgd import kernels
from sinkgd.kernels import Scales
from sinkgd.lab.bench.bandwidth import (
    Bandwidth,
    Probe,
    bandwidth,
    calls,
    fastest,
    floor_seconds,
    probes,
)
from sinkgd.lab.bench.contenders import ADAMW, ITERATIONS, Contender, contenders, stepper
from sinkgd.lab.bench.problem import Problem, available_bytes, build_problem
from sinkgd.lab.bench.quartiles import Turns, quartiles, ratios, taken
from sinkgd.lab.bench.step.records import Absent, Accuracy, FirstCall, Timing, WorkloadTiming
from sinkgd.lab.bench.turns import Pace, take_turns
from sinkgd.lab.bench.workloads import DTYPES, Workload


def measure_accuracy(workload: Workload, backend: str, device: torch.device) -> Accuracy:
    """Compare one gradient of each shape of a workload with float64."""
    problem = build_problem(workload, "float32", device)
    iterations = ITERATIONS[0]
    found = kernels.select(backend, device)
    worst = 0.0
    for grad in _one_of_each_shape(problem.grads):
        (scales,) = found.scales([grad], iterations)
        (exact,) = kernels.select("eager", device).scales([grad.double()], iterations)
        worst = max(worst, relative_error(scales, exact))
    return Accuracy(backend, workload.name, iterations, worst)


def relative_error(scales: Scales, exact: Scales) -> float:
    """Return the largest relative error of the products r·c, over all rows and columns.

    Products, for a factor may have moved from r to c. No product is formed: with a and b the ratios
    of the rows and of the columns, the ratios of the products lie between min a · min b and
    max a · max b.
    """
    rows, cols = scales.row.double() / exact.row, scales.col.double() / exact.col
    ends = rows.min() * cols.min() - 1, rows.max() * cols.max() - 1
    return max(abs(end.item()) for end in ends)


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
    """Time a backend's first call, once with an empty cache and then with the cache it left."""
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


_USABLE = 0.9  # of the free memory


@dataclass(frozen=True)
class Field:
    """Who takes part on a workload, and who does not."""

    contenders: list[Contender]
    probes: list[Probe]
    absent: list[Absent]


def workload_bytes(workload: Workload, dtype: str) -> int:
    """Return the bytes of a workload's parameters."""
    entries = sum(torch.Size(shape).numel() for shape in workload.shapes())
    return entries * DTYPES[dtype].itemsize


def fits(workload: Workload, dtype: str, device: torch.device) -> str | None:
    """Say why a workload cannot be timed for want of memory; None where it can."""
    free = available_bytes(device)
    needed = 4 * workload_bytes(workload, dtype)  # parameters, gradients, AdamW's state
    if free is None or needed <= _USABLE * free:
        return None
    return f"AdamW needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def time_workload(
    workload: Workload,
    dtype: str,
    device: torch.device,
    pace: Pace,
    *,
    wanted: Callable[[str], bool],
    progress: Callable[[float], None],
) -> WorkloadTiming:
    """Time every optimizer that runs here on a workload.

    Args:
        workload: What is updated.
        dtype: A name in `DTYPES`, of parameters and gradients.
        device: Where.
        pace: Rounds and turns.
        wanted: Whether an optimizer is to take part, by name; fused AdamW always does.
        progress: Told the part that is done, 0 to 1.
    """
    size = workload_bytes(workload, dtype)
    free = available_bytes(device)
    room = float("inf") if free is None else _USABLE * free / size - 2
    field = _enter(workload, device, room, wanted)
    problem = build_problem(workload, dtype, device)
    turns: dict[str, Callable[[], object]] = {
        one.name: stepper(one.build(problem)) for one in field.contenders
    }
    turns.update(calls(field.probes, problem))
    seconds = take_turns(turns, pace, device, progress, reference=ADAMW)
    timing = _summarize(workload, dtype, problem, field, seconds)
    del turns, problem
    gc.collect()
    return timing


def _enter(
    workload: Workload, device: torch.device, room: float, wanted: Callable[[str], bool]
) -> Field:
    """Let contenders in while memory lasts: ``room`` is in sizes of the workload."""
    field = Field([], [], [])
    for probe in probes(device):
        if probe.copies == 0:
            field.probes.append(probe)
    for contender in contenders(workload, device):
        if contender.name != ADAMW and not wanted(contender.name):
            continue
        reason = workload.without_slow if contender.slow else None
        reason = reason or contender.absent()
        if reason is None and contender.copies > room:
            reason = f"not enough memory: {contender.copies} more copies of the matrices"
        if reason is not None:
            field.absent.append(Absent(contender.name, contender.title, reason))
        else:
            room -= contender.copies
            field.contenders.append(contender)
    field.probes.extend(p for p in probes(device) if 0 < p.copies <= room)
    return field


def _summarize(
    workload: Workload,
    dtype: str,
    problem: Problem,
    field: Field,
    seconds: Mapping[str, Sequence[float | None]],
) -> WorkloadTiming:
    candidates = [
        *(bandwidth(p.name, p.passes * problem.bytes, seconds[p.name]) for p in field.probes),
        *(
            bandwidth(one.title, one.floor_bytes(problem), seconds[one.name])
            for one in field.contenders
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
            for one in field.contenders
        ),
        absent=tuple(field.absent),
        bandwidths=tuple(candidates),
        bandwidth=best.name,
    )


def summarize_timing(
    name: str,
    title: str,
    seconds: Turns,
    *,
    adamw: Turns,
    floor_bytes: int | None,
    best: Bandwidth,
) -> Timing:
    """Compare an optimizer's turns with AdamW's and with its floor's, round by round."""
    floor = None if floor_bytes is None else floor_seconds(floor_bytes, best)
    return Timing(
        name=name,
        title=title,
        seconds=tuple(seconds),
        step_seconds=quartiles(taken(seconds)),
        of_adamw=quartiles(ratios(seconds, adamw)),
        of_floor=None if floor is None else quartiles(ratios(seconds, floor)),
        floor_bytes=floor_bytes,
        floor_of_adamw=None if floor is None else quartiles(ratios(floor, adamw)).median,
    )
