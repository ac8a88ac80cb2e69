"""What of a run a study keeps.

Of the training curve it is one step for every evaluation, which has the mean loss and the mean
times of the steps since the evaluation before. Of a model's statistics it is the means over heads
and blocks.
"""

import statistics
from collections.abc import Mapping, Sequence

from sinkgd.lab.results import ModelStatistics, Run, TrainStep


def thinned(run: Run) -> Run:
    """Keep one step for every evaluation, with the means over the steps since the one before."""
    steps, rest = [], run.steps
    for evaluation in run.evaluations:
        count = sum(1 for step in rest if step.step <= evaluation.step)
        if count:
            steps.append(_mean_step(rest[:count]))
        rest = rest[count:]
    inner = [ModelStatistics(one.step, _means(one.values)) for one in run.statistics]
    return Run(run.path, run.start, steps, run.evaluations, run.end, inner)


def _means(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in values.items() if name.endswith("/mean")}


def _mean_step(steps: Sequence[TrainStep]) -> TrainStep:
    last = steps[-1]
    return TrainStep(
        step=last.step,
        tokens=last.tokens,
        seconds=last.seconds,
        loss=statistics.fmean(step.loss for step in steps),
        lr=last.lr,
        gradient_norm=statistics.fmean(step.gradient_norm for step in steps),
        step_seconds=statistics.fmean(step.step_seconds for step in steps),
        optimizer_seconds=statistics.fmean(step.optimizer_seconds for step in steps),
    )
