"""The figures of `sinkgd bench memory` as tables and charts."""

from sinkgd.lab.bench.charts import stacked_bars
from sinkgd.lab.bench.memory.records import MemoryRecord, MemoryUse
from sinkgd.lab.bench.memory.training_figures import training_charts, training_sheets
from sinkgd.lab.bench.sheet import Sheet
from sinkgd.lab.report.charts import Chart
from sinkgd.lab.report.quantities import size


def memory_sheets(record: MemoryRecord) -> list[Sheet]:
    """Make a table for every workload and type, and for every model that was trained."""
    pairs = [(use.workload, use.dtype) for use in record.uses]
    pairs += [(row.workload, row.dtype) for row in record.absent]
    sheets = [_sheet(record, *pair) for pair in dict.fromkeys(pairs)]
    return sheets if record.training is None else [*sheets, *training_sheets(record.training)]


def _sheet(record: MemoryRecord, workload: str, dtype: str) -> Sheet:
    uses = [use for use in record.uses if (use.workload, use.dtype) == (workload, dtype)]
    absent = [row for row in record.absent if (row.workload, row.dtype) == (workload, dtype)]
    about = ""
    if uses:
        about = (
            f"Parameters: {size(uses[0].parameter_bytes)}. Kept: allocated by the first step and "
            "not released, less the state. In a step: the most that a later step has allocated at "
            f"once. The target for kept and in a step together: {size(uses[0].limit_bytes)}."
        )
    return Sheet(
        title=f"{workload}, {dtype}",
        note=about,
        columns=("optimizer", "state", "kept", "in a step", "kept + in a step", "of parameters"),
        rows=tuple(map(_row, uses)),
        absent=tuple((row.name, row.reason) for row in absent),
    )


def _row(use: MemoryUse) -> tuple[str, ...]:
    share = (use.state_bytes + use.scratch_bytes) / use.parameter_bytes
    figures = (use.state_bytes, use.held_bytes, use.transient_bytes, use.scratch_bytes)
    return (use.title, *map(size, figures), f"{share:.2f}×")


def memory_charts(record: MemoryRecord) -> list[Chart]:
    """Draw what optimizers keep and allocate, and the peaks of training, in sizes of weights."""
    pairs = dict.fromkeys((use.workload, use.dtype) for use in record.uses)
    charts = [_chart(record, *pair) for pair in pairs]
    return charts if record.training is None else [*charts, *training_charts(record.training)]


def _chart(record: MemoryRecord, workload: str, dtype: str) -> Chart:
    uses = [use for use in record.uses if (use.workload, use.dtype) == (workload, dtype)]
    words = [size(use.state_bytes + use.scratch_bytes) for use in uses]
    described = "; ".join(f"{u.title} {word}" for u, word in zip(uses, words, strict=True))
    return Chart(
        key=f"memory-{workload}-{dtype}",
        title=f"Memory of {workload}, {dtype}",
        caption="State, scratch that is kept, and the most that a step has allocated at once, in "
        "sizes of the parameters.",
        description=f"{described}.",
        figure=stacked_bars(
            [use.title for use in uses],
            words,
            [
                ("state", 1.0, [use.state_bytes / use.parameter_bytes for use in uses]),
                ("kept scratch", 0.65, [use.held_bytes / use.parameter_bytes for use in uses]),
                ("in a step", 0.38, [_in_a_step(use) for use in uses]),
            ],
        ),
    )


def _in_a_step(use: MemoryUse) -> float:
    return use.transient_bytes / use.parameter_bytes
