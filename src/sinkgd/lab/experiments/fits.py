"""Two fits over the size of the model, with 95 % intervals: a power law of losses, and a trend.

The trend is fitted to the means of the sizes. All seeds of a size have the same learning rates, and
so a common error, which more seeds do not reduce. The power law has three parameters, too many for
the means of four sizes. It is fitted to all runs, and its interval covers the seeds alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sinkgd.lab.report.difference import t_quantile


@dataclass(frozen=True)
class PowerLaw:
    """Losses as a + b (C/C₁)^(-c), where C is the compute of a run, and C₁ the least one."""

    a: float
    b: float
    c: float
    c_low: float
    c_high: float


def fit_power_law(compute: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Fit a, b and c by least squares.

    The interval comes from the profile of the sum of squares: it has every c whose sum of squares
    is at most 1 + t²/(k - 3) times the least one, where t is the 97.5 % quantile of Student's t.

    Args:
        compute: Operations of each of k runs, more than 3, with 3 or more different values.
        losses: Final loss of each run, nats per token.

    Returns:
        The fit. a is at least 0, and c is one of 400 values between 0.01 and 2.
    """
    x, y = np.asarray(compute) / min(compute), np.asarray(losses)
    tried = []
    for c in np.geomspace(0.01, 2, 400):
        powers = x**-c
        spread = powers - powers.mean()
        b = (y - y.mean()) @ spread / (spread @ spread)
        a = y.mean() - b * powers.mean()
        if a < 0:
            a, b = 0.0, y @ powers / (powers @ powers)
        tried.append((float(((y - a - b * powers) ** 2).sum()), float(a), float(b), float(c)))
    least, a, b, c = min(tried)
    freedom = len(y) - 3
    bound = least * (1 + t_quantile(freedom) ** 2 / freedom)
    near = [one[3] for one in tried if one[0] <= bound]
    return PowerLaw(a, b, c, min(near), max(near))


@dataclass(frozen=True)
class Trend:
    """How a positive quantity changes with the size: its log is a line over log₂ of the size."""

    doubling: float  # the factor by which the quantity changes when the size doubles
    doubling_low: float
    doubling_high: float
    far: float  # the quantity at a given larger size, if the trend held
    far_low: float
    far_high: float


def fit_trend(sizes: Sequence[float], values: Sequence[float], *, far: float) -> Trend:
    """Fit a line to the means of the sizes by least squares.

    Args:
        sizes: Size of each run's model; 3 or more different ones.
        values: The quantity in each run, above 0.
        far: The size to which the line is extrapolated.
    """
    by_size: dict[float, list[float]] = {}
    for size, value in zip(sizes, values, strict=True):
        by_size.setdefault(size, []).append(math.log(value))
    x, y = np.log2(list(by_size)), np.asarray([np.mean(logs) for logs in by_size.values()])
    spread = x - x.mean()
    slope = float(y @ spread / (spread @ spread))
    freedom = len(y) - 2
    rest = float(((y - y.mean() - slope * spread) ** 2).sum() / freedom)
    away = math.log2(far) - x.mean()
    there = float(y.mean() + slope * away)
    t = t_quantile(freedom)
    of_slope = t * math.sqrt(rest / (spread @ spread))
    of_far = t * math.sqrt(rest * (1 / len(y) + away**2 / (spread @ spread)))
    ends = (slope, slope - of_slope, slope + of_slope, there, there - of_far, there + of_far)
    return Trend(*map(math.exp, ends))
