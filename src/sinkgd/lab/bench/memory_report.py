"""What `sinkgd bench memory` records, and its tables, charts and page. Sizes are in bytes."""

from dataclasses import dataclass
from typing import Any

from sinkgd.lab.report.console import TextTable
from sinkgd.lab.report.figures import Chart
from sinkgd.lab.report.measurement_page import (
    PageContent,
    environment_table,
    measurement_page,
    stacked_bars,
)
from sinkgd.lab.report.quantities import ratio, size


@dataclass(frozen=True)
class MemoryUse:
    """What an optimizer allocates on one workload, besides parameters and gradients."""

    name: str
    title: str
    workload: str
    dtype: str
    parameter_bytes: int
    state_bytes: int  # tensors in optimizer.state
    held_bytes: int  # other allocations of the first step that outlive it, e.g. kept scratch
    transient_bytes: int  # the most that a later step has allocated at the same time
    limit_bytes: int  # the target for held and transient bytes together

    @property
    def scratch_bytes(self) -> int:
        """Everything but the state."""
        return self.held_bytes + self.transient_bytes


@dataclass(frozen=True)
class NotMeasured:
    """An optimizer that could not run, and why."""

    name: str
    workload: str
    dtype: str
    reason: str


@dataclass(frozen=True)
class StepSettings:
    """What all training steps have in common; by default activations are small."""

    batch_size: int = 1  # sequences, in one micro-batch
    sequence_length: int = 256  # tokens
    recompute: bool = True  # keep only the inputs of blocks for backward
    loss_chunk_tokens: int = 256  # number of target tokens whose logits are in memory at once


@dataclass(frozen=True)
class TrainingUse:
    """The peak of a training step after the first one, by part."""

    model: str
    recipe: str
    release: bool  # whether gradients are applied inside backward, and freed
    weights_bytes: int
    state_bytes: int  # tensors in optimizer.state
    gradients_bytes: int  # alive at the peak
    activations_bytes: int  # saved by forward for backward, alive at the peak
    kept_activations_bytes: int  # everything that forward saved for backward
    peak_bytes: int  # the most that torch's allocator had given out at once
    # How far the peak of a process, seen from outside, rises when it builds and trains the model.
    outside_bytes: int

    @property
    def title(self) -> str:
        """The recipe, and whether gradients are released or kept."""
        return f"{self.recipe}, {'released' if self.release else 'kept'}"

    @property
    def rest_bytes(self) -> int:
        """Everything else at the peak: scratch, recomputed activations, logits."""
        parts = self.weights_bytes + self.state_bytes + self.gradients_bytes
        return self.peak_bytes - parts - self.activations_bytes

    @property
    def of_weights(self) -> float:
        """The peak without activations, divided by the size of the weights."""
        return (self.peak_bytes - self.activations_bytes) / self.weights_bytes


@dataclass(frozen=True)
class TrainingNotMeasured:
    """A training step that could not run, and why."""

    model: str
    title: str
    reason: str


@dataclass(frozen=True)
class TrainingMemory:
    """All training steps of one run."""

    settings: StepSettings
    uses: tuple[TrainingUse, ...]
    absent: tuple[TrainingNotMeasured, ...]


@dataclass(frozen=True)
class MemoryRecord:
    """One run of `sinkgd bench memory`."""

    command: str
    environment: dict[str, Any]
    uses: tuple[MemoryUse, ...]
    absent: tuple[NotMeasured, ...]
    training: TrainingMemory | None = None  # peaks of training steps, if they were measured


def memory_page(record: MemoryRecord) -> str:
    """Make the page of `sinkgd bench memory`."""
    content = PageContent(
        headline=_headline(record),
        charts=memory_charts(record),
        tables=memory_tables(record),
        footer="Each optimizer and each training step was measured in a process of its own.",
    )
    return measurement_page(
        content,
        title="sinkgd bench memory",
        environment=environment_table(record.environment),
        command=record.command,
    )


def _headline(record: MemoryRecord) -> str:
    training = record.training
    if training is None or not training.uses:
        return "What optimizers keep, and what a step allocates."
    least = min(training.uses, key=lambda use: use.of_weights)
    return (
        f"A training step of {least.model} with {least.recipe} peaks at {least.of_weights:.2f} "
        "times its weights, not counting activations."
    )


def memory_tables(record: MemoryRecord) -> list[TextTable]:
    """Make a table for every workload and type, and for every model that was trained."""
    pairs = [(use.workload, use.dtype) for use in record.uses]
    pairs += [(row.workload, row.dtype) for row in record.absent]
    tables = [_optimizer_table(record, *pair) for pair in dict.fromkeys(pairs)]
    if (training := record.training) is not None:
        models = [use.model for use in training.uses] + [row.model for row in training.absent]
        tables += [_training_table(training, model) for model in dict.fromkeys(models)]
    return tables


def memory_charts(record: MemoryRecord) -> list[Chart]:
    """Draw what optimizers keep and allocate, and training's peaks, as multiples of the weights."""
    pairs = dict.fromkeys((use.workload, use.dtype) for use in record.uses)
    charts = [_optimizer_chart(record, *pair) for pair in pairs]
    if (training := record.training) is not None:
        models = dict.fromkeys(use.model for use in training.uses)
        charts += [_training_chart(training, model) for model in models]
    return charts


def _optimizer_table(record: MemoryRecord, workload: str, dtype: str) -> TextTable:
    uses = [use for use in record.uses if (use.workload, use.dtype) == (workload, dtype)]
    absent = [row for row in record.absent if (row.workload, row.dtype) == (workload, dtype)]
    note = ""
    if uses:
        note = (
            f"Parameters: {size(uses[0].parameter_bytes)}. Kept: allocated by the first step and "
            "not released, less the state. In a step: the most that a later step has allocated at "
            f"once. Target for kept + in a step: {size(uses[0].limit_bytes)}."
        )
    return TextTable(
        title=f"{workload}, {dtype}",
        note=note,
        columns=("optimizer", "state", "kept", "in a step", "kept + in a step", "of parameters"),
        rows=tuple(map(_optimizer_row, uses)),
        absent=tuple((row.name, row.reason) for row in absent),
    )


def _optimizer_row(use: MemoryUse) -> tuple[str, ...]:
    share = (use.state_bytes + use.scratch_bytes) / use.parameter_bytes
    figures = (use.state_bytes, use.held_bytes, use.transient_bytes, use.scratch_bytes)
    return (use.title, *map(size, figures), f"{share:.2f}×")


# Each part: its name, the strength of its color, and the field that has its size.
_OPTIMIZER_PARTS = (
    ("state", 1.0, "state_bytes"),
    ("kept scratch", 0.65, "held_bytes"),
    ("in a step", 0.38, "transient_bytes"),
)


def _optimizer_chart(record: MemoryRecord, workload: str, dtype: str) -> Chart:
    uses = [use for use in record.uses if (use.workload, use.dtype) == (workload, dtype)]
    words = [size(use.state_bytes + use.scratch_bytes) for use in uses]
    described = "; ".join(f"{u.title} {word}" for u, word in zip(uses, words, strict=True))
    return Chart(
        key=f"memory-{workload}-{dtype}",
        title=f"Memory of {workload}, {dtype}",
        caption="State, scratch that is kept, and the most that a step has allocated at once, as "
        "multiples of the parameters' size.",
        description=f"{described}.",
        figure=stacked_bars(
            [use.title for use in uses],
            words,
            [
                (name, strength, [getattr(use, part) / use.parameter_bytes for use in uses])
                for name, strength, part in _OPTIMIZER_PARTS
            ],
        ),
    )


def settings_in_words(settings: StepSettings) -> str:
    """Describe the batch of a training step, and its options that save memory.

    >>> settings_in_words(StepSettings())
    '1 × 256 tokens, blocks recomputed, logits of 256 tokens at once'
    """
    blocks = "recomputed" if settings.recompute else "kept"
    return (
        f"{settings.batch_size} × {settings.sequence_length} tokens, blocks {blocks}, "
        f"logits of {settings.loss_chunk_tokens} tokens at once"
    )


def _training_table(memory: TrainingMemory, model: str) -> TextTable:
    uses = [use for use in memory.uses if use.model == model]
    weights = f", weights {size(uses[0].weights_bytes)}" if uses else ""
    return TextTable(
        title=f"Peak of a training step of {model}, bfloat16{weights}",
        note=f"{settings_in_words(memory.settings)}. Gradients and activations: those alive at the "
        "peak; activations are what forward leaves allocated for backward. Rest: scratch, logits, "
        "and what is computed again. × weights: the peak less activations, divided by the weights. "
        "Outside: how far the peak of a process rises when it builds and trains the model.",
        columns=(
            "optimizer",
            "state",
            "gradients",
            "activations",
            "rest",
            "peak",
            "× weights",
            "outside",
        ),
        rows=tuple(map(_training_row, uses)),
        absent=tuple((row.title, row.reason) for row in memory.absent if row.model == model),
    )


def _training_row(use: TrainingUse) -> tuple[str, ...]:
    parts = (use.state_bytes, use.gradients_bytes, use.activations_bytes, use.rest_bytes)
    figures = map(size, (*parts, use.peak_bytes))
    return (use.title, *figures, ratio(use.of_weights), size(use.outside_bytes))


# Each part: its name, the strength of its color, and the field that has its size.
_TRAINING_PARTS = (
    ("weights", 1.0, "weights_bytes"),
    ("state", 0.75, "state_bytes"),
    ("gradients", 0.52, "gradients_bytes"),
    ("rest", 0.33, "rest_bytes"),
    ("activations", 0.17, "activations_bytes"),
)


def _training_chart(memory: TrainingMemory, model: str) -> Chart:
    uses = [use for use in memory.uses if use.model == model]
    words = [ratio(use.peak_bytes / use.weights_bytes) for use in uses]
    described = "; ".join(f"{u.title} {word}" for u, word in zip(uses, words, strict=True))
    return Chart(
        key=f"training-{model}",
        title=f"Peak of a training step of {model}, bfloat16",
        caption="What was allocated at the peak, as multiples of the weights' size; "
        f"{settings_in_words(memory.settings)}.",
        description=f"{described}.",
        figure=stacked_bars(
            [use.title for use in uses],
            words,
            [
                (name, strength, [getattr(use, part) / use.weights_bytes for use in uses])
                for name, strength, part in _TRAINING_PARTS
            ],
        ),
    )
