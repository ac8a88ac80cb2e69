"""Two arms compared seed by seed: both saw the same text in the same order from the same weights.

Letters:
    d: the differences of the final losses, one a seed
    k: how many seeds both arms have
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

# Student's t at 97.5 % for 1, 2, ... degrees of freedom; beyond the table the normal's is used.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)
_T_NORMAL = 1.96
_NO_DIFFERENCE = 0.0005  # nats: losses that are equal as written


@dataclass(frozen=True)
class Difference:
    """The first arm's loss minus the second's: mean(d) ± t · stdev(d) / √k, at 95 %."""

    mean: float  # nats per token
    half_width: float  # of the interval; infinite for a single seed
    count: int  # k

    @classmethod
    def of(cls, first: Mapping[int, float], second: Mapping[int, float]) -> Self:
        """Compare losses by seed; seeds that only one of them has are left out.

        Examples:
            >>> d = Difference.of({0: 4.0, 1: 4.1, 2: 4.2}, {0: 4.2, 1: 4.3, 2: 4.5})
            >>> f"{d.mean:.3f} ± {d.half_width:.3f}", d.lower, d.higher
            ('-0.233 ± 0.143', True, False)
        """
        differences = [_minus(first[seed], second[seed]) for seed in first if seed in second]
        k = len(differences)
        if k == 0:
            return cls(math.nan, math.inf, 0)
        mean = statistics.fmean(differences)
        if k == 1 or not math.isfinite(mean):
            return cls(mean, math.inf if math.isfinite(mean) else 0.0, k)
        t = _T[k - 2] if k - 2 < len(_T) else _T_NORMAL
        return cls(mean, t * statistics.stdev(differences) / math.sqrt(k), k)

    @property
    def lower(self) -> bool:
        """Whether the first arm's loss is lower, beyond the spread of the seeds."""
        return self.mean + self.half_width < 0 and self.mean <= -_NO_DIFFERENCE

    @property
    def higher(self) -> bool:
        """Whether the first arm's loss is higher, beyond the spread of the seeds."""
        return self.mean - self.half_width > 0 and self.mean >= _NO_DIFFERENCE

    @property
    def level(self) -> bool:
        """Whether the seeds tell no difference."""
        return not self.lower and not self.higher


def _minus(first: float, second: float) -> float:
    """Subtract; two that both diverged are level."""
    return 0.0 if first == second else first - second
