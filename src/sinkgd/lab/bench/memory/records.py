"""What `sinkgd bench memory` writes, in bytes."""

from dataclasses import dataclass
from typing import Any

from sinkgd.lab.bench.memory.training.records import TrainingMemory


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
