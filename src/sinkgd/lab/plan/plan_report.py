"""A plan as tables, charts and sentences, and its page."""

import math
from collections.abc import Sequence

from sinkgd.lab.plan.methods import METHODS
from sinkgd.lab.plan.planner import MOST_SHARDS, Answer, MethodPlan, Question
from sinkgd.lab.report.console import TextTable
from sinkgd.lab.report.figures import Chart
from sinkgd.lab.report.measurement_page import PageContent, measurement_page, stacked_bars
from sinkgd.lab.report.quantities import NO_BREAK, count, duration, percent, size

_BASELINE = "adamw"


def plan_page(question: Question, answer: Answer, command: str) -> str:
    """Make the page of `sinkgd plan`."""
    ladder = ladder_table(answer)
    tables = plan_tables(question, answer)
    fits, *answers = answer_lines(question, answer)
    content = PageContent(
        headline=fits,
        answers=answers,
        charts=[_memory_chart(answer), _time_chart(answer)],
        first=[tables[0]],
        tables=[table for table in tables[1:] if table != ladder] + [ladder],
        footer="Memory is counted on fake tensors; time is an estimate. Nothing was trained.",
    )
    return measurement_page(
        content,
        title=f"sinkgd plan: {question.work.architecture.name}",
        environment=assumption_table(question),
        command=command,
    )


def headline(question: Question, answer: Answer) -> str:
    """Return a sentence that says whether the optimizer fits, compared with AdamW."""
    chosen, baseline = answer.of(question.method.name), answer.of(_BASELINE)
    what = f"{question.work.architecture.name} with {chosen.title} peaks at {_peak(chosen)}"
    ranks = question.grid.ranks
    where = "per rank" if ranks > 1 else "in all"
    device = f"the {size(answer.limit_bytes)} that one {question.device.title} has for training"
    verb = "fits into" if chosen.fits else "does not fit into"
    sentence = f"{what} {where} and {verb} {device}"
    if chosen.name == _BASELINE:
        return f"{sentence}; weights, gradients and state are {size(chosen.memory.training)} of it."
    other = "would fit, too" if baseline.fits else "would not fit"
    return f"{sentence}; AdamW peaks at {_peak(baseline)} and {other}."


def answer_lines(question: Question, answer: Answer) -> tuple[str, ...]:
    """Return sentences on whether the optimizer fits, and what fits.

    They say on how many devices the optimizer fits, which methods fit on the given devices, how
    many devices each method needs, and how to make the optimizer fit if it does not.
    """
    chosen = answer.of(question.method.name)
    verb = "FITS" if chosen.fits else "DOES NOT FIT"
    devices = _devices(question)
    least, baseline = (_fewest(one, question) for one in (chosen, answer.of(_BASELINE)))
    other = ", as AdamW does" if least == baseline else f", AdamW {baseline}"
    needs = f"it needs {least}{'' if chosen.name == _BASELINE else other}"
    fitting = [one.title for one in answer.methods if one.fits]
    others = sorted(answer.methods, key=lambda one: one.fewest_devices or math.inf)
    listed = "; ".join(f"{one.title}: {_fewest(one, question)}" for one in others)
    return (
        f"{question.work.architecture.name} with {chosen.title} {verb} on {devices}; {needs}.",
        f"Methods that fit on {devices}: {'; '.join(fitting) or 'none'}.",
        f"Devices needed: {listed}.",
        *([] if chosen.fits else [_remedy(question, chosen)]),
    )


def _devices(question: Question) -> str:
    words = question.device.title.replace(" ", NO_BREAK)
    return f"{question.grid.ranks:,}{NO_BREAK}×{NO_BREAK}{words}"


def _fewest(one: MethodPlan, question: Question) -> str:
    if one.fewest_devices is None:
        return f"more than {MOST_SHARDS * question.grid.tp:,}"
    return f"at least {one.fewest_devices:,}"


def _remedy(question: Question, chosen: MethodPlan) -> str:
    """Name the unused options that lower the peak, in a sentence or two."""
    work, grid, memory = question.work, question.grid, chosen.memory
    unused = {
        "--recompute-activations": not work.recompute,
        "--loss-chunk-tokens 128": work.loss_chunk_tokens is None,
        "--release-gradients": question.method.can_release and not work.release,
        "--precision bf16": work.precision != "bf16",
        "a smaller --batch-size": work.batch_size > 1,
        "a shorter --sequence-length": True,
        "a larger --mesh.tp": True,
    }
    ways = ", ".join(option for option, helps in unused.items() if helps)
    if chosen.fewest_devices is not None:
        shards = chosen.fewest_devices // grid.tp
        return f"To fit, use --mesh.dp-shard {shards}, or lower the peak with {ways}."
    held = size(memory.activations + memory.loss)
    return (
        f"More shards do not lower the {held} of activations and logits on each device. "
        f"To lower the peak, try {ways}."
    )


def plan_tables(question: Question, answer: Answer) -> list[TextTable]:
    """Make all tables."""
    return [
        memory_table(question, answer),
        time_table(question, answer),
        *([communication_table(question, answer)] if question.grid.ranks > 1 else []),
        ladder_table(answer),
    ]


def memory_table(question: Question, answer: Answer) -> TextTable:
    """Make the table of memory by part, one row for each method."""
    rows = []
    for one in sorted(answer.methods, key=lambda one: one.memory.peak):
        m = one.memory
        parts = (m.weights, m.state, m.gradients, m.activations, m.loss, m.transit, m.scratch)
        cells = (gib(m.peak), "yes" if one.fits else "no", gib(m.weights_and_state))
        rows.append((_marked(one, question), *cells, *map(gib, parts)))
    moment = answer.of(question.method.name).memory.moment
    return TextTable(
        title="Memory of a rank, GiB",
        note=f"{_described(question)}. ◂: the method that was asked for. A method fits if its peak "
        f"is at most {size(answer.limit_bytes)}. Parts are those at the moment of the peak, which "
        f"for {question.method.title} is {moment}. Logits include all that the loss computes from "
        "them. "
        "In transit: whole blocks and gradients that FSDP gathers and reduces.",
        columns=(
            "method",
            "peak",
            "fits",
            "weights + state",
            "weights",
            "state",
            "gradients",
            "activations",
            "logits",
            "in transit",
            "scratch",
        ),
        rows=tuple(rows),
    )


def time_table(question: Question, answer: Answer) -> TextTable:
    """Make the table of time and cost, one row for each method."""
    priced = question.price is not None
    rows = tuple(
        (
            _marked(one, question),
            seconds(one.time.compute),
            seconds(one.time.sharding + one.time.tensor_parallel),
            seconds(one.time.update + one.time.optimizer_messages),
            seconds(one.time.step),
            count(one.tokens_per_day),
            f"{one.days:,.3g}" if one.days < 100 else f"{one.days:,.0f}",
            *([f"{one.cost:,.0f}"] if one.cost is not None else []),
        )
        for one in answer.methods
    )
    return TextTable(
        title=f"Time of a step, estimated, on {_devices(question)}",
        note=f"Assumed: matrix products at {percent(question.mfu)} of the peak, messages of data "
        "parallelism hidden behind compute if they are shorter, no latency. "
        f"Days for {count(question.tokens)} tokens. "
        "The time does not say how many tokens a method needs.",
        columns=(
            "method",
            "compute",
            "messages",
            "update",
            "step",
            "tokens per day",
            "days",
            *(["cost"] if priced else []),
        ),
        rows=rows,
    )


def communication_table(question: Question, answer: Answer) -> TextTable:
    """Make the table of collectives: those of training, then those of each method."""
    rows = []
    for one in answer.methods:
        for m in one.messages:
            if m.optimizer or one.name == question.method.name:
                who = one.title if m.optimizer else "training"
                group = f"{m.group} ({m.ranks:,})"
                cells = (f"{m.count:,}", size(m.bytes), size(m.sent))
                rows.append((f"{who}: {m.what}", m.kind, group, *cells))
    rows.sort(key=lambda row: not row[0].startswith("training"))
    return TextTable(
        title="Messages of a step",
        note="Bytes are those of the whole tensors. The last column is what a rank sends in a ring "
        "of all ranks of the group.",
        columns=("what", "collective", "group", "messages", "bytes", "a rank sends"),
        rows=tuple(rows),
    )


def ladder_table(answer: Answer) -> TextTable:
    """Make the table of peaks, one column per model; peaks that do not fit are in parentheses."""

    def cell(peak: int | None) -> str:
        if peak is None:
            return "–"
        return gib(peak) if peak <= answer.limit_bytes else f"({gib(peak)})"

    undivided = [f"{rung.model}: {rung.reason}" for rung in answer.ladder if rung.reason]
    return TextTable(
        title="Where each method stops fitting: the peak of a rank, GiB",
        note=" ".join(
            ["The same batch, mesh and device; what does not fit is in parentheses.", *undivided]
        ),
        columns=("method", *(rung.model for rung in answer.ladder)),
        rows=tuple(
            (one.title, *(cell(rung.peaks.get(one.name)) for rung in answer.ladder))
            for one in answer.methods
        ),
    )


def assumption_table(question: Question) -> TextTable:
    """Make the table of assumptions."""
    device = question.device
    rows = (
        ("fraction of the device's memory for training", percent(question.usable)),
        ("fraction of the peak that matrix products reach", percent(question.mfu)),
        ("peak, dense bfloat16", f"{device.flops / 1e12:,.1f} Tflop/s"),
        ("memory", f"{size(device.memory_bytes)} at {device.memory_rate / 1e12:.2f} TB/s"),
        ("link in the node, one way", f"{device.node_rate / 1e9:.0f} GB/s"),
        ("link between nodes, one way", f"{device.network_rate / 1e9:.1f} GB/s"),
        *((f"state of {method.title}", method.formula) for method in METHODS.values()),
        *((f"source of {method.title}", method.source) for method in METHODS.values()),
    )
    return TextTable("Assumptions and sources", "", ("what", "value"), rows)


def gib(count_bytes: float) -> str:
    """Write bytes in GiB, without the unit.

    >>> gib(0), gib(2**28), gib(53 * 2**30), gib(1600 * 2**30)
    ('0', '0.250', '53.0', '1,600')
    """
    value = count_bytes / 2**30
    if value == 0:
        return "0"
    return f"{value:.3f}" if value < 10 else f"{value:,.{1 if value < 100 else 0}f}"


def seconds(value: float) -> str:
    r"""Write a time, in milliseconds if it is below one second.

    >>> seconds(0.0023), seconds(84.2)
    ('2.3\xa0ms', '84.2\xa0s')
    """
    if value == 0:
        return "–"
    return duration(value) if value >= 1 else f"{1e3 * value:.3g}{NO_BREAK}ms"


def _peak(one: MethodPlan) -> str:
    return size(one.memory.peak)


def _marked(one: MethodPlan, question: Question) -> str:
    return f"{one.title} ◂" if one.name == question.method.name else one.title


def _described(question: Question) -> str:
    work, grid = question.work, question.grid
    words = [f"{work.architecture.name}, {work.precision}"]
    words.append(f"{work.batch_size} × {work.sequence_length} tokens")
    if work.micro_batches > 1:
        words.append(f"{work.micro_batches} micro-batches")
    if work.release:
        words.append("gradients released if the method can release them")
    if work.recompute:
        words.append("blocks recomputed in backward")
    if work.loss_chunk_tokens is not None:
        words.append(f"loss of {work.loss_chunk_tokens} tokens at a time")
    if grid.ranks > 1:
        words.append(f"{grid.dp_replicate} × {grid.dp_shard} × {grid.tp} ranks")
    return ", ".join(words)


_GIB = 2**30


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
        caption="Compute at the assumed fraction of the peak; messages that are waited for; the "
        "update with its own messages.",
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
