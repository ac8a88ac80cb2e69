"""Time the two halves of a step, scales and update, of each backend over shapes and types."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from sinkgd import kernels
from sinkgd.kernels import Backend
from sinkgd.lab.bench.bandwidth import (
    bandwidth,
    calls,
    fastest,
    floor_seconds,
    probes,
    update_call,
)
from sinkgd.lab.bench.contenders import backends
from sinkgd.lab.bench.doubts import environment_before
from sinkgd.lab.bench.kernels.cases import CASES
from sinkgd.lab.bench.kernels.records import CaseTiming, KernelsRecord, KernelTiming
from sinkgd.lab.bench.problem import Problem, random_problem
from sinkgd.lab.bench.progress import Progress
from sinkgd.lab.bench.quartiles import Turns, quartiles, ratios, taken
from sinkgd.lab.bench.step.records import Absent
from sinkgd.lab.bench.turns import Pace, take_turns
from sinkgd.lab.bench.workloads import DTYPES


@dataclass(frozen=True)
class Operation:
    """A call of a backend, and the passes over the matrices that it cannot do without."""

    passes: int
    build: Callable[[Backend, Problem], Callable[[], object]]


def _scales(iterations: int) -> Operation:
    return Operation(iterations, lambda backend, p: partial(backend.scales, p.grads, iterations))


OPERATIONS = {
    "scales, L=1": _scales(1),
    "scales, L=5": _scales(5),
    "update": Operation(3, update_call),
}


@dataclass(frozen=True)
class KernelsPlan:
    """What to measure."""

    cases: tuple[str, ...]  # names in CASES
    dtypes: tuple[str, ...]  # names in DTYPES
    pace: Pace
    device: torch.device
    command: str  # that repeats it


def bench_kernels(plan: KernelsPlan, show: Callable[[CaseTiming], None]) -> KernelsRecord:
    """Measure what the plan says.

    Args:
        plan: What to measure.
        show: Given each case's timings when they are there.
    """
    environment = environment_before(plan.device)
    progress = Progress(len(plan.cases) * len(plan.dtypes))
    cases = []
    for case in plan.cases:
        for dtype in plan.dtypes:
            timing = time_case(case, dtype, plan, progress.stage(f"{case} {dtype}", 1))
            progress.end()
            show(timing)
            cases.append(timing)
    absent = tuple(
        Absent(name, name, reason) for name, reason in backends(plan.device) if reason is not None
    )
    return KernelsRecord(plan.command, environment, plan.pace.rounds, tuple(cases), absent)


def time_case(
    case: str, dtype: str, plan: KernelsPlan, progress: Callable[[float], None]
) -> CaseTiming:
    """Time every operation of every backend that runs here on one case."""
    problem = random_problem(CASES[case], DTYPES[dtype], plan.device)
    found = probes(plan.device)
    entries: dict[tuple[str, str], Callable[[], object]] = {
        (backend, name): operation.build(kernels.select(backend, plan.device), problem)
        for backend, reason in backends(plan.device)
        if reason is None
        for name, operation in OPERATIONS.items()
    }
    turns = {f"{backend}/{name}": call for (backend, name), call in entries.items()}
    seconds = take_turns({**turns, **calls(found, problem)}, plan.pace, plan.device, progress)
    bandwidths = [bandwidth(p.name, p.passes * problem.bytes, seconds[p.name]) for p in found]
    best = fastest(bandwidths)
    return CaseTiming(
        case=case,
        dtype=dtype,
        shapes=CASES[case],
        timings=tuple(
            _summarize(
                backend,
                name,
                seconds[f"{backend}/{name}"],
                moved_bytes=(moved := OPERATIONS[name].passes * problem.bytes),
                floor=floor_seconds(moved, best),
            )
            for backend, name in entries
        ),
        bandwidths=tuple(bandwidths),
        bandwidth=best.name,
    )


def _summarize(
    backend: str, operation: str, seconds: Turns, *, moved_bytes: int, floor: Turns
) -> KernelTiming:
    return KernelTiming(
        backend=backend,
        operation=operation,
        moved_bytes=moved_bytes,
        seconds=tuple(seconds),
        call_seconds=quartiles(taken(seconds)),
        bytes_per_second=quartiles([moved_bytes / turn for turn in taken(seconds)]),
        share=quartiles(ratios(floor, seconds)),
    )
