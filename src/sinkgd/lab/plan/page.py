"""The page of `sinkgd plan`: memory by part and what a step sends, one file, no network."""

from collections.abc import Sequence

from sinkgd.lab.plan.plan import Answer, MethodPlan, Question
from sinkgd.lab.plan.sheets import (
    answer_lines,
    assumption_sheet,
    ladder_sheet,
    plan_sheets,
    seconds,
)
from sinkgd.lab.report.charts import Chart
from sinkgd.lab.report.measurement_page import PageContent, measurement_page, stacked_bars
from sinkgd.lab.report.quantities import size

_GIB = 2**30


def plan_page(question: Question, answer: Answer, command: str) -> str:
    """Make the page."""
    ladder = ladder_sheet(answer)
    sheets = plan_sheets(question, answer)
    fits, *answers = answer_lines(question, answer)
    content = PageContent(
        headline=fits,
        answers=answers,
        charts=[_memory_chart(answer), _time_chart(answer)],
        first=[sheets[0]],
        tables=[sheet for sheet in sheets[1:] if sheet != ladder] + [ladder],
        footer="Memory is counted on fake tensors; time is an estimate. Nothing was trained.",
    )
    return measurement_page(
        content,
        title=f"sinkgd plan: {question.work.architecture.name}",
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
