"""What a study found, arm by arm: losses by seed, the grid behind them, who needed how much."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sinkgd.lab.experiments.paired import Difference
from sinkgd.lab.experiments.plan import arm_from_json
from sinkgd.lab.experiments.record import RunResult, StudyRecord
from sinkgd.lab.experiments.study import Arm, Point, edges
from sinkgd.lab.report.analysis import Analysis, analyze
from sinkgd.lab.report.summary import Spread
from sinkgd.lab.results import Evaluation, Run

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
