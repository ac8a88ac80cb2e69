"""What is to be done next: the points of every grid, then the seeds of arms whose grid is done."""

import math
import statistics

from sinkgd.lab.experiments.plan import StudyPlan, Task
from sinkgd.lab.experiments.record import RunResult, StudyRecord
from sinkgd.lab.experiments.study import NOTHING, Arm, Point
from sinkgd.lab.experiments.tuning import Tuning


class Agenda:
    """Hands out runs, and takes their results into the record.

    Args:
        plan: Of the study.
        record: What was found before; results are added to it.
        tuning: The searches of the plan's tuned arms.
    """

    def __init__(self, plan: StudyPlan, record: StudyRecord, tuning: Tuning) -> None:
        self.plan = plan
        self.record = record
        self._tuning = tuning
        self._begun: set[str] = set(record.runs)
        self._skipped = 0

    @property
    def begun(self) -> int:
        """Runs that are done or under way."""
        return len(self._begun)

    @property
    def left(self) -> int:
        """Runs that are not done."""
        return self.plan.runs - len(self.record.runs) - self._skipped

    @property
    def mean_seconds(self) -> float | None:
        """Of the runs that are done, everything included."""
        ends = [result.run.end for result in self.record.runs.values()]
        seconds = [end.wall_seconds for end in ends if end]
        return statistics.fmean(seconds) if seconds else None

    def next_task(self) -> Task | None:
        """Return a run that can begin now; None if there is none, or none yet."""
        task = self._next_of_a_grid() or self._next_of_a_seed()
        if task is not None:
            self._begun.add(task.name)
        return task

    def finish(self, task: Task, result: RunResult) -> None:
        """Take the result of a run that was handed out."""
        self.record.runs[result.name] = result
        if task.tuning:
            self._tuning.tell(task.arm, task.point, result.loss)

    def _next_of_a_grid(self) -> Task | None:
        for arm in self.plan.arms:
            while self.plan.is_tuned(arm):
                point = self._tuning.next_point(arm)
                if point is None:
                    break
                task = self.plan.tuning_task(arm, point)
                if task.name not in self.record.runs:
                    return task
                # It was killed between the record and the search's own file.
                self._tuning.tell(arm, point, self.record.runs[task.name].loss)
            # The record is what counts: a point that only the search remembers is run again.
            for task in self.plan.tuning_tasks(arm):
                if task.name not in self._begun:
                    return task
        return None

    def _next_of_a_seed(self) -> Task | None:
        for seed in self.plan.seeds:
            for arm in self.plan.arms:
                if self.plan.seed_task(arm, NOTHING, seed).name in self._begun:
                    continue
                if self._grid_is_done(arm):
                    point = chosen_point(self.plan, arm, self.record)
                    if point is not None:
                        return self.plan.seed_task(arm, point, seed)
                    self._skip(arm, seed)
        return None

    def _grid_is_done(self, arm: Arm) -> bool:
        return all(task.name in self.record.runs for task in self.plan.tuning_tasks(arm))

    def _skip(self, arm: Arm, seed: int) -> None:
        """Leave out the seeds of an arm that diverged at every point."""
        self._begun.add(self.plan.seed_task(arm, NOTHING, seed).name)
        self._skipped += 1


def chosen_point(plan: StudyPlan, arm: Arm, record: StudyRecord) -> Point | None:
    """Return the point of the lowest loss, the first of equals; None if every point diverged.

    Where nothing is tuned it is the empty one.
    """
    losses = {
        record.runs[task.name].loss: task.point
        for task in reversed(plan.tuning_tasks(arm))
        if task.name in record.runs
    }
    if not plan.is_tuned(arm):
        return NOTHING
    best = min(losses, default=math.inf)
    return losses[best] if math.isfinite(best) else None
