"""The results of a study by arm: losses by seed, the grid behind them, and differences of arms.

Arms are compared seed by seed. With the same seed, arms of the same model and batch start from the
same weights and see the same text in the same order.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sinkgd.lab.experiments.arms import Arm, Grid, Point, arm_from_json, best_point, edges
from sinkgd.lab.experiments.study_record import RunResult, StudyRecord
from sinkgd.lab.report.analysis import Analysis, Spread, analyze, preset_of
from sinkgd.lab.report.difference import Difference
from sinkgd.lab.report.verdict import unequal_speed
from sinkgd.lab.results import Evaluation, Run

# The weaker AdamW, with one rate for all parameters. It comes after all other controls.
_ONE_RATE = "adamw-one-lr"


@dataclass(frozen=True)
class ArmResults:
    """An arm with its runs."""

    arm: Arm
    seeds: tuple[RunResult, ...]  # reported runs that ended, by seed
    grid: tuple[RunResult, ...]  # tuning runs that ended

    @property
    def losses(self) -> dict[int, float]:
        """Final validation losses by seed, nats per token; infinite if a run diverged."""
        return {result.seed: result.loss for result in self.seeds}

    @property
    def loss(self) -> float | None:
        """Mean loss over seeds; infinite if a seed diverged, None if there is no reported run."""
        losses = self.losses.values()
        return statistics.fmean(losses) if losses else None

    @property
    def diverged(self) -> int:
        """Number of seeds that diverged."""
        return sum(not math.isfinite(loss) for loss in self.losses.values())

    @property
    def chosen(self) -> Point | None:
        """The point of the grid with the lowest loss; None if no point has a finite loss.

        If there are reported runs, the result is their point, even if another has the same loss.
        """
        if self.grid and self.seeds and self.seeds[0].point:
            return self.seeds[0].point
        return best_point((result.loss, result.point) for result in self.grid)

    @property
    def tried(self) -> Grid:
        """The values of the grid; if the arm is carried or widened, those that its runs tried."""
        if self.arm.carried is None and not self.arm.widened:
            return self.arm.tuned
        points = [result.point for result in self.grid]
        names = points[0] if points else ()
        return {name: tuple(dict.fromkeys(point[name] for point in points)) for name in names}

    @property
    def edges(self) -> list[str]:
        """Tuned fields whose best value is at an end of three or more tried, as "field = value".

        The list is empty while a widened grid is still searched, that is, until the first reported
        run.
        """
        if self.chosen is None or (self.arm.widened and not self.seeds):
            return []
        return edges(self.tried, self.chosen)


@dataclass(frozen=True)
class StudyResults:
    """All results of a study so far."""

    plan: Mapping[str, Any]  # a result of `StudyPlan.as_json`
    arms: tuple[ArmResults, ...]  # in the study's order
    processors: tuple[str, ...] = ()  # those of all sessions
    jobs: frozenset[int] = frozenset()  # numbers of runs at a time, of all sessions

    @classmethod
    def of(cls, record: StudyRecord) -> "StudyResults":
        """Group a record's runs by arm."""
        arms = []
        for name, content in record.plan["arms"].items():
            own = [result for result in record.runs.values() if result.arm == name]
            seeds = sorted((r for r in own if not r.tuning), key=lambda r: r.seed)
            grid = tuple(result for result in own if result.tuning)
            arms.append(ArmResults(arm_from_json(name, content), tuple(seeds), grid))
        found = [str(session.environment.get("cpu", "")) for session in record.sessions]
        processors = tuple(dict.fromkeys(filter(None, found)))
        jobs = frozenset(session.jobs for session in record.sessions)
        return cls(record.plan, tuple(arms), processors, jobs)

    @property
    def candidates(self) -> tuple[ArmResults, ...]:
        """The arms that the question is about and that have a result."""
        return tuple(one for one in self.arms if one.seeds and not one.arm.control)

    @property
    def controls(self) -> tuple[ArmResults, ...]:
        """The controls that have a result; AdamW with one rate is last."""
        found = [one for one in self.arms if one.seeds and one.arm.control]
        return tuple(sorted(found, key=lambda one: one.arm.recipe == _ONE_RATE))

    @property
    def ranked(self) -> tuple[ArmResults, ...]:
        """All arms by mean loss, lowest first; those that diverged or have no loss yet are last."""
        return tuple(sorted(self.arms, key=lambda one: math.inf if one.loss is None else one.loss))

    def arm(self, name: str) -> ArmResults | None:
        """Return the arm of this name; None if it has no result."""
        return next((one for one in self.arms if one.arm.name == name and one.seeds), None)

    def difference(self, one: ArmResults, other: ArmResults) -> Difference:
        """Compare two arms seed by seed."""
        return Difference.of(one.losses, other.losses)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The reported runs."""
        return tuple(result.run for one in self.arms for result in one.seeds)

    def analysis(self, baseline: str | None) -> Analysis:
        """Compare the reported runs with a baseline; each arm takes the place of a recipe.

        Args:
            baseline: Name of the arm to compare with, which is listed first; None for no
                comparison.
        """
        arms = {result.name: one.arm.name for one in self.arms for result in one.seeds}
        found = analyze(self.runs, baseline, group=lambda run: arms[run.start.name])
        order = [baseline, *(one.arm.name for one in self.ranked)]
        recipes = sorted(found.recipes, key=lambda recipe: order.index(recipe.name))
        return replace(found, recipes=tuple(recipes))

    @property
    def has_several_models(self) -> bool:
        """Whether arms train different presets; adapters do not count."""
        return len(set(map(preset_of, self.runs))) > 1

    @property
    def times_comparable(self) -> bool:
        """Whether all runs had the same processor, with as many other runs, and none was slowed."""
        alike = len(self.processors) < 2 and len(self.jobs) < 2
        return alike and not (self.runs and unequal_speed(self.analysis(None)))

    @property
    def equal_seconds(self) -> float | None:
        """Mean training time of the fastest arm, in seconds.

        None if no run finished, if times are not comparable, or if arms have different models.
        """
        if not self.times_comparable or self.has_several_models:
            return None
        means = [
            statistics.fmean(ends)
            for one in self.arms
            if (ends := [r.run.end.seconds for r in one.seeds if r.run.finished and r.run.end])
        ]
        return min(means, default=None)

    def loss_after(self, one: ArmResults, seconds: float) -> Spread | None:
        """Interpolate an arm's validation loss after ``seconds`` of training.

        None if a seed diverged.
        """
        if one.diverged:
            return None
        losses = [_loss_after(result.run.evaluations, seconds) for result in one.seeds]
        return Spread.of(loss for loss in losses if loss is not None)


def _loss_after(evaluations: Sequence[Evaluation], seconds: float) -> float | None:
    """Interpolate between two evaluations.

    Before the first evaluation the result is None, after the last it is the loss of the last.
    """
    before: Evaluation | None = None
    for after in evaluations:
        if after.seconds >= seconds:
            if before is None:
                return None
            way = (seconds - before.seconds) / (after.seconds - before.seconds)
            return before.val_loss + way * (after.val_loss - before.val_loss)
        before = after
    return before.val_loss if before else None
