"""Interleaved timing: in every round contenders take turns, in an order that rotates.

A contender is a function to time. Slow contenders are left out of some rounds.

Because contenders take turns, other load on the machine affects all of them alike. So does the
state in which the previous contender leaves the caches. Ratios are taken within a round and
summarized by their quartiles.

A floor is a lower bound on a time: a number of bytes divided by a bandwidth, which must be one that
the machine reaches. Probes are operations that only stream the matrices. They are timed in the same
rounds. The fastest operation among the probes and the optimizers that only stream gives the
bandwidth. Most probes pass over one flat tensor, so that the overhead of calls does not count when
there are many small matrices. A pass is one read or one write of all the matrices, whatever else
the hardware does, such as reading a cache line before overwriting it.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sinkgd import kernels
from sinkgd.lab.bench.workloads import Problem
from sinkgd.lab.train.machine import describe_environment, synchronize

Call = Callable[[], object]
RoundSeconds = Sequence[float | None]  # per call, one for each round; None in rounds left out
MIN_TURNS = 3  # rounds in which even a slow contender is timed, unless there are fewer in all
INTERLEAVED_NOTE = (
    "Contenders took turns; ratios are medians over rounds of the ratios within a round."
)
_WARM_UPS = 3  # calls, of which the fastest counts: the first allocates, and any may be disturbed


@dataclass(frozen=True)
class Pace:
    """How many rounds there are, and how much time contenders may take."""

    rounds: int
    seconds: float  # time for each contender; one that needs more is timed in fewer rounds
    min_turn_seconds: float = 0.0  # calls that take less are repeated within a round, and averaged


def time_interleaved(
    contenders: Mapping[str, Call],
    pace: Pace,
    device: torch.device,
    progress: Callable[[float], None],
    *,
    reference: str | None = None,
) -> dict[str, tuple[float | None, ...]]:
    """Time contenders against each other, after a warm-up.

    Args:
        contenders: The functions to call, by name.
        pace: Number of rounds, and time for each contender.
        device: Synchronized before a clock is read.
        progress: Called after every timing with the fraction of the work that is done, 0 to 1.
        reference: A contender to time in every round, however slow it is.

    Returns:
        By name, the seconds of a call in each round; None in rounds that were left out.
    """
    expected = {name: _warm_up(call, pace, device) for name, call in contenders.items()}
    repeats = {
        name: max(1, math.ceil(pace.min_turn_seconds / seconds))
        for name, seconds in expected.items()
    }
    rounds = {name: rounds_for(seconds * repeats[name], pace) for name, seconds in expected.items()}
    if reference is not None:
        rounds[reference] = frozenset(range(pace.rounds))
    total = sum(len(rounds[name]) * repeats[name] * expected[name] for name in contenders)
    done = 0.0
    seconds: dict[str, list[float | None]] = {name: [None] * pace.rounds for name in contenders}
    for i in range(pace.rounds):
        for name in williams_order([name for name in contenders if i in rounds[name]], i):
            call, count = contenders[name], repeats[name]
            seconds[name][i] = _time(call, count, device) / count
            done += count * expected[name]
            progress(done / total)
    return {name: tuple(own) for name, own in seconds.items()}


def rounds_for(turn_seconds: float, pace: Pace) -> frozenset[int]:
    """Return the rounds in which to time a contender, spread evenly over all rounds.

    >>> sorted(rounds_for(1.0, Pace(rounds=8, seconds=4.0)))
    [0, 2, 4, 6]
    """
    affordable = int(pace.seconds / turn_seconds) if turn_seconds > 0 else pace.rounds
    count = min(pace.rounds, max(MIN_TURNS, affordable))
    return frozenset(i * pace.rounds // count for i in range(count))


def williams_order(names: Sequence[str], round_number: int) -> list[str]:
    """Return the order of one round; in n rounds, each of n names has each position once.

    This is Williams' design: in n rounds (in 2n, if n is odd), every name also follows every other
    name equally often.

    >>> [williams_order("abcd", i) for i in range(4)]
    [['a', 'b', 'd', 'c'], ['b', 'c', 'a', 'd'], ['c', 'd', 'b', 'a'], ['d', 'a', 'c', 'b']]

    References:
        Williams, Experimental Designs Balanced for the Estimation of Residual Effects of
        Treatments, Australian Journal of Scientific Research 2 (1949).
    """
    count = len(names)
    first = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]
    ordered = [names[(position + round_number) % count] for position in first]
    reverse = count % 2 == 1 and (round_number // count) % 2 == 1
    return ordered[::-1] if reverse else ordered


def _warm_up(call: Call, pace: Pace, device: torch.device) -> float:
    """Call three times, or fewer if that takes long; return the seconds of the fastest call."""
    seconds = [_time(call, 1, device)]
    while len(seconds) < _WARM_UPS and sum(seconds) < pace.seconds / MIN_TURNS:
        seconds.append(_time(call, 1, device))
    return min(seconds)


def _time(call: Call, count: int, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return time.perf_counter() - started


@dataclass(frozen=True)
class Quartiles:
    """The median of some figures and how far they spread."""

    lower: float
    median: float
    upper: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return the quartiles of one or more figures, interpolated between them.

    >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
    Quartiles(lower=2.0, median=3.0, upper=4.0)
    """
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def timed_rounds(seconds: RoundSeconds) -> list[float]:
    """Return the seconds of the rounds that were not left out."""
    return [own for own in seconds if own is not None]


def ratios(own: RoundSeconds, other: RoundSeconds) -> list[float]:
    """Divide ``own`` by ``other`` in every round in which both were timed.

    >>> ratios([2.0, None, 9.0], [1.0, 1.0, 3.0])
    [2.0, 3.0]
    """
    return [a / b for a, b in zip(own, other, strict=True) if a is not None and b is not None]


@dataclass(frozen=True)
class Probe:
    """An operation that streams all the matrices."""

    name: str
    passes: int
    build: Callable[[Problem], Call]
    copies: int = 0  # memory that it allocates, as a multiple of the size of all matrices


@dataclass(frozen=True)
class Bandwidth:
    """The bandwidth that one operation reached."""

    name: str
    moved_bytes: int  # per call
    seconds: tuple[float | None, ...]  # per call, one for each round
    bytes_per_second: Quartiles


def probes(device: torch.device) -> tuple[Probe, ...]:
    """Return the operations to try, including those of the backend that ``"auto"`` selects."""
    backend = kernels.select("auto", device)
    return (
        Probe("torch.sum", 1, lambda p: partial(torch.sum, p.flat_grads), copies=1),
        Probe("torch.dot", 1, lambda p: partial(torch.dot, p.flat_grads, p.flat_grads), copies=1),
        Probe("torch.amax of the bits", 1, _amax_of_bits, copies=1),
        Probe("copy", 2, _copy, copies=2),
        Probe(
            f"{backend.name}: one iteration",
            1,
            lambda p: partial(backend.scales, [_as_matrix(grad) for grad in p.grads], 1),
        ),
        Probe(f"{backend.name}: update", 3, partial(update_call, backend)),
    )


def probe_calls(found: Sequence[Probe], problem: Problem) -> Mapping[str, Call]:
    """Return the call of each probe, by name."""
    return {probe.name: probe.build(problem) for probe in found}


def update_call(backend: kernels.Backend, problem: Problem) -> Call:
    """Return a call of the backend's update of all parameters."""
    params = [_as_matrix(param.detach()) for param in problem.params]
    grads = [_as_matrix(grad) for grad in problem.grads]
    scales = backend.scales(grads, 1)
    return partial(backend.update_, params, grads, scales, keep=1.0, step=-1e-4)


def summarize_bandwidth(name: str, moved_bytes: int, seconds: RoundSeconds) -> Bandwidth:
    """Summarize the rounds of an operation that moves ``moved_bytes`` per call."""
    rates = [moved_bytes / own for own in timed_rounds(seconds)]
    return Bandwidth(name, moved_bytes, tuple(seconds), quartiles(rates))


def fastest(candidates: Sequence[Bandwidth]) -> Bandwidth:
    """Return the candidate with the highest median bandwidth."""
    return max(candidates, key=lambda candidate: candidate.bytes_per_second.median)


def floor_seconds(moved_bytes: int, best: Bandwidth) -> tuple[float | None, ...]:
    """Return how long ``moved_bytes`` take at a bandwidth, round by round.

    >>> floor_seconds(300, summarize_bandwidth("copy", 100, [1.0, None, 2.0]))
    (3.0, None, 6.0)
    """
    share = moved_bytes / best.moved_bytes
    return tuple(None if own is None else share * own for own in best.seconds)


def _amax_of_bits(problem: Problem) -> Call:
    # Four-byte integers are compared without conversion, unlike bfloat16.
    flat = problem.flat_grads
    return partial(torch.amax, flat.view(torch.int32) if flat.nbytes % 4 == 0 else flat)


def _copy(problem: Problem) -> Call:
    return partial(torch.empty_like(problem.flat_grads).copy_, problem.flat_grads)


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim > 1 else tensor.unsqueeze(0)


LOAD = "load_per_core"  # key of the environment: the load average before the first round, per core
_WIDE = 0.2  # limit of the range between the quartiles, as a fraction of the median
_LOADED = 0.5  # runnable processes per core above which the machine counts as busy


def environment_with_load(device: torch.device) -> dict[str, Any]:
    """Describe the machine and its load; call it before the measurement itself adds to the load."""
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    return {**describe_environment(device), LOAD: round(load, 2)}


def spreads_widely(found: Quartiles) -> bool:
    """Whether rounds differ so much that their median says little."""
    return found.upper - found.lower > _WIDE * found.median


def is_loaded(environment: Mapping[str, Any]) -> bool:
    """Whether other processes kept the machine busy when the measurement began."""
    load = environment.get(LOAD)
    return load is not None and load > _LOADED


def reliability_warnings(
    environment: Mapping[str, Any], wide: Mapping[str, list[str]]
) -> tuple[str, ...]:
    """Return warnings of a busy machine and of figures that spread widely.

    Args:
        environment: A result of `environment_with_load`.
        wide: For each thing that was measured, the names whose rounds spread widely.
    """
    found = []
    if is_loaded(environment):
        found.append(
            f"The machine was busy before the first turn: a load of {environment[LOAD]:.2f} "
            "per core. Measure again when nothing else runs."
        )
    for what, names in wide.items():
        if names:
            found.append(
                f"Rounds spread widely on {what}: {', '.join(names)}. Use more --rounds, or a "
                "quieter machine."
            )
    return tuple(found)
