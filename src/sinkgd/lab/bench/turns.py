"""Contenders in turns: every round gives each of them one timed turn, in an order that rotates.

What else the machine does then meets them alike, and so does what the one before left in the
caches: over the rounds each contender comes after every other about equally often.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from sinkgd.lab.train.device import synchronize

Call = Callable[[], object]
FEWEST_TURNS = 3  # of a contender, however slow it is
_WARM_UPS = 3  # the first call allocates, and a busy moment must not be taken for slowness


@dataclass(frozen=True)
class Pace:
    """How many turns there are, and how long they last."""

    rounds: int
    seconds: float  # to spend on each contender; those that need more have fewer turns
    shortest_turn: float = 0.0  # seconds; quicker calls are repeated within a turn, and averaged


def take_turns(
    contenders: Mapping[str, Call],
    pace: Pace,
    device: torch.device,
    progress: Callable[[float], None],
    *,
    reference: str | None = None,
) -> dict[str, tuple[float | None, ...]]:
    """Time contenders against each other, after a warm-up.

    Args:
        contenders: What a turn calls, by name.
        pace: Rounds and turns.
        device: Waited for before a clock is read.
        progress: Told after every turn which part of the work is done, 0 to 1.
        reference: The contender that has a turn in every round, however slow it is.

    Returns:
        By name, the seconds of a call in each round; None in rounds without a turn.
    """
    expected = {name: _warm_up(call, pace, device) for name, call in contenders.items()}
    repeats = {
        name: max(1, math.ceil(pace.shortest_turn / seconds)) for name, seconds in expected.items()
    }
    rounds = {name: rounds_of(seconds * repeats[name], pace) for name, seconds in expected.items()}
    if reference is not None:
        rounds[reference] = frozenset(range(pace.rounds))
    total = sum(len(rounds[name]) * repeats[name] * expected[name] for name in contenders)
    done = 0.0
    seconds: dict[str, list[float | None]] = {name: [None] * pace.rounds for name in contenders}
    for i in range(pace.rounds):
        for name in order([name for name in contenders if i in rounds[name]], i):
            call, count = contenders[name], repeats[name]
            seconds[name][i] = _time(call, count, device) / count
            done += count * expected[name]
            progress(done / total)
    return {name: tuple(turns) for name, turns in seconds.items()}


def rounds_of(turn_seconds: float, pace: Pace) -> frozenset[int]:
    """Return the rounds in which a contender has a turn, spread evenly over them all.

    >>> sorted(rounds_of(1.0, Pace(rounds=8, seconds=4.0)))
    [0, 2, 4, 6]
    """
    affordable = int(pace.seconds / turn_seconds) if turn_seconds > 0 else pace.rounds
    count = min(pace.rounds, max(FEWEST_TURNS, affordable))
    return frozenset(i * pace.rounds // count for i in range(count))


def order(names: Sequence[str], turn: int) -> list[str]:
    """Return the order of round ``turn``: after a whole cycle each name has had each place.

    It is Williams' design: within a cycle (two, if the count of names is odd) every name also
    follows every other equally often.

    >>> [order("abcd", i) for i in range(4)]
    [['a', 'b', 'd', 'c'], ['b', 'c', 'a', 'd'], ['c', 'd', 'b', 'a'], ['d', 'a', 'c', 'b']]

    References:
        Williams, Experimental Designs Balanced for the Estimation of Residual Effects of
        Treatments, Australian Journal of Scientific Research 2 (1949).
    """
    count = len(names)
    first = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]
    ordered = [names[(place + turn) % count] for place in first]
    reverse = count % 2 == 1 and (turn // count) % 2 == 1
    return ordered[::-1] if reverse else ordered


def _warm_up(call: Call, pace: Pace, device: torch.device) -> float:
    """Call three times, or less often if that takes long; return the seconds of the fastest."""
    seconds = [_time(call, 1, device)]
    while len(seconds) < _WARM_UPS and sum(seconds) < pace.seconds / FEWEST_TURNS:
        seconds.append(_time(call, 1, device))
    return min(seconds)


def _time(call: Call, count: int, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return time.perf_counter() - started
