"""The search of a grid by optuna: every point once, remembered in an SQLite file.

A trial that was running when its process was killed is handed out again; its run goes on from its
checkpoint. One that was told is never handed out again.
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import optuna
from optuna.exceptions import OptunaError
from optuna.samplers import GridSampler
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from sinkgd.lab.experiments.study import Arm, Point, point_name
from sinkgd.lab.results import ResultsError

TUNING_FILE = "tuning.db"  # in the study's folder

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Tuning:
    """The searches of a study's arms, in one file; a context manager.

    Args:
        path: The SQLite file; it is made when absent.
        arms: Those that are tuned.

    Raises:
        ResultsError: If the file is no such database.
    """

    def __init__(self, path: Path, arms: Sequence[Arm]) -> None:
        try:
            self._storage = optuna.storages.RDBStorage(f"sqlite:///{path.absolute()}")
            self._searches = {arm.name: _Search(self._storage, arm) for arm in arms}
        except (OptunaError, SQLAlchemyError) as error:
            reason = str(error).splitlines()[0]
            raise ResultsError(
                f"{path} is damaged: {reason}. Delete it; the runs that ended stand in study.jsonl"
            ) from error

    def next_point(self, arm: Arm) -> Point | None:
        """Return a point that was not handed out in this sitting and not told; None at the end."""
        return self._searches[arm.name].next_point()

    def tell(self, arm: Arm, point: Point, loss: float) -> None:
        """Take the final validation loss of a point, infinite if it failed.

        What was told in an earlier sitting is left as it was.
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
    """The search of one arm's grid."""

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
    """The grid, for who asks and tells: nobody is in a loop that its end could stop."""

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Do nothing; optuna's would raise after the last point."""
