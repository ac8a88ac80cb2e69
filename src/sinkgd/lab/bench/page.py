"""The pages of `sinkgd bench step`, `memory` and `kernels`: one file each, no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkgd.lab.bench.contenders import ITERATIONS, our_name
from sinkgd.lab.bench.doubts import is_loaded
from sinkgd.lab.bench.kernel_figures import case_sheet, kernel_charts
from sinkgd.lab.bench.kernels import KernelsRecord
from sinkgd.lab.bench.memory.figures import memory_charts, memory_sheets
from sinkgd.lab.bench.memory.records import MemoryRecord
from sinkgd.lab.bench.sheet import Sheet
from sinkgd.lab.bench.step.figures import (
    bandwidth_sheet,
    check_sheet,
    step_charts,
    target_sheet,
    workload_sheet,
)
from sinkgd.lab.bench.step.records import StepRecord
from sinkgd.lab.bench.warnings import spreads_widely, warnings_of
from sinkgd.lab.report.charts import Chart
from sinkgd.lab.report.shell import render

_TURNS = "Contenders took turns; ratios are medians over rounds of the ratios within a round."
_TEMPLATE = Path(__file__).parent / "bench.html"


def step_page(record: StepRecord) -> str:
    """Make the page of `sinkgd bench step`."""
    sheets = [*map(workload_sheet, record.workloads), check_sheet(record)]
    return _page(
        record,
        _Content(
            title="sinkgd bench step",
            headline=_step_headline(record),
            cautions=warnings_of(record),
            charts=step_charts(record),
            sheets=[sheet for sheet in sheets if sheet.rows or sheet.absent],
            first=[sheet for sheet in [target_sheet(record)] if sheet.rows],
            details=[bandwidth_sheet(record)],
            footer=_TURNS,
        ),
    )


def memory_page(record: MemoryRecord) -> str:
    """Make the page of `sinkgd bench memory`."""
    return _page(
        record,
        _Content(
            title="sinkgd bench memory",
            headline=_memory_headline(record),
            charts=memory_charts(record),
            sheets=memory_sheets(record),
            footer="Each optimizer and each training step was measured in a process of its own.",
        ),
    )


def kernels_page(record: KernelsRecord) -> str:
    """Make the page of `sinkgd bench kernels`."""
    absent = tuple((one.title, one.reason) for one in record.absent)
    details = [Sheet("Absent backends", "", ("backend", "why"), (), absent)] if absent else []
    return _page(
        record,
        _Content(
            title="sinkgd bench kernels",
            headline="Backends over shapes, against the bandwidth of memory.",
            cautions=warnings_of(record),
            charts=kernel_charts(record),
            sheets=[case_sheet(case) for case in record.cases],
            details=details,
            footer=_TURNS,
        ),
    )


@dataclass(frozen=True)
class _Content:
    title: str
    headline: str
    footer: str
    charts: Sequence[Chart]
    sheets: Sequence[Sheet]  # below the charts
    first: Sequence[Sheet] = ()  # above them
    details: Sequence[Sheet] = ()  # folded
    answers: Sequence[str] = ()  # sentences below the headline
    cautions: Sequence[str] = ()


def _page(record: StepRecord | MemoryRecord | KernelsRecord, content: _Content) -> str:
    return render(
        _TEMPLATE,
        title=content.title,
        charts=content.charts,
        filters={},
        content=content,
        environment=_environment_sheet(record.environment),
        command=record.command,
    )


def _step_headline(record: StepRecord) -> str:
    if is_loaded(record.environment):
        return "No ratio is given: the machine was busy when the measurement began."
    doubtful = False
    for workload in record.workloads:
        timing = workload.timing(our_name(record.ours, ITERATIONS[0]))
        if timing is not None and spreads_widely(timing):
            doubtful = True
        elif timing is not None:
            return (
                f"On {workload.title} a step of SinkGD takes {timing.of_adamw.median:.2f} times "
                f"as long as fused AdamW’s, in {workload.dtype}."
            )
    if doubtful:
        return "No ratio is given: the rounds spread too widely."
    return "Optimizer steps against fused AdamW."


def _memory_headline(record: MemoryRecord) -> str:
    training = record.training
    if training is None or not training.uses:
        return "What optimizers keep, and what a step allocates."
    least = min(training.uses, key=lambda use: use.of_weights)
    return (
        f"A training step of {least.model} with {least.recipe} peaks at {least.of_weights:.2f} "
        "times its weights, beside activations."
    )


def _environment_sheet(environment: Mapping[str, Any]) -> Sheet:
    rows = tuple((name, str(value)) for name, value in environment.items())
    return Sheet("Environment", "", ("what", "value"), rows)
