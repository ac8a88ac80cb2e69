"""The peaks of training steps as tables."""

from sinkgd.lab.bench.memory.training.records import TrainingMemory, TrainingUse
from sinkgd.lab.bench.sheet import Sheet
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

    >>> from sinkgd.lab.bench.memory.training.case import StepSettings
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
