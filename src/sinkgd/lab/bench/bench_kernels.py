"""`sinkgd bench kernels`: the two halves of a step, scales and update, in each backend.

Each half is timed over many shapes and types, and its speed is compared with the bandwidth of the
memory. This file also makes the tables, the charts and the page.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sinkgd import kernels
from sinkgd.kernels import Backend
from sinkgd.lab.bench.contenders import backends
from sinkgd.lab.bench.interleaved import (
    INTERLEAVED_NOTE,
    Bandwidth,
    Pace,
    Quartiles,
    RoundSeconds,
    environment_with_load,
    fastest,
    floor_seconds,
    probe_calls,
    probes,
    quartiles,
    ratios,
    reliability_warnings,
    spreads_widely,
    summarize_bandwidth,
    time_interleaved,
    timed_rounds,
    update_call,
)
from sinkgd.lab.bench.step_record import Absent
from sinkgd.lab.bench.workloads import DTYPES, Problem, Shape, random_problem
from sinkgd.lab.report.console import Progress, TextTable
from sinkgd.lab.report.figures import Chart
from sinkgd.lab.report.measurement_page import (
    PageContent,
    Series,
    dots,
    environment_table,
    lines,
    measurement_page,
)


@dataclass(frozen=True)
class KernelTiming:
    """One operation of a backend on one case."""

    backend: str
    operation: str  # a name in OPERATIONS
    moved_bytes: int  # per call
    seconds: tuple[float | None, ...]  # per call, one for each round
    call_seconds: Quartiles
    bytes_per_second: Quartiles
    share: Quartiles  # fraction of the measured bandwidth, round by round


@dataclass(frozen=True)
class CaseTiming:
    """The timings of all backends on the matrices of one case, in one type."""

    case: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    timings: tuple[KernelTiming, ...]
    bandwidths: tuple[Bandwidth, ...]
    bandwidth: str  # the name of the fastest of them

    def timing(self, backend: str, operation: str) -> KernelTiming | None:
        """Return the timing of one operation, if it was timed."""
        wanted = (backend, operation)
        return next((t for t in self.timings if (t.backend, t.operation) == wanted), None)


@dataclass(frozen=True)
class KernelsRecord:
    """One run of `sinkgd bench kernels`."""

    command: str
    environment: dict[str, Any]
    rounds: int
    cases: tuple[CaseTiming, ...]
    absent: tuple[Absent, ...]  # backends that were not timed


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
    """A call of a backend, and the fewest passes over the matrices that it needs."""

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
    command: str  # the command that repeats the measurement


def bench_kernels(plan: KernelsPlan, show: Callable[[CaseTiming], None]) -> KernelsRecord:
    """Measure what the plan says.

    Args:
        plan: What to measure.
        show: Called with each case's timings as soon as they are complete.
    """
    environment = environment_with_load(plan.device)
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
    """Time every operation on one case, with every backend that runs here."""
    problem = random_problem(CASES[case], DTYPES[dtype], plan.device)
    found = probes(plan.device)
    entries: dict[tuple[str, str], Callable[[], object]] = {
        (backend, name): operation.build(kernels.select(backend, plan.device), problem)
        for backend, reason in backends(plan.device)
        if reason is None
        for name, operation in OPERATIONS.items()
    }
    named = {f"{backend}/{name}": call for (backend, name), call in entries.items()}
    streams = probe_calls(found, problem)
    seconds = time_interleaved({**named, **streams}, plan.pace, plan.device, progress)
    bandwidths = [
        summarize_bandwidth(p.name, p.passes * problem.bytes, seconds[p.name]) for p in found
    ]
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
    backend: str, operation: str, seconds: RoundSeconds, *, moved_bytes: int, floor: RoundSeconds
) -> KernelTiming:
    return KernelTiming(
        backend=backend,
        operation=operation,
        moved_bytes=moved_bytes,
        seconds=tuple(seconds),
        call_seconds=quartiles(timed_rounds(seconds)),
        bytes_per_second=quartiles([moved_bytes / own for own in timed_rounds(seconds)]),
        share=quartiles(ratios(floor, seconds)),
    )


def kernels_page(record: KernelsRecord) -> str:
    """Make the page of `sinkgd bench kernels`."""
    absent = tuple((one.title, one.reason) for one in record.absent)
    details = [TextTable("Absent backends", "", ("backend", "why"), (), absent)] if absent else []
    content = PageContent(
        headline="Speed of the backends on many shapes, compared with the bandwidth of memory.",
        cautions=kernels_warnings(record),
        charts=kernel_charts(record),
        tables=[case_table(case) for case in record.cases],
        details=details,
        footer=INTERLEAVED_NOTE,
    )
    return measurement_page(
        content,
        title="sinkgd bench kernels",
        environment=environment_table(record.environment),
        command=record.command,
    )


def kernels_warnings(record: KernelsRecord) -> tuple[str, ...]:
    """Return warnings about unreliable shares; empty if all are reliable."""
    wide = {
        f"{case.case}, {case.dtype}": [
            f"{one.backend}: {one.operation}" for one in case.timings if spreads_widely(one.share)
        ]
        for case in record.cases
    }
    return reliability_warnings(record.environment, wide)


def case_table(case: CaseTiming) -> TextTable:
    """Make the table of one case."""
    best = next(b for b in case.bandwidths if b.name == case.bandwidth)
    rate = best.bytes_per_second.median / 1e9
    return TextTable(
        title=f"{case.case}, {case.dtype}",
        note=f"Share: fraction of the bandwidth that {best.name} reached in the same round. The "
        f"median of this bandwidth is {rate:.1f} GB/s.",
        columns=("operation", "µs", "GB/s", "share"),
        rows=tuple(
            (
                f"{timing.backend}: {timing.operation}",
                f"{1e6 * timing.call_seconds.median:,.1f}",
                f"{timing.bytes_per_second.median / 1e9:.2f}",
                f"{timing.share.median:.0%} [{timing.share.lower:.0%}, {timing.share.upper:.0%}]",
            )
            for timing in case.timings
        ),
    )


def kernel_charts(record: KernelsRecord) -> list[Chart]:
    """Draw the shares of the measured bandwidth in each type that was timed."""
    charts = []
    for dtype in dict.fromkeys(case.dtype for case in record.cases):
        cases = [case for case in record.cases if case.dtype == dtype]
        squares = {
            size: case for size in SQUARES for case in cases if case.case == f"{size}x{size}"
        }
        if len(squares) > 1:
            charts.append(_squares(dtype, squares))
        charts.append(_all(dtype, cases))
    return charts


def _rows(case: CaseTiming) -> list[tuple[str, str]]:
    return [(timing.backend, timing.operation) for timing in case.timings]


def _squares(dtype: str, squares: dict[int, CaseTiming]) -> Chart:
    rows = _rows(next(iter(squares.values())))
    shares = {
        row: [t.share.median for case in squares.values() if (t := case.timing(*row))]
        for row in rows
    }
    described = "; ".join(
        f"{': '.join(row)} {', '.join(f'{s:.0%}' for s in shares[row])}" for row in rows
    )
    return Chart(
        key=f"squares-{dtype}",
        title=f"Square matrices, {dtype}",
        caption="Bytes per second as a share of the fastest streaming operation on the same "
        "matrix. Bytes that are read again from a cache count each time, so a share may exceed "
        "100 %.",
        description=f"Sizes {', '.join(map(str, squares))}. {described}.",
        figure=lines(
            list(squares),
            [(": ".join(row), shares[row]) for row in rows],
            x="rows and columns",
            y="share of the bandwidth",
        ),
        share=1,
    )


def _all(dtype: str, cases: list[CaseTiming]) -> Chart:
    rows = list(dict.fromkeys(row for case in cases for row in _rows(case)))
    described = "; ".join(
        f"{case.case}: "
        + ", ".join(
            f"{': '.join(row)} {t.share.median:.0%}" for row in rows if (t := case.timing(*row))
        )
        for case in cases
    )
    return Chart(
        key=f"shapes-{dtype}",
        title=f"Every shape, {dtype}",
        caption="Share of the measured bandwidth; right is faster. Dots are medians, whiskers "
        "quartiles.",
        description=f"{described}.",
        figure=dots(
            [case.case for case in cases],
            [
                Series(
                    ": ".join(row),
                    color,
                    {i: t.share for i, case in enumerate(cases) if (t := case.timing(*row))},
                )
                for color, row in enumerate(rows)
            ],
            unit="share of the bandwidth",
            one="all of it",
        ),
        share=1,
    )
