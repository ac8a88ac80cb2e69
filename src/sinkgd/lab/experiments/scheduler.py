"""Which run of a study is next, and which runs other studies have made already.

The order is: first the points of every arm's own grid, and the neighbors of the best points if
grids are widened; then the seeds of arms whose grid is complete; then the grids of arms that take
their values from another arm, as the arms of large models do. Runs in the study's record are done.
Other runs are handed out, and continue from their checkpoints if a killed process has begun them.

Runs of grids that neighboring studies have in common are trained once and reused. In one
environment, a run's configuration determines its losses to the bit, and a grid needs only losses.
Environments are equal if they have the same source code, packages, processor, threads and device;
records of versions that recorded no hash of their source code are not reused. Reported runs also
have times, which depend on other work on the machine, so every study trains its own reported runs.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from sinkgd.lab.experiments.arms import EMPTY, Arm, Carried, Point, best_point
from sinkgd.lab.experiments.studies.scale import is_on_paper
from sinkgd.lab.experiments.study import StudyPlan, Task
from sinkgd.lab.experiments.study_record import STUDY_FILE, RunResult, StudyRecord
from sinkgd.lab.results import ResultsError
from sinkgd.lab.train.config import RunConfig, as_tables
from sinkgd.lab.train.identity import DATA, knows_its_text

# Parts of an environment to compare. numba chooses the backend: a step on a CPU without it is taken
# by ``eager``.
_EQUAL = ("sinkgd", "source", "torch", "numba", "cpu", "threads", "device")


class Scheduler:
    """Hands out runs and adds their results to the record.

    Args:
        plan: The study's plan.
        record: The results so far; new results are added to this record.
    """

    def __init__(self, plan: StudyPlan, record: StudyRecord) -> None:
        self.plan = plan
        self.record = record
        self._begun: set[str] = set(record.runs)

    @property
    def begun(self) -> int:
        """Number of runs that have ended or are running."""
        return len(self._begun)

    @property
    def left(self) -> int:
        """Number of runs without a result that can still get one, as far as they are known."""
        done = Counter(result.arm for result in self.record.runs.values())
        return sum(
            self._runs_of(arm) - done[arm.name]
            for arm in self.plan.arms
            if not (self._is_chosen(arm) and self._chosen(arm) is None)
        )

    @property
    def runs(self) -> int:
        """Number of all runs, as far as they are known; a widened grid may yet add some."""
        return sum(map(self._runs_of, self.plan.arms))

    def _runs_of(self, arm: Arm) -> int:
        points = len(self._grid(arm) or ()) if arm.widened else 0
        return max(self.plan.runs_of(arm), points + len(self.plan.seeds_of(arm)))

    @property
    def mean_seconds(self) -> float | None:
        """Mean wall time of the runs that ended; None if no run has ended."""
        ends = [result.run.end for result in self.record.runs.values()]
        seconds = [end.wall_seconds for end in ends if end]
        return statistics.fmean(seconds) if seconds else None

    def next_task(self) -> Task | None:
        """Return a run that can start now; None if no run can start at present."""
        own, carried = (
            [arm for arm in self.plan.arms if (arm.carried is not None) == later]
            for later in (False, True)
        )
        task = self._next_grid_task(own) or self._next_seed_task() or self._next_grid_task(carried)
        if task is not None:
            self._begun.add(task.name)
        return task

    def put_back(self, task: Task) -> None:
        """Hand out a run again that was stopped before its end."""
        self._begun.remove(task.name)

    def finish(self, result: RunResult) -> None:
        """Record the result of a run that was handed out."""
        self.record.runs[result.name] = result

    def _next_grid_task(self, arms: Sequence[Arm]) -> Task | None:
        tasks = (task for arm in arms for task in self._grid(arm) or ())
        return next((task for task in tasks if task.name not in self._begun), None)

    def _next_seed_task(self) -> Task | None:
        for seed in self.plan.seeds:
            for arm in self.plan.arms:
                begun = self.plan.seed_task(arm, EMPTY, seed).name in self._begun
                if begun or seed not in self.plan.seeds_of(arm) or not self._is_chosen(arm):
                    continue
                point = self._chosen(arm)
                if point is not None:  # else the arm diverged at every point
                    return self.plan.seed_task(arm, point, seed)
        return None

    def _grid(self, arm: Arm) -> list[Task] | None:
        """List the runs of an arm's grid; None if the arm it depends on has no best point (yet)."""
        if not self.plan.tune or arm.carried is None:
            grid = self.plan.tuning_tasks(arm)
            return self._widened(arm, grid) if grid and arm.widened else grid
        source = self._source(arm.carried)
        best = self._chosen(source) if self._is_chosen(source) else None
        return None if best is None else self.plan.tuning_tasks(arm, best)

    def _widened(self, arm: Arm, grid: list[Task]) -> list[Task]:
        """Add the neighbors of the best point, until all neighbors of the best point are tried."""
        while all(task.name in self.record.runs for task in grid):
            best = self._best(grid)
            tried = {task.name for task in grid}
            around = [] if best is None else arm.neighbors(best)
            tasks = [self.plan.tuning_task(arm, point) for point in around]
            new = [task for task in tasks if task.name not in tried]
            if not new:
                break
            grid = grid + new
        return grid

    def _source(self, carried: Carried) -> Arm:
        return next(arm for arm in self.plan.arms if arm.name == carried.arm)

    def _is_chosen(self, arm: Arm) -> bool:
        """Whether all runs on which an arm's point depends have ended."""
        if self.plan.tune and arm.carried and not self._is_chosen(self._source(arm.carried)):
            return False
        return all(task.name in self.record.runs for task in self._grid(arm) or ())

    def _chosen(self, arm: Arm) -> Point | None:
        """Return the point with the lowest loss; None if all points diverged.

        For an arm without a grid this is the empty point, or the one that it carries over.
        """
        grid = self._grid(arm)
        if grid is None:
            return None
        if not grid:
            if not self.plan.tune or arm.carried is None:
                return EMPTY
            best = self._chosen(self._source(arm.carried))
            return None if best is None else arm.carried.points(best)[0]
        return self._best(grid)

    def _best(self, grid: Sequence[Task]) -> Point | None:
        runs = self.record.runs
        return best_point((runs[task.name].loss, task.point) for task in grid if task.name in runs)


@dataclass(frozen=True)
class ReusableRuns:
    """Finished runs of other studies' grids, by their configurations."""

    results: Mapping[str, RunResult]

    @classmethod
    def collect(
        cls, folder: Path, environment: Mapping[str, Any], say: Callable[[str], None]
    ) -> Self:
        """Collect the finished grid runs of neighboring studies that had the same environment.

        Args:
            folder: Folder of the study; neighboring studies are in the folders next to it.
            environment: This process's environment, from `describe_environment`.
            say: Called with a line about each neighboring study that cannot be read.
        """
        found: dict[str, RunResult] = {}
        for path in sorted(folder.absolute().parent.glob(f"*/{STUDY_FILE}")):
            if path.parent == folder.absolute() or not path.is_file() or is_on_paper(path):
                continue
            try:
                record = StudyRecord.read(path)
            except (OSError, ResultsError) as error:
                say(f"runs of a neighboring study are not reused: {error}")
                continue
            if _alike(record, environment):
                for result in record.runs.values():
                    if (
                        result.tuning
                        and result.run.finished
                        and not result.study
                        and knows_its_text(result.run.start)
                    ):
                        reused = replace(result, study=record.plan["study"])
                        found[_key(result.run.start.config, _text(result))] = reused
        return cls(found)

    def find(self, task: Task, config: RunConfig, text_sha256: str) -> RunResult | None:
        """Return the result of an equal run of another study.

        Args:
            task: The run that is needed.
            config: The run's resolved configuration.
            text_sha256: Hash of the shards that the run would be trained on.

        Returns:
            The result under the task's names; None if the task is a reported run, or if there is no
            such result.
        """
        key = _key(as_tables(config), text_sha256)
        result = self.results.get(key) if task.tuning else None
        if result is None:
            return None
        start = replace(result.run.start, name=task.name)
        return RunResult(
            task.arm.name, task.tuning, task.point, replace(result.run, start=start), result.study
        )


def _alike(record: StudyRecord, environment: Mapping[str, Any]) -> bool:
    """Whether all recorded sessions of a study had this environment; False without a session."""
    return bool(record.sessions) and all(
        session.environment.get(name) == environment.get(name)
        for session in record.sessions
        for name in _EQUAL
    )


def _text(result: RunResult) -> str:
    return str(result.run.start.inputs[DATA])


def _key(tables: Mapping[str, Any], text_sha256: str) -> str:
    """Return a configuration as a key, with the text's hash in place of the text's path."""
    data = {**tables["data"], "corpus": text_sha256}
    return json.dumps({**tables, "data": data}, sort_keys=True)
