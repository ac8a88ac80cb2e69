"""The share of another run's tokens that a run needs for the other's final loss.

Letters:
    q: tokens that a run needs for the final loss of the other run, divided by all tokens of the
        other run. A run that ends above this loss has q = 1/p instead, where p is the share of the
        run's tokens with which the other reaches the run's final loss. So q is below 1 if the run
        needs fewer tokens than the other, and above 1 if it needs more.
    k: number of pairs of runs

Losses are those during training, interpolated between evaluations. The schedule of the learning
rate was not over then, so q is not the length of a training that would end at this loss.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from sinkgd.lab.report.analysis import final_loss, first_reach
from sinkgd.lab.report.difference import t_quantile
from sinkgd.lab.report.quantities import NO_BREAK, percent
from sinkgd.lab.results import Run


def token_share(run: Run, other: Run) -> float:
    """Return q.

    It is infinite if the run failed, and NaN if the other did. A run failed if it diverged, or if
    the first evaluation of the other is as low as its end: then no q is known.
    """
    loss, goal = final_loss(run), final_loss(other)
    if not math.isfinite(goal):
        return math.nan
    if not math.isfinite(loss):
        return math.inf
    if loss > goal:
        tokens = _tokens_to(other, loss)
        return _all_tokens(run) / tokens if tokens else math.inf
    tokens = _tokens_to(run, goal)
    return tokens / _all_tokens(other) if tokens else math.nan


def _all_tokens(run: Run) -> float:
    return run.end.tokens if run.end else math.nan


def _tokens_to(run: Run, loss: float) -> float | None:
    """Return the tokens to a loss that the run reaches; None if its first evaluation is as low."""
    reach = first_reach(run.evaluations, loss)
    if reach is None or run.evaluations[0].val_loss <= loss:
        return None
    return reach.tokens


@dataclass(frozen=True)
class MeanShare:
    """The geometric mean of k shares, with its 95 % interval by Student's t of the logarithms."""

    mean: float
    low: float  # 0 if k is 1
    high: float  # infinite if k is 1
    count: int  # k

    @classmethod
    def of(cls, shares: Sequence[float]) -> Self | None:
        """Summarize shares; None if there are none, or if a run failed.

        Examples:
            >>> found = MeanShare.of([0.5, 2.0])
            >>> found.mean, found.low < 1e-3, found.high > 1e3
            (1.0, True, True)
            >>> MeanShare.of([0.5, math.inf]) is None
            True
        """
        if not shares or not all(map(math.isfinite, shares)):
            return None
        logs = [math.log(share) for share in shares]
        mean, k = statistics.fmean(logs), len(logs)
        if k == 1:
            return cls(math.exp(mean), 0.0, math.inf, 1)
        half = t_quantile(k - 1) * statistics.stdev(logs) / math.sqrt(k)
        return cls(math.exp(mean), math.exp(mean - half), math.exp(mean + half), k)

    def __str__(self) -> str:
        r"""Format the mean, and the interval if there are several shares.

        >>> str(MeanShare.of([0.8, 0.81, 0.82])), str(MeanShare.of([0.8]))
        ('81\xa0% (79 to 84\xa0%)', '80\xa0%')
        """
        mean = percent(self.mean)
        if self.count == 1:
            return mean
        return f"{mean} ({percent(self.low).removesuffix(f'{NO_BREAK}%')} to {percent(self.high)})"
