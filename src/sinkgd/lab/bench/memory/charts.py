"""The charts of `sinkgd bench memory`: one a workload and type, one a model."""

from sinkgd.lab.bench.charts import stacked_bars
from sinkgd.lab.bench.memory.records import MemoryRecord, MemoryUse
from sinkgd.lab.bench.memory.training.charts import training_charts
from sinkgd.lab.report.charts import Chart
from sinkgd.lab.report.quantities import size


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
