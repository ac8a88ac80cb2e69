"""The peaks of training steps as tables and charts."""

from sinkgd.lab.bench.charts import stacked_bars
from sinkgd.lab.bench.memory.records import TrainingMemory, TrainingUse
from sinkgd.lab.bench.sheet import Sheet
from sinkgd.lab.report.charts import Chart
from sinkgd.lab.report.quantities import ratio, size

_COLUMNS = (
    "optimizer",
    "state",
    "gradients",
    "activations",
    "rest",
    "peak",
    "× weights",
    "outside",
)


def training_sheets(memory: TrainingMemory) -> list[Sheet]:
    """Make a table for every model."""
    models = [use.model for use in memory.uses] + [row.model for row in memory.absent]
    return [_sheet(memory, model) for model in dict.fromkeys(models)]


def settings_in_words(memory: TrainingMemory) -> str:
    """Say what is trained on, and what is done for memory.

    >>> from sinkgd.lab.bench.memory.training_case import StepSettings
    >>> settings_in_words(TrainingMemory(StepSettings(), (), ()))
    '1 × 256 tokens, blocks recomputed, logits of 256 tokens at once'
    """
    settings = memory.settings
    blocks = "recomputed" if settings.recompute else "kept"
    return (
        f"{settings.batch_size} × {settings.sequence_length} tokens, blocks {blocks}, "
        f"logits of {settings.loss_chunk_tokens} tokens at once"
    )


def _sheet(memory: TrainingMemory, model: str) -> Sheet:
    uses = [use for use in memory.uses if use.model == model]
    weights = f", weights {size(uses[0].weights_bytes)}" if uses else ""
    return Sheet(
        title=f"Peak of a training step of {model}, bfloat16{weights}",
        note=f"{settings_in_words(memory)}. Gradients and activations: those alive at the peak; an "
        "activation is what forward leaves allocated for backward. Rest: scratch, and what is "
        "computed again. × weights: the peak less activations, of the weights. Outside: "
        "the peak as the system sees it, from the drawing of the weights on.",
        columns=_COLUMNS,
        rows=tuple(map(_row, uses)),
        absent=tuple((row.title, row.reason) for row in memory.absent if row.model == model),
    )


def _row(use: TrainingUse) -> tuple[str, ...]:
    parts = (use.state_bytes, use.gradients_bytes, use.activations_bytes, use.rest_bytes)
    figures = map(size, (*parts, use.peak_bytes))
    return (use.title, *figures, ratio(use.of_weights), size(use.outside_bytes))


# Part, strength of its color, and its field.
_PARTS = (
    ("weights", 1.0, "weights_bytes"),
    ("state", 0.75, "state_bytes"),
    ("gradients", 0.52, "gradients_bytes"),
    ("rest", 0.33, "rest_bytes"),
    ("activations", 0.17, "activations_bytes"),
)


def training_charts(memory: TrainingMemory) -> list[Chart]:
    """Draw what the peak of each case consists of, in sizes of the weights."""
    models = dict.fromkeys(use.model for use in memory.uses)
    return [_chart(memory, model) for model in models]


def _chart(memory: TrainingMemory, model: str) -> Chart:
    uses = [use for use in memory.uses if use.model == model]
    words = [ratio(use.peak_bytes / use.weights_bytes) for use in uses]
    described = "; ".join(f"{u.title} {word}" for u, word in zip(uses, words, strict=True))
    return Chart(
        key=f"training-{model}",
        title=f"Peak of a training step of {model}, bfloat16",
        caption=f"What was allocated at the peak, in sizes of the weights; "
        f"{settings_in_words(memory)}.",
        description=f"{described}.",
        figure=stacked_bars(
            [use.title for use in uses],
            words,
            [
                (name, strength, [_of_weights(u, part) for u in uses])
                for name, strength, part in _PARTS
            ],
        ),
    )


def _of_weights(use: TrainingUse, part: str) -> float:
    share: float = getattr(use, part) / use.weights_bytes
    return share
