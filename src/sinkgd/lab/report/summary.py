"""What one recipe measured: its seeds averaged, with their spread.

Averages are over *finished* runs. One that failed, was interrupted or is still running is counted
and shown, but its last numbers are no result.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from sinkgd.lab.results import Memory, Run


@dataclass(frozen=True)
class Spread:
    """A figure over several runs: its mean and its range."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Self | None:
        """Summarize ``values``; None if there are none.

        >>> Spread.of([4.0, 4.5])
        Spread(mean=4.25, low=4.0, high=4.5, count=2)
        """
        found = list(values)
        if not found:
            return None
        return cls(statistics.fmean(found), min(found), max(found), len(found))

    def __truediv__(self, whole: float) -> "Spread":
        return Spread(self.mean / whole, self.low / whole, self.high / whole, self.count)

    def overlaps(self, other: "Spread") -> bool:
        """Whether the two ranges share a value."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class RecipeSummary:
    """The runs of one recipe and the figures of those that finished, None where none did."""

    name: str
    runs: tuple[Run, ...]  # sorted by seed
    finished: tuple[Run, ...]
    val_loss: Spread | None  # at the end, nats per token
    perplexity: Spread | None
    bits_per_byte: Spread | None
    steps: Spread | None  # in all
    tokens: Spread | None  # in all
    seconds: Spread | None  # of training, in all
    tokens_per_second: Spread | None  # raw: the median step of each run
    step_seconds: Spread | None  # mean of each run
    optimizer_share: Spread | None  # of the time in steps
    memory: Memory | None  # the largest of the runs, part by part

    @property
    def seeds(self) -> int:
        """How many different seeds finished."""
        return len({run.start.seed for run in self.finished})


def state_of(run: Run) -> str:
    """Say in a word how a run ended: ``"unfinished"`` where the file does not say."""
    return run.end.status if run.end else "unfinished"


def summarize(name: str, runs: Sequence[Run]) -> RecipeSummary:
    """Average the finished ones of a recipe's runs."""
    runs = sorted(runs, key=lambda run: (run.start.seed, run.start.name))
    finished = [run for run in runs if run.finished]
    final = [run.evaluations[-1] for run in finished if run.evaluations]
    ends = [run.end for run in finished if run.end]
    # Times that are not positive, in a damaged file, give no speed.
    stepped = [run for run in finished if run.steps and _median_step_seconds(run) > 0]
    return RecipeSummary(
        name=name,
        runs=tuple(runs),
        finished=tuple(finished),
        val_loss=Spread.of(row.val_loss for row in final),
        perplexity=Spread.of(row.perplexity for row in final),
        bits_per_byte=Spread.of(row.bits_per_byte for row in final),
        steps=Spread.of(end.step for end in ends),
        tokens=Spread.of(end.tokens for end in ends),
        seconds=Spread.of(end.seconds for end in ends),
        tokens_per_second=Spread.of(_median_tokens_per_second(run) for run in stepped),
        step_seconds=Spread.of(
            statistics.fmean(row.step_seconds for row in run.steps) for run in stepped
        ),
        optimizer_share=Spread.of(_optimizer_share(run) for run in stepped),
        memory=Memory.largest([end.memory for end in ends]) if ends else None,
    )


def _median_tokens_per_second(run: Run) -> float:
    return run.start.tokens_per_step / _median_step_seconds(run)


def _median_step_seconds(run: Run) -> float:
    return statistics.median(row.step_seconds for row in run.steps)


def _optimizer_share(run: Run) -> float:
    whole = math.fsum(row.step_seconds for row in run.steps)
    return math.fsum(row.optimizer_seconds for row in run.steps) / whole
