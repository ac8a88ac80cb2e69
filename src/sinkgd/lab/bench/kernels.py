"""Time the two halves of a step, scales and update, of each backend over shapes and types."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sinkgd import kernels
from sinkgd.kernels import Backend
from sinkgd.lab.bench.bandwidth import (
    Bandwidth,
    bandwidth,
    calls,
    fastest,
    floor_seconds,
    probes,
    update_call,
)
from sinkgd.lab.bench.contenders import backends
from sinkgd.lab.bench.doubts import environment_before
from sinkgd.lab.bench.problem import Problem, random_problem
from sinkgd.lab.bench.progress import Progress
from sinkgd.lab.bench.quartiles import Quartiles, Turns, quartiles, ratios, taken
from sinkgd.lab.bench.step.records import Absent
from sinkgd.lab.bench.turns import Pace, take_turns
from sinkgd.lab.bench.workloads import DTYPES, Shape


@dataclass(frozen=True)
class KernelTiming:
    """One operation of a backend on one case."""

    backend: str
    operation: str  # a name in OPERATIONS
    moved_bytes: int  # a call
    seconds: tuple[float | None, ...]  # of a call, one a round
    call_seconds: Quartiles
    bytes_per_second: Quartiles
    share: Quartiles  # of the measured bandwidth, round by round


@dataclass(frozen=True)
class CaseTiming:
    """All backends on matrices of one shape, in one type."""

    case: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    timings: tuple[KernelTiming, ...]
    bandwidths: tuple[Bandwidth, ...]
    bandwidth: str  # the fastest of them

    def timing(self, backend: str, operation: str) -> KernelTiming | None:
        """Return a row, if it was timed."""
        wanted = (backend, operation)
        return next((t for t in self.timings if (t.backend, t.operation) == wanted), None)


@dataclass(frozen=True)
class KernelsRecord:
    """One run of `sinkgd bench kernels`."""

    command: str
    environment: dict[str, Any]
    rounds: int
    cases: tuple[CaseTiming, ...]
    absent: tuple[Absent, ...]  # backends


SQUARES = (64, 128, 256, 512, 1024, 2048, 4096)

CASES: dict[str, tuple[Shape, ...]] = {
    **{f"{size}x{size}": ((size, size),) for size in SQUARES},
    "32000x256": ((32000, 256),),  # tall
    "5461x2048": ((5461, 2048),),
    "2048x5461": ((2048, 5461),),
    "256x32000": ((256, 32000),),  # wide
    "1009x997": ((1009, 997),),  # primes
    "2000 of 64x64": ((64, 64),) * 2000,
    "16 of 512x512": ((16, 512, 512),),  # a batch in one tensor
}


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
