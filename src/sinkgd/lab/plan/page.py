"""The page of `sinkgd plan`: memory by part and what a step sends, one file, no network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sinkgd.lab.bench.page
from sinkgd.lab.bench.charts import stacked_bars
from sinkgd.lab.bench.sheet import Sheet
from sinkgd.lab.plan.plan import Answer, MethodPlan, Question
from sinkgd.lab.plan.sheets import (
    answer_lines,
    assumption_sheet,
    ladder_sheet,
    plan_sheets,
    seconds,
)
from sinkgd.lab.report.charts import Chart
from sinkgd.lab.report.quantities import size
from sinkgd.lab.report.shell import render

_GIB = 2**30
_TEMPLATE = Path(sinkgd.lab.bench.page.__file__).parent / "bench.html"


@dataclass(frozen=True)
class _Content:
    headline: str
    answers: Sequence[str]
    sheets: Sequence[Sheet]
    footer: str = "Memory is counted on fake tensors; time is an estimate. Nothing was trained."
    first: Sequence[Sheet] = ()
    details: Sequence[Sheet] = ()
    cautions: Sequence[str] = ()


def plan_page(question: Question, answer: Answer, command: str) -> str:
    """Make the page."""
    ladder = ladder_sheet(answer)
    sheets = plan_sheets(question, answer)
    fits, *answers = answer_lines(question, answer)
    return render(
        _TEMPLATE,
        title=f"sinkgd plan: {question.work.architecture.name}",
        charts=[_memory_chart(answer), _time_chart(answer)],
        filters={},
        content=_Content(
            headline=fits,
            answers=answers,
            first=[sheets[0]],
            sheets=[sheet for sheet in sheets[1:] if sheet != ladder] + [ladder],
        ),
        environment=assumption_sheet(question),
        command=command,
    )


def _memory_chart(answer: Answer) -> Chart:
    methods = sorted(answer.methods, key=lambda one: one.memory.peak)
    words = [f"{size(one.memory.peak)}{'' if one.fits else ', does not fit'}" for one in methods]

    def part(name: str) -> list[float]:
        return [getattr(one.memory, name) / _GIB for one in methods]

    rest = [
        (one.memory.activations + one.memory.loss + one.memory.transit + one.memory.scratch) / _GIB
        for one in methods
    ]
    return Chart(
        key="memory",
        title="Memory of a rank at its peak",
        caption="Weights, optimizer state, gradients, and all else: activations, logits, what is "
        "in transit, scratch.",
        description=_describe(methods, words),
        figure=stacked_bars(
            [one.title for one in methods],
            words,
            [
                ("weights", 1.0, part("weights")),
                ("state", 0.7, part("state")),
                ("gradients", 0.45, part("gradients")),
                ("all else", 0.22, rest),
            ],
            unit="GiB",
        ),
    )


def _time_chart(answer: Answer) -> Chart:
    methods = sorted(answer.methods, key=lambda one: one.time.step)
    words = [seconds(one.time.step) for one in methods]
    in_seconds = max(one.time.step for one in methods) >= 1
    scale, unit = (1, "seconds") if in_seconds else (1000, "milliseconds")
    waits = [max(0.0, one.time.sharding - one.time.compute) for one in methods]
    return Chart(
        key="time",
        title="Time of a step, estimated",
        caption="Compute at the assumed part of the peak; messages that are waited for; the update "
        "with its own messages.",
        description=_describe(methods, words),
        figure=stacked_bars(
            [one.title for one in methods],
            words,
            [
                ("compute", 1.0, [scale * one.time.compute for one in methods]),
                (
                    "messages",
                    0.6,
                    [
                        scale * (w + one.time.tensor_parallel)
                        for w, one in zip(waits, methods, strict=True)
                    ],
                ),
                (
                    "update",
                    0.3,
                    [scale * (one.time.update + one.time.optimizer_messages) for one in methods],
                ),
            ],
            unit=unit,
        ),
    )


def _describe(methods: Sequence[MethodPlan], words: Sequence[str]) -> str:
    return "; ".join(f"{m.title} {word}" for m, word in zip(methods, words, strict=True)) + "."
