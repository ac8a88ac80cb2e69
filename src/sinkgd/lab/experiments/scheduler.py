"""The order of a study's runs: the points of every grid, then the seeds of arms with a full grid.

optuna searches a grid: every point once, recorded in an SQLite file. A trial that was running when
its process was killed is handed out again, and its run continues from its checkpoint. A trial with
a result is never handed out again.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import optuna
from optuna.exceptions import OptunaError
from optuna.samplers import GridSampler
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from sinkgd.lab.experiments.arms import EMPTY, Arm, Point, point_name
from sinkgd.lab.experiments.study import StudyPlan, Task
from sinkgd.lab.experiments.study_record import RunResult, StudyRecord
from sinkgd.lab.results import ResultsError

TUNING_FILE = "tuning.db"  # in the study's folder

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Tuning:
    """The grid searches of a study's arms, in one file; a context manager.

    Args:
        path: The SQLite file; it is made when absent.
        arms: The tuned arms.

    Raises:
        ResultsError: If the file is not such a database.
    """

    def __init__(self, path: Path, arms: Sequence[Arm]) -> None:
        try:
            self._storage = optuna.storages.RDBStorage(f"sqlite:///{path.absolute()}")
            self._searches = {arm.name: _Search(self._storage, arm) for arm in arms}
        except (OptunaError, SQLAlchemyError) as error:
            reason = str(error).splitlines()[0]
            raise ResultsError(
                f"{path} is damaged: {reason}. Delete it; finished runs are in study.jsonl"
            ) from error

    def next_point(self, arm: Arm) -> Point | None:
        """Return a point without a result that this session has not handed out; None at the end."""
        return self._searches[arm.name].next_point()

    def tell(self, arm: Arm, point: Point, loss: float) -> None:
        """Record the final validation loss of a point, infinite if it failed.

        Results of earlier sessions are not changed.
        """
        self._searches[arm.name].tell(point, loss)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._storage.remove_session()
        self._storage.engine.dispose()


class _Search:
    """The grid search of one arm."""

    def __init__(self, storage: Any, arm: Arm) -> None:
        self._arm = arm
        self._study = optuna.create_study(
            storage=storage,
            study_name=arm.name,
            sampler=_AskedGrid(arm.tuned, seed=0),
            load_if_exists=True,
        )
        trials = self._study.get_trials(deepcopy=False)
        self._in_flight = [trial._trial_id for trial in trials if not trial.state.is_finished()]
        self._left = len(arm.points()) - len(trials)
        self._handed_out: dict[str, optuna.Trial] = {}

    def next_point(self) -> Point | None:
        if self._in_flight:
            trial = optuna.Trial(self._study, self._in_flight.pop(0))
        elif self._left > 0:
            trial = self._study.ask()
            self._left -= 1
        else:
            return None
        point = {
            name: trial.suggest_categorical(name, list(values))
            for name, values in self._arm.tuned.items()
        }
        self._handed_out[point_name(point)] = trial
        return point

    def tell(self, point: Point, loss: float) -> None:
        trial = self._handed_out.pop(point_name(point), None)
        if trial is not None:
            self._study.tell(trial, loss)


class _AskedGrid(GridSampler):  # type: ignore[misc]  # optuna is read without its types
    """optuna's grid sampler for use by ask and tell, without optuna's own loop."""

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Do nothing; optuna's method stops its own loop, and raises if there is none."""


class Scheduler:
    """Hands out runs and adds their results to the record.

    Args:
        plan: The study's plan.
        record: The results so far; new ones are added to it.
        tuning: The grid searches of the plan's tuned arms.
    """

    def __init__(self, plan: StudyPlan, record: StudyRecord, tuning: Tuning) -> None:
        self.plan = plan
        self.record = record
        self._tuning = tuning
        self._begun: set[str] = set(record.runs)
        self._skipped = 0

    @property
    def begun(self) -> int:
        """Number of runs that are finished or running."""
        return len(self._begun)

    @property
    def left(self) -> int:
        """Number of runs that are not finished."""
        return self.plan.runs - len(self.record.runs) - self._skipped

    @property
    def mean_seconds(self) -> float | None:
        """Mean wall time of the finished runs; None if there is none."""
        ends = [result.run.end for result in self.record.runs.values()]
        seconds = [end.wall_seconds for end in ends if end]
        return statistics.fmean(seconds) if seconds else None

    def next_task(self) -> Task | None:
        """Return a run that can start now; None if there is none at present."""
        task = self._next_grid_task() or self._next_seed_task()
        if task is not None:
            self._begun.add(task.name)
        return task

    def finish(self, task: Task, result: RunResult) -> None:
        """Record the result of a run that was handed out."""
        self.record.runs[result.name] = result
        if task.tuning:
            self._tuning.tell(task.arm, task.point, result.loss)

    def _next_grid_task(self) -> Task | None:
        for arm in self.plan.arms:
            while self.plan.is_tuned(arm):
                point = self._tuning.next_point(arm)
                if point is None:
                    break
                task = self.plan.tuning_task(arm, point)
                if task.name not in self.record.runs:
                    return task
                # The process was killed after writing the record and before writing the search.
                self._tuning.tell(arm, point, self.record.runs[task.name].loss)
            # The record decides: a point that only the search has is run again.
            for task in self.plan.tuning_tasks(arm):
                if task.name not in self._begun:
                    return task
        return None

    def _next_seed_task(self) -> Task | None:
        for seed in self.plan.seeds:
            for arm in self.plan.arms:
                if self.plan.seed_task(arm, EMPTY, seed).name in self._begun:
                    continue
                if self._grid_is_full(arm):
                    point = chosen_point(self.plan, arm, self.record)
                    if point is not None:
                        return self.plan.seed_task(arm, point, seed)
                    self._skip(arm, seed)
        return None

    def _grid_is_full(self, arm: Arm) -> bool:
        return all(task.name in self.record.runs for task in self.plan.tuning_tasks(arm))

    def _skip(self, arm: Arm, seed: int) -> None:
        """Skip a seed of an arm that diverged at every point."""
        self._begun.add(self.plan.seed_task(arm, EMPTY, seed).name)
        self._skipped += 1


def chosen_point(plan: StudyPlan, arm: Arm, record: StudyRecord) -> Point | None:
    """Return the point with the lowest loss, the first of equal ones; None if all diverged.

    For an arm without a grid this is the empty point.
    """
    losses = {
        record.runs[task.name].loss: task.point
        for task in reversed(plan.tuning_tasks(arm))
        if task.name in record.runs
    }
    if not plan.is_tuned(arm):
        return EMPTY
    best = min(losses, default=math.inf)
    return losses[best] if math.isfinite(best) else None
