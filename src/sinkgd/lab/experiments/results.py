"""What a study found, arm by arm: losses by seed, the grid behind them, who needed how much.

Arms are compared seed by seed: both saw the same text in the same order from the same weights.

Letters, in `Difference`:
    d: the differences of the final losses, one a seed
    k: how many seeds both arms have
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from sinkgd.lab.experiments.plan import arm_from_json
from sinkgd.lab.experiments.record import RunResult, StudyRecord
from sinkgd.lab.experiments.study import Arm, Point, edges
from sinkgd.lab.report.analysis import Analysis, analyze
from sinkgd.lab.report.summary import Spread
from sinkgd.lab.results import Evaluation, Run

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


# Its one clipped rate for all parameters makes it the weaker AdamW, so it is never the first.
_ONE_RATE = "adamw-one-lr"


@dataclass(frozen=True)
class ArmResults:
    """An arm with its runs."""

    arm: Arm
    seeds: tuple[RunResult, ...]  # reported runs that ended, by seed
    grid: tuple[RunResult, ...]  # tuning runs that ended

    @property
    def losses(self) -> dict[int, float]:
        """Final validation losses by seed, nats per token; infinite where a run diverged."""
        return {result.seed: result.loss for result in self.seeds}

    @property
    def loss(self) -> float | None:
        """The mean over seeds; infinite if one diverged, None without a run."""
        losses = self.losses.values()
        return statistics.fmean(losses) if losses else None

    @property
    def diverged(self) -> int:
        """Seeds that diverged, a count."""
        return sum(not math.isfinite(loss) for loss in self.losses.values())

    @property
    def chosen(self) -> Point | None:
        """The point of the grid with the lowest loss; None where nothing was tuned."""
        finite = [result for result in self.grid if math.isfinite(result.loss)]
        return min(finite, key=lambda result: result.loss).point if finite else None

    @property
    def edges(self) -> list[str]:
        """The tuned fields whose best value is the first or last that was tried."""
        return edges(self.arm, self.chosen) if self.chosen else []


@dataclass(frozen=True)
class StudyResults:
    """A study as it stands."""

    plan: Mapping[str, Any]  # as of `StudyPlan.as_json`
    arms: tuple[ArmResults, ...]  # in the study's order

    @classmethod
    def of(cls, record: StudyRecord) -> "StudyResults":
        """Sort a record's runs by arm."""
        arms = []
        for name, content in record.plan["arms"].items():
            own = [result for result in record.runs.values() if result.arm == name]
            seeds = sorted((r for r in own if not r.tuning), key=lambda r: r.seed)
            grid = tuple(result for result in own if result.tuning)
            arms.append(ArmResults(arm_from_json(name, content), tuple(seeds), grid))
        return cls(record.plan, tuple(arms))

    @property
    def candidates(self) -> tuple[ArmResults, ...]:
        """The arms that the question is about and that have a result."""
        return tuple(one for one in self.arms if one.seeds and not one.arm.control)

    @property
    def controls(self) -> tuple[ArmResults, ...]:
        """The arms they are compared with and that have a result, AdamW with one rate last."""
        found = [one for one in self.arms if one.seeds and one.arm.control]
        return tuple(sorted(found, key=lambda one: one.arm.recipe == _ONE_RATE))

    @property
    def ranked(self) -> tuple[ArmResults, ...]:
        """All arms, the lowest mean loss first; diverged arms and arms without a run last."""
        return tuple(sorted(self.arms, key=lambda one: math.inf if one.loss is None else one.loss))

    def arm(self, name: str) -> ArmResults | None:
        """Return an arm that has a result."""
        return next((one for one in self.arms if one.arm.name == name and one.seeds), None)

    def difference(self, one: ArmResults, other: ArmResults) -> Difference:
        """Compare two arms seed by seed."""
        return Difference.of(one.losses, other.losses)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The reported runs."""
        return tuple(result.run for one in self.arms for result in one.seeds)

    def analysis(self, baseline: str | None) -> Analysis:
        """Analyze the reported runs, one recipe per arm: the baseline, then the others by loss.

        Args:
            baseline: An arm's name, or None to compare with nothing.
        """
        arms = {result.name: one.arm.name for one in self.arms for result in one.seeds}
        found = analyze(self.runs, baseline, group=lambda run: arms[run.start.name])
        order = [baseline, *(one.arm.name for one in self.ranked)]
        recipes = sorted(found.recipes, key=lambda recipe: order.index(recipe.name))
        return replace(found, recipes=tuple(recipes))

    @property
    def equal_seconds(self) -> float | None:
        """The mean training time of the fastest arm: all have come as far."""
        means = [
            statistics.fmean(ends)
            for one in self.arms
            if (ends := [r.run.end.seconds for r in one.seeds if r.run.finished and r.run.end])
        ]
        return min(means, default=None)

    def loss_after(self, one: ArmResults, seconds: float) -> Spread | None:
        """Return an arm's validation loss after ``seconds`` of training, between evaluations."""
        losses = [_loss_after(result.run.evaluations, seconds) for result in one.seeds]
        return Spread.of(loss for loss in losses if loss is not None)


def _loss_after(evaluations: Sequence[Evaluation], seconds: float) -> float | None:
    """Interpolate between two evaluations; past the last one, where a run was faster, take that."""
    before: Evaluation | None = None
    for after in evaluations:
        if after.seconds >= seconds:
            if before is None:
                return None
            way = (seconds - before.seconds) / (after.seconds - before.seconds)
            return before.val_loss + way * (after.val_loss - before.val_loss)
        before = after
    return before.val_loss if before else None
