"""A median with its quartiles, and ratios that are taken round by round."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Turns = Sequence[float | None]  # seconds of a contender, one a round; None where it had no turn


@dataclass(frozen=True)
class Quartiles:
    """The middle of some figures and how far they spread."""

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


def taken(turns: Turns) -> list[float]:
    """Return the seconds of the rounds in which there was a turn."""
    return [seconds for seconds in turns if seconds is not None]


def ratios(own: Turns, other: Turns) -> list[float]:
    """Divide ``own`` by ``other``, each round in which both had a turn by itself.

    >>> ratios([2.0, None, 9.0], [1.0, 1.0, 3.0])
    [2.0, 3.0]
    """
    return [a / b for a, b in zip(own, other, strict=True) if a is not None and b is not None]
