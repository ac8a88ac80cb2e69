"""Tables, charts and page of `sinkgd bench step`."""

from sinkgd.lab.bench.contenders import ADAMW, ITERATIONS, our_name
from sinkgd.lab.bench.interleaved import (
    INTERLEAVED_NOTE,
    Quartiles,
    is_loaded,
    reliability_warnings,
    spreads_widely,
)
from sinkgd.lab.bench.step_record import StepRecord, TargetResult, Timing, WorkloadTiming
from sinkgd.lab.report.console import TextTable
from sinkgd.lab.report.figures import Chart
from sinkgd.lab.report.measurement_page import (
    PageContent,
    Series,
    dots,
    environment_table,
    measurement_page,
)
from sinkgd.lab.report.quantities import NO_BREAK

NOTHING = "–"
_DIGITS = 3


def step_page(record: StepRecord) -> str:
    """Make the page of `sinkgd bench step`."""
    tables = [*map(workload_table, record.workloads), check_table(record)]
    content = PageContent(
        headline=_headline(record),
        cautions=step_warnings(record),
        charts=step_charts(record),
        tables=[table for table in tables if table.rows or table.absent],
        first=[table for table in [target_table(record)] if table.rows],
        details=[bandwidth_table(record)],
        footer=INTERLEAVED_NOTE,
    )
    return measurement_page(
        content,
        title="sinkgd bench step",
        environment=environment_table(record.environment),
        command=record.command,
    )


def step_warnings(record: StepRecord) -> tuple[str, ...]:
    """Return warnings about unreliable ratios; empty if all are reliable."""
    wide = {
        f"{workload.title}, {workload.dtype}": [
            one.title for one in workload.timings if spreads_widely(one.of_adamw)
        ]
        for workload in record.workloads
    }
    return reliability_warnings(record.environment, wide)


def _headline(record: StepRecord) -> str:
    if is_loaded(record.environment):
        return "No ratio is given: the machine was busy when the measurement began."
    unreliable = False
    for workload in record.workloads:
        timing = workload.timing(our_name(record.ours, ITERATIONS[0]))
        if timing is not None and spreads_widely(timing.of_adamw):
            unreliable = True
        elif timing is not None:
            return (
                f"On {workload.title} a step of SinkGD takes {timing.of_adamw.median:.2f} times "
                f"as long as fused AdamW’s, in {workload.dtype}."
            )
    if unreliable:
        return "No ratio is given: the rounds spread too widely."
    return "Optimizer steps against fused AdamW."


def target_table(record: StepRecord) -> TextTable:
    """Make the table of the targets whose figures were measured."""
    judged = [result for result in record.targets if result.measured is not None]
    return TextTable(
        title="Targets",
        note=f"SinkGD with the backend {record.ours}. This run measured {len(judged)} of "
        f"{len(record.targets)} targets.",
        columns=("figure", "measured", "target", "met", "stretch", "met"),
        rows=tuple(
            (
                result.name,
                _with_unit(result.measured, result),
                _bound(result.target, result),
                _yes_or_no(result.met),
                _bound(result.stretch, result),
                _yes_or_no(result.stretch_met),
            )
            for result in judged
        ),
    )


def workload_table(workload: WorkloadTiming) -> TextTable:
    """Make the table of one workload's timings, with the absent optimizers."""
    best = next(b for b in workload.bandwidths if b.name == workload.bandwidth)
    rate = best.bytes_per_second.median / 1e9
    return TextTable(
        title=f"{workload.workload}, {workload.dtype}",
        note=f"{workload.title}: {workload.matrices:,} tensors, {workload.entries / 1e6:,.1f}M "
        f"entries. Medians and quartiles. Floor: the time that the fewest possible passes over "
        f"memory take, at {rate:.1f} GB/s ({best.name}).",
        columns=(
            "optimizer",
            "ms",
            "quartiles",
            "× AdamW",
            "quartiles",
            "× floor",
            "turns",
            *_small_columns(workload),
        ),
        rows=tuple(_timing_row(timing, workload) for timing in workload.timings),
        absent=tuple((one.title, one.reason) for one in workload.absent),
    )


def bandwidth_table(record: StepRecord) -> TextTable:
    """Make the table of every operation that was tried as a measure of bandwidth."""
    return TextTable(
        title="Bandwidth",
        note="Operations that only pass over the matrices, in the same rounds; floors are computed "
        "from the fastest.",
        columns=("workload, operation", "GB/s", "quartiles", "fastest"),
        rows=tuple(
            (
                f"{workload.workload} {workload.dtype}: {candidate.name}",
                f"{candidate.bytes_per_second.median / 1e9:.1f}",
                _quartiles(candidate.bytes_per_second, 1e-9),
                "yes" if candidate.name == workload.bandwidth else "",
            )
            for workload in record.workloads
            for candidate in workload.bandwidths
        ),
    )


def check_table(record: StepRecord) -> TextTable:
    """Make the table of the checks, and of the workloads that were skipped."""
    rows = [
        (
            f"first call, {call.backend}",
            f"{max(call.warm_seconds):.2f} s",
            f"slowest of {len(call.warm_seconds)} processes with a warm cache; "
            f"{call.cold_seconds:.2f} s with an empty cache",
        )
        for call in record.first_calls
    ]
    rows += [
        (
            f"relative error, {row.backend}, {row.workload}",
            f"{row.relative_error:.1e}",
            f"of r·c in float32 against float64, L={row.iterations}",
        )
        for row in record.accuracies
    ]
    rows += [
        (
            f"scratch, {use.name}, {use.workload} {use.dtype}",
            f"{use.scratch_bytes / 1024:,.0f} KiB",
            f"target: at most {use.limit_bytes / 1024:,.0f} KiB; {use.held_bytes / 1024:,.0f} KiB "
            "of the scratch is kept between steps",
        )
        for use in record.scratch
    ]
    return TextTable(
        title="Checks",
        note="",
        columns=("figure", "value", "what it is"),
        rows=tuple(rows),
        absent=tuple((skipped.title, skipped.reason) for skipped in record.skipped),
    )


def _timing_row(timing: Timing, workload: WorkloadTiming) -> tuple[str, ...]:
    small = 1e6 * timing.step_seconds.median / workload.matrices
    return (
        timing.title,
        f"{1e3 * timing.step_seconds.median:,.2f}",
        _quartiles(timing.step_seconds, 1e3),
        f"{timing.of_adamw.median:.2f}",
        _quartiles(timing.of_adamw, 1),
        f"{timing.of_floor.median:.2f}" if timing.of_floor else NOTHING,
        str(sum(turn is not None for turn in timing.seconds)),
        *((f"{small:.1f}",) if _small_columns(workload) else ()),
    )


def _small_columns(workload: WorkloadTiming) -> tuple[str, ...]:
    return ("µs per matrix",) if workload.workload == "many-small" else ()


def _quartiles(spread: Quartiles, scale: float) -> str:
    return "–".join(_three_digits(scale * value) for value in (spread.lower, spread.upper))


def _three_digits(value: float) -> str:
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _with_unit(value: float | None, result: TargetResult) -> str:
    if value is None:
        return NOTHING
    number = f"{value:.{_DIGITS}g}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.1e}"
    return f"{number}{NO_BREAK}{result.unit}" if result.unit else number


def _bound(value: float | None, result: TargetResult) -> str:
    if value is None:
        return ""
    return f"{'≥' if result.at_least else '≤'}{NO_BREAK}{_with_unit(value, result)}"


def _yes_or_no(met: bool | None) -> str:
    return "" if met is None else "yes" if met else "no"


def step_charts(record: StepRecord) -> list[Chart]:
    """Draw the ratios to AdamW in each type that was timed."""
    dtypes = dict.fromkeys(workload.dtype for workload in record.workloads)
    return [chart for dtype in dtypes if (chart := _chart(record, dtype)) is not None]


def _chart(record: StepRecord, dtype: str) -> Chart | None:
    workloads = [workload for workload in record.workloads if workload.dtype == dtype]
    titles = dict.fromkeys(t.title for w in workloads for t in _others(w))
    rows = {title: i for i, title in enumerate(titles)}
    if not rows:
        return None
    colors = list(dict.fromkeys(workload.workload for workload in record.workloads))
    described = "; ".join(
        f"{workload.workload}: "
        + ", ".join(f"{t.title} {t.of_adamw.median:.2f}" for t in _others(workload))
        for workload in workloads
    )
    return Chart(
        key=f"ratio-{dtype}",
        title=f"A step against fused AdamW, {dtype}",
        caption="Time of a step, divided by that of AdamW (fused) on the same workload in the same "
        "round; left is faster. Dots are medians, whiskers quartiles, strokes the floor: the "
        "time that the fewest possible passes over memory take, at the measured bandwidth.",
        description=f"Ratios to fused AdamW. {described}.",
        figure=dots(
            list(rows),
            [_series(workload, colors.index(workload.workload), rows) for workload in workloads],
            unit="× the time of AdamW",
            one="AdamW, fused",
        ),
        share=1,
    )


def _series(workload: WorkloadTiming, color: int, rows: dict[str, int]) -> Series:
    others = _others(workload)
    return Series(
        workload.workload,
        color,
        {rows[timing.title]: timing.of_adamw for timing in others},
        {
            rows[timing.title]: timing.floor_of_adamw
            for timing in others
            if timing.floor_of_adamw is not None
        },
    )


def _others(workload: WorkloadTiming) -> list[Timing]:
    return [timing for timing in workload.timings if timing.name != ADAMW]
