"""The difference of two methods' final losses, seed by seed, with its 95 % interval.

Letters:
    d: the differences of the final losses, one for each seed that both methods have
    k: number of these seeds
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

# Student's t at 97.5 % for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)
_NORMAL = 1.959964
NO_DIFFERENCE = 0.0005  # nats; smaller differences do not show in printed losses


def t_quantile(freedom: int) -> float:
    """Return Student's t at 97.5 %, for a number of degrees of freedom of 1 or more.

    Beyond the table it is the expansion of Abramowitz and Stegun, 26.7.5, right to four digits.

    >>> t_quantile(2)
    4.303
    >>> round(t_quantile(30), 3)
    2.042
    """
    if freedom <= len(_T):
        return _T[freedom - 1]
    z, freed = _NORMAL, float(freedom)
    return (
        z
        + (z**3 + z) / (4 * freed)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freed**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freed**3)
    )


@dataclass(frozen=True)
class Difference:
    """The first method's loss minus the second's: mean(d) ± t · stdev(d) / √k, at 95 %."""

    # Nats per token. Infinite if only one diverged; NaN if k is 0, or if each one diverged in a
    # seed in which the other did not.
    mean: float
    # Half the width of the interval. It is infinite if k is below 2 and ``mean`` is not infinite,
    # and 0 if ``mean`` is infinite.
    half_width: float
    count: int  # k
    seeds: int = 0  # number of seeds that both have
    diverged: tuple[int, int] = (0, 0)  # number of these seeds in which each one diverged

    @classmethod
    def of(cls, first: Mapping[int, float], second: Mapping[int, float]) -> Self:
        """Compare losses by seed, over the seeds that both have.

        Examples:
            >>> d = Difference.of({0: 4.0, 1: 4.1, 2: 4.2}, {0: 4.2, 1: 4.3, 2: 4.5})
            >>> f"{d.mean:.3f} ± {d.half_width:.3f}", d.lower, d.higher
            ('-0.233 ± 0.143', True, False)
        """
        pairs = [(first[seed], second[seed]) for seed in first if seed in second]
        diverged = (
            sum(not math.isfinite(one) for one, _ in pairs),
            sum(not math.isfinite(other) for _, other in pairs),
        )
        ended = [one - other for one, other in pairs if math.isfinite(one) and math.isfinite(other)]
        k = len(ended)
        # The signs of the seeds in which only one of the two diverged.
        signs = {
            math.copysign(1.0, one - other)
            for one, other in pairs
            if math.isfinite(one) != math.isfinite(other)
        }
        if len(signs) == 1:
            return cls(math.inf * signs.pop(), 0.0, k, len(pairs), diverged)
        mean = statistics.fmean(ended) if ended and not signs else math.nan
        half_width = math.inf
        if k > 1 and not signs:
            half_width = t_quantile(k - 1) * statistics.stdev(ended) / math.sqrt(k)
        return cls(mean, half_width, k, len(pairs), diverged)

    @property
    def lower(self) -> bool:
        """Whether the first one's loss is significantly lower."""
        return self.mean + self.half_width < 0 and self.mean <= -NO_DIFFERENCE

    @property
    def higher(self) -> bool:
        """Whether the first one's loss is significantly higher."""
        return self.mean - self.half_width > 0 and self.mean >= NO_DIFFERENCE

    @property
    def level(self) -> bool:
        """Whether two seeds or more show no significant difference."""
        return math.isfinite(self.half_width) and not self.lower and not self.higher

    @property
    def unknown(self) -> bool:
        """Whether there are too few seeds to tell."""
        return not (self.lower or self.higher or self.level)
