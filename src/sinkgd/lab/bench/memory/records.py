"""What `sinkgd bench memory` writes, in bytes: of optimizers, and of training steps."""

from dataclasses import dataclass
from typing import Any

from sinkgd.lab.bench.memory.training_case import StepSettings


@dataclass(frozen=True)
class TrainingUse:
    """The peak of a training step that is not the first, by part."""

    model: str
    recipe: str
    release: bool  # whether gradients are applied inside backward, and freed
    weights_bytes: int
    state_bytes: int  # tensors in optimizer.state
    gradients_bytes: int  # alive at the peak
    activations_bytes: int  # what forward left for backward, alive at the peak
    kept_activations_bytes: int  # all that forward left for backward
    peak_bytes: int  # the most that torch's allocator had given out at once
    outside_bytes: int  # the peak as the system sees it, from the drawing of the weights on

    @property
    def title(self) -> str:
        """The recipe, and what becomes of gradients."""
        return f"{self.recipe}, {'released' if self.release else 'kept'}"

    @property
    def rest_bytes(self) -> int:
        """What else was there at the peak: scratch, recomputed activations, logits."""
        parts = self.weights_bytes + self.state_bytes + self.gradients_bytes
        return self.peak_bytes - parts - self.activations_bytes

    @property
    def of_weights(self) -> float:
        """The peak without activations, in sizes of the weights."""
        return (self.peak_bytes - self.activations_bytes) / self.weights_bytes


@dataclass(frozen=True)
class TrainingNotMeasured:
    """A case that could not run, and why."""

    model: str
    title: str
    reason: str


@dataclass(frozen=True)
class TrainingMemory:
    """All cases of one run."""

    settings: StepSettings
    uses: tuple[TrainingUse, ...]
    absent: tuple[TrainingNotMeasured, ...]


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
    transient_bytes: int  # the most that a later step has allocated at once and gives back
    limit_bytes: int  # the target for held and transient bytes together

    @property
    def scratch_bytes(self) -> int:
        """All that is no state."""
        return self.held_bytes + self.transient_bytes


@dataclass(frozen=True)
class NotMeasured:
    """An optimizer that could not run, and why."""

    name: str
    workload: str
    dtype: str
    reason: str


@dataclass(frozen=True)
class MemoryRecord:
    """One run of `sinkgd bench memory`."""

    command: str
    environment: dict[str, Any]
    uses: tuple[MemoryUse, ...]
    absent: tuple[NotMeasured, ...]
    training: TrainingMemory | None = None  # the peaks of whole steps, where they were measured
