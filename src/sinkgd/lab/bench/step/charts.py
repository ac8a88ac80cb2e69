"""The charts of `sinkgd bench step`: one a type, a row an optimizer, a color a workload."""

from sinkgd.lab.bench.charts import Series, dots
from sinkgd.lab.bench.contenders import ADAMW
from sinkgd.lab.bench.step.records import StepRecord, Timing, WorkloadTiming
from sinkgd.lab.report.charts import Chart


def step_charts(record: StepRecord) -> list[Chart]:
    """Draw the ratios to AdamW in each type that was timed."""
    dtypes = dict.fromkeys(workload.dtype for workload in record.workloads)
    return [chart for dtype in dtypes if (chart := _chart(record, dtype)) is not None]


def _chart(record: StepRecord, dtype: str) -> Chart | None:
    workloads = [workload for workload in record.workloads if workload.dtype == dtype]
    rows = dict.fromkeys(t.title for w in workloads for t in _others(w))
    if not rows:
        return None
    colors = list(dict.fromkeys(workload.workload for workload in record.workloads))
    place = {title: i for i, title in enumerate(rows)}
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
        "passes over memory that the method cannot do without, at the bandwidth measured.",
        description=f"Ratios to fused AdamW. {described}.",
        figure=dots(
            list(rows),
            [_series(workload, colors.index(workload.workload), place) for workload in workloads],
            unit="× the time of AdamW",
            one="AdamW, fused",
        ),
        share=1,
    )


def _series(workload: WorkloadTiming, color: int, place: dict[str, int]) -> Series:
    others = _others(workload)
    return Series(
        workload.workload,
        color,
        {place[timing.title]: timing.of_adamw for timing in others},
        {
            place[timing.title]: timing.floor_of_adamw
            for timing in others
            if timing.floor_of_adamw is not None
        },
    )


def _others(workload: WorkloadTiming) -> list[Timing]:
    return [timing for timing in workload.timings if timing.name != ADAMW]
