"""What `sinkgd bench kernels` writes. A turn is one call, or the mean of several short ones."""

from dataclasses import dataclass
from typing import Any

from sinkgd.lab.bench.bandwidth import Bandwidth
from sinkgd.lab.bench.quartiles import Quartiles
from sinkgd.lab.bench.step.records import Absent


@dataclass(frozen=True)
class KernelTiming:
    """One operation of a backend on one case."""

    backend: str
    operation: str  # a name in OPERATIONS
    moved_bytes: int  # a call
    seconds: tuple[float | None, ...]  # of a call, one a round
    call_seconds: Quartiles
    bytes_per_second: Quartiles
    share: Quartiles  # of the measured bandwidth, round by round


@dataclass(frozen=True)
class CaseTiming:
    """All backends on matrices of one shape, in one type."""

    case: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    timings: tuple[KernelTiming, ...]
    bandwidths: tuple[Bandwidth, ...]
    bandwidth: str  # the fastest of them

    def timing(self, backend: str, operation: str) -> KernelTiming | None:
        """Return a row, if it was timed."""
        wanted = (backend, operation)
        return next((t for t in self.timings if (t.backend, t.operation) == wanted), None)


@dataclass(frozen=True)
class KernelsRecord:
    """One run of `sinkgd bench kernels`."""

    command: str
    environment: dict[str, Any]
    rounds: int
    cases: tuple[CaseTiming, ...]
    absent: tuple[Absent, ...]  # backends
