"""What `sinkgd bench step` records, and the targets that SinkGD's figures should meet.

Times are in seconds and sizes in bytes. A ratio to AdamW is the ratio to the fused AdamW step in
the same type and in the same round.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sinkgd.lab.bench.contenders import ITERATIONS, hybrid_name, our_name
from sinkgd.lab.bench.interleaved import Bandwidth, Quartiles
from sinkgd.lab.bench.memory_report import MemoryUse


@dataclass(frozen=True)
class Timing:
    """An optimizer's steps on one workload."""

    name: str
    title: str
    seconds: tuple[float | None, ...]  # per step, one for each round; None in rounds left out
    step_seconds: Quartiles
    of_adamw: Quartiles  # ratio to fused AdamW in the same round
    of_floor: Quartiles | None  # ratio to its floor in the same round
    floor_bytes: int | None  # the fewest bytes that a step can move
    floor_of_adamw: float | None  # median ratio of its floor to fused AdamW


@dataclass(frozen=True)
class Absent:
    """Something that was not measured, and why."""

    name: str
    title: str
    reason: str


@dataclass(frozen=True)
class WorkloadTiming:
    """All optimizers on one workload in one type."""

    workload: str
    title: str
    dtype: str
    matrices: int  # number of parameter tensors, including vectors
    entries: int
    timings: tuple[Timing, ...]  # fused AdamW first
    absent: tuple[Absent, ...]
    bandwidths: tuple[Bandwidth, ...]
    bandwidth: str  # the name of the fastest of them, from which floors are computed

    def timing(self, name: str) -> Timing | None:
        """Return an optimizer's timing, or None if it was not timed."""
        return next((timing for timing in self.timings if timing.name == name), None)


@dataclass(frozen=True)
class FirstCall:
    """How long a backend's first call of `sinkgd.sinkhorn_scales` takes in a fresh process."""

    backend: str
    cold_seconds: float  # time with an empty cache of compiled code
    # Times with the cache that the cold call left, one for each process.
    warm_seconds: tuple[float, ...]


@dataclass(frozen=True)
class Accuracy:
    """The largest relative error of r·c, against float64, over a float32 gradient of each shape."""

    backend: str
    workload: str
    iterations: int
    relative_error: float


@dataclass(frozen=True)
class TargetResult:
    """A target and whether it was met."""

    name: str
    unit: str  # "×" for ratios
    at_least: bool  # whether the target is a lower bound
    target: float
    stretch: float | None  # a harder target, if there is one
    measured: float | None  # None if the figure was not measured
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


LAYER = "llama-1b-layer"
SMALL = "llama-60m"
_FULL, _ONE = ITERATIONS

Measure = Callable[[StepRecord], float | None]


@dataclass(frozen=True)
class Target:
    """A bound on one figure of a record."""

    name: str
    measure: Measure  # returns None if the figure was not measured
    target: float
    stretch: float | None = None
    unit: str = "×"
    at_least: bool = False


def _ours(record: StepRecord, workload: str, dtype: str, iterations: int) -> Timing | None:
    found = record.find(workload, dtype)
    return found.timing(our_name(record.ours, iterations)) if found else None


def of_adamw(workload: str, dtype: str, iterations: int = _FULL) -> Measure:
    """Return a function that measures the median ratio of SinkGD's step to fused AdamW's."""

    def measure(record: StepRecord) -> float | None:
        timing = _ours(record, workload, dtype, iterations)
        return timing.of_adamw.median if timing else None

    return measure


def faster_than_naive(workload: str, dtype: str) -> Measure:
    """Return a function that measures the public loop's time as a multiple of SinkGD's.

    The public loop is `sinkgd.lab.bench.contenders.naive_loop`.
    """

    def measure(record: StepRecord) -> float | None:
        found, ours = record.find(workload, dtype), _ours(record, workload, dtype, _FULL)
        naive = found.timing("naive-loop") if found else None
        return naive.of_adamw.median / ours.of_adamw.median if naive and ours else None

    return measure


def of_floor(workload: str, dtype: str) -> Measure:
    """Return a function that measures the median ratio of SinkGD's step to its floor.

    The floor is the time of L + 3 passes over the matrices at the bandwidth of the same round.
    """

    def measure(record: StepRecord) -> float | None:
        timing = _ours(record, workload, dtype, _FULL)
        return timing.of_floor.median if timing and timing.of_floor else None

    return measure


def hybrid(record: StepRecord) -> float | None:
    """Measure a whole model's step: SinkGD updates hidden matrices, and AdamW the rest.

    The figure is the median ratio to fused AdamW for all parameters.
    """
    found = record.find("llama-60m-hybrid", "float32")
    timing = found.timing(hybrid_name(record.ours)) if found else None
    return timing.of_adamw.median if timing else None


def small_matrix_microseconds(record: StepRecord) -> float | None:
    """Measure by how many microseconds a step exceeds its floor, per 64×64 matrix.

    The floor is the time to move the step's bytes at the measured bandwidth.
    """
    found = record.find("many-small", "float32")
    timing = _ours(record, "many-small", "float32", _FULL)
    if found is None or timing is None or timing.of_floor is None:
        return None
    step = timing.step_seconds.median
    return 1e6 * (step - step / timing.of_floor.median) / found.matrices


def scratch(record: StepRecord) -> float | None:
    """Measure scratch as a fraction of its limit, and return the largest fraction.

    The limit is 1 MiB plus, for each thread, 4(m + n) bytes of the matrix with the largest m + n.
    """
    ours = our_name(record.ours, _FULL)
    shares = [use.scratch_bytes / use.limit_bytes for use in record.scratch if use.name == ours]
    return max(shares, default=None)


def relative_error(record: StepRecord) -> float | None:
    """Measure the largest relative error of float32 scales."""
    errors = [row.relative_error for row in record.accuracies if row.backend == record.ours]
    return worst_of(errors) if errors else None


def worst_of(errors: Iterable[float]) -> float:
    """Return the largest error; NaN if one is NaN, which ``max`` can lose.

    >>> worst_of([0.0, float("nan"), 1.0])
    nan
    """
    found = [*errors]
    return math.nan if any(map(math.isnan, found)) else max(found)


def first_call(record: StepRecord) -> float | None:
    """Measure the slowest first call with a warm cache, in seconds."""
    calls = [call.warm_seconds for call in record.first_calls if call.backend == record.ours]
    return max(map(max, calls), default=None)


TARGETS = (
    Target(f"{LAYER}, float32, L=5, × AdamW", of_adamw(LAYER, "float32"), 1.15, 1.0),
    Target(f"{SMALL}, float32, L=5, × AdamW", of_adamw(SMALL, "float32"), 0.90, 0.75),
    Target(f"{LAYER}, bfloat16, L=5, × AdamW", of_adamw(LAYER, "bfloat16"), 1.15, 0.9),
    Target(f"{SMALL}, bfloat16, L=5, × AdamW", of_adamw(SMALL, "bfloat16"), 0.90, 0.7),
    Target(
        f"{LAYER}, float32, L=1, × AdamW",
        of_adamw(LAYER, "float32", _ONE),
        0.65,
        0.55,
    ),
    Target(
        f"{LAYER}, float32, L=5, faster than the public loop",
        faster_than_naive(LAYER, "float32"),
        40.0,
        80.0,
        at_least=True,
    ),
    Target(f"{LAYER}, float32, L=5, × its floor", of_floor(LAYER, "float32"), 1.25, 1.1),
    Target("all of llama-60m, hybrid step, float32, × AdamW", hybrid, 0.95, 0.85),
    Target("scratch of a steady step, × (1 MiB + 4(m+n) B per thread)", scratch, 1.0),
    Target(
        "2,000 matrices of 64×64, time per matrix above the floor",
        small_matrix_microseconds,
        3.0,
        unit="µs",
    ),
    Target("relative error against float64, float32 gradients", relative_error, 3e-6, unit=""),
    Target("first call, compile included, warm cache", first_call, 1.5, unit="s"),
)


def evaluate(record: StepRecord) -> tuple[TargetResult, ...]:
    """Compare a record with every target, including those for which the record has no figure."""
    return tuple(_evaluate(target, target.measure(record)) for target in TARGETS)


def _evaluate(target: Target, measured: float | None) -> TargetResult:
    def reached(bound: float | None) -> bool | None:
        if measured is None or bound is None:
            return None
        return measured >= bound if target.at_least else measured <= bound

    return TargetResult(
        name=target.name,
        unit=target.unit,
        at_least=target.at_least,
        target=target.target,
        stretch=target.stretch,
        measured=measured,
        met=reached(target.target),
        stretch_met=reached(target.stretch),
    )
