"""Curves as points to draw: validation losses, their mean over seeds, smoothed training losses."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sinkgd.lab.results import Evaluation, Run, TrainStep

Axis = Literal["tokens", "seconds"]

_MOST_POINTS = 200  # of a training curve: more than a screen's columns tell apart
_WINDOW = 0.025  # of the run: the time constant of the smoothing


@dataclass(frozen=True)
class Curve:
    """Points (x, y); y is None where a loss was not finite, which leaves a gap."""

    x: tuple[float, ...]
    y: tuple[float | None, ...]


def validation_curve(run: Run, axis: Axis) -> Curve:
    """Take a run's evaluations as they are."""
    return Curve(
        tuple(getattr(row, axis) for row in run.evaluations),
        tuple(finite(row.val_loss) for row in run.evaluations),
    )


def mean_validation_curve(runs: Sequence[Run], axis: Axis) -> Curve:
    """Average the evaluations of several runs, at the steps that all of them have."""
    rows: dict[int, list[Evaluation]] = {}
    for run in runs:
        for row in run.evaluations:
            rows.setdefault(row.step, []).append(row)
    shared = [rows[step] for step in sorted(rows) if len(rows[step]) == len(runs)]
    return Curve(
        tuple(statistics.fmean(getattr(row, axis) for row in group) for group in shared),
        tuple(finite(statistics.fmean(row.val_loss for row in group)) for group in shared),
    )


def training_curve(run: Run, axis: Axis) -> Curve:
    """Smooth a run's training loss exponentially, without bias at its start, and thin it out."""
    smooth = _smoothed(run.steps)
    stride = max(1, math.ceil(len(smooth) / _MOST_POINTS))
    kept = list(zip(run.steps, smooth, strict=True))[::-1][::stride][::-1]  # the last one stays
    return Curve(tuple(getattr(row, axis) for row, _ in kept), tuple(value for _, value in kept))


def finite(value: float) -> float | None:
    """Return ``value``, or None if it is no finite number."""
    return value if math.isfinite(value) else None


def _smoothed(steps: Sequence[TrainStep]) -> list[float | None]:
    decay = 1 - 1 / max(1.0, _WINDOW * len(steps))
    total = weight = 0.0
    smooth: list[float | None] = []
    for row in steps:
        if not math.isfinite(row.loss):
            smooth.append(None)
            continue
        total = decay * total + (1 - decay) * row.loss
        weight = decay * weight + (1 - decay)
        smooth.append(total / weight)
    return smooth
