"""What `sinkgd bench step` writes. Times are seconds, sizes bytes; a turn is one optimizer step."""

from dataclasses import dataclass
from typing import Any

from sinkgd.lab.bench.bandwidth import Bandwidth
from sinkgd.lab.bench.memory.records import MemoryUse
from sinkgd.lab.bench.quartiles import Quartiles


@dataclass(frozen=True)
class Timing:
    """An optimizer's steps on one workload."""

    name: str
    title: str
    seconds: tuple[float | None, ...]  # of a step, one a round; None in rounds without a turn
    step_seconds: Quartiles
    of_adamw: Quartiles  # ratio to fused AdamW in the same round
    of_floor: Quartiles | None  # ratio to its floor in the same round
    floor_bytes: int | None  # that a step must move at least
    floor_of_adamw: float | None  # median ratio of its floor to fused AdamW


@dataclass(frozen=True)
class Absent:
    """What was not measured, and why."""

    name: str
    title: str
    reason: str


@dataclass(frozen=True)
class WorkloadTiming:
    """All optimizers on one workload in one type."""

    workload: str
    title: str
    dtype: str
    matrices: int
    entries: int
    timings: tuple[Timing, ...]  # fused AdamW first
    absent: tuple[Absent, ...]
    bandwidths: tuple[Bandwidth, ...]
    bandwidth: str  # the one the floors are made of: the fastest

    def timing(self, name: str) -> Timing | None:
        """Return an optimizer's row, if it has one."""
        return next((timing for timing in self.timings if timing.name == name), None)


@dataclass(frozen=True)
class FirstCall:
    """A backend's first call of `sinkgd.sinkhorn_scales` in a fresh process, compiling included."""

    backend: str
    cold_seconds: float  # with an empty cache of compiled code
    warm_seconds: tuple[float, ...]  # with the cache that the cold call filled, one a process


@dataclass(frozen=True)
class Accuracy:
    """The largest relative error of r·c over a workload's float32 gradients, against float64."""

    backend: str
    workload: str
    iterations: int
    relative_error: float


@dataclass(frozen=True)
class TargetResult:
    """A target and whether it was met."""

    name: str
    unit: str  # "×" for ratios
    at_least: bool  # whether higher is better
    target: float
    stretch: float | None
    measured: float | None  # None where what it needs was not measured
    met: bool | None
    stretch_met: bool | None


@dataclass(frozen=True)
class StepRecord:
    """One run of `sinkgd bench step`."""

    command: str
    environment: dict[str, Any]
    ours: str  # the backend that "auto" takes
    rounds: int
    workloads: tuple[WorkloadTiming, ...]
    skipped: tuple[Absent, ...]  # whole workloads
    first_calls: tuple[FirstCall, ...]
    accuracies: tuple[Accuracy, ...]
    scratch: tuple[MemoryUse, ...]
    targets: tuple[TargetResult, ...]

    def find(self, workload: str, dtype: str) -> WorkloadTiming | None:
        """Return a workload's timings in a type, if it was timed."""
        found = (w for w in self.workloads if (w.workload, w.dtype) == (workload, dtype))
        return next(found, None)
