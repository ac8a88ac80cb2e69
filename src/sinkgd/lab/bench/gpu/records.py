"""What `sinkgd bench gpu` writes."""

from dataclasses import dataclass
from typing import Any

from sinkgd.lab.bench.gpu.variants import Variant


@dataclass(frozen=True)
class Figure:
    """A row of the table of targets."""

    name: str
    value: float
    target: float | None  # the most that it may be
    how: str  # it was counted

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        return None if self.target is None else self.value <= self.target


@dataclass(frozen=True)
class Missed:
    """A variant that a target forbids."""

    variant: str
    target: str  # the GPU
    steps: tuple[str, ...]  # those that use it
    why: str


@dataclass(frozen=True)
class GpuRecord:
    """One run of `sinkgd bench gpu`."""

    command: str
    environment: dict[str, Any]
    triton: str  # its version
    figures: tuple[Figure, ...]
    missed: tuple[Missed, ...]
    variants: tuple[Variant, ...]
