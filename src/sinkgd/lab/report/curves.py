"""Curves as points to draw, and the marks on them: who crossed the baseline's final loss, where.

Curves are validation losses, their mean over seeds, and smoothed training losses.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sinkgd.lab.report import quantities
from sinkgd.lab.report.analysis import Analysis
from sinkgd.lab.report.charts import CLEAR, Figure
from sinkgd.lab.report.identity import Identities
from sinkgd.lab.report.summary import Spread
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


MOST_ARROWS = 4  # that have room, on a phone too; bars show everyone
# Of the baseline's x: before it words stand on an arrow's right, after it on its left.
_MIDDLE = 0.5


def level(analysis: Analysis) -> list[Figure]:
    """Draw the baseline's final loss as a dotted line."""
    if analysis.target is None:
        return []
    line = {"color": "@soft", "width": 1.4, "dash": "dot"}
    ends = {"x0": 0, "x1": 1, "y0": analysis.target, "y1": analysis.target}
    return [{"type": "line", "xref": "paper", **ends, "line": line, "layer": "below"}]


def crossed(analysis: Analysis, along: Axis) -> list[tuple[float, float, str]]:
    """List who reached the baseline's final loss: x, the same of the baseline's, and the name."""
    return sorted(
        (point.mean, fraction.mean, recipe.name)
        for recipe in analysis.candidates
        if (point := getattr(analysis.comparisons[recipe.name], along))
        and (fraction := _fraction(analysis, recipe.name, along))
    )


def marks(
    analysis: Analysis,
    identities: Identities,
    along: Axis,
    *,
    scale: float,
    top: float | None,
) -> list[Figure]:
    """Label the baseline's level, and with an arrow each point where one of the first crossed it.

    Args:
        analysis: Of the runs.
        identities: How recipes are recognized.
        along: What x is.
        scale: Of ``along``, what one unit of x is.
        top: The loss at the chart's upper edge; None draws no arrows.
    """
    if analysis.baseline is None or analysis.target is None:
        return []
    name, target = identities[analysis.baseline.name].label, analysis.target
    found: list[Figure] = [
        {
            "text": f"{name}’s final loss, {quantities.loss(target)}",
            "xref": "paper",
            "x": 0.005,
            "y": target,
            "xanchor": "left",
            "yanchor": "top",
            "showarrow": False,
            "font": {"color": "@soft", "size": 12.5},
        }
    ]
    if top is None:
        return found
    first = crossed(analysis, along)[:MOST_ARROWS]
    # No arrow cuts the words of another on its side: of late ones the first is lowest, of early
    # ones, whose words are on the other side, the last.
    late = [row for row in first if row[1] > _MIDDLE]
    early = [row for row in reversed(first) if row[1] <= _MIDDLE]
    for place, (x, fraction, recipe) in enumerate([*late, *early], start=1):
        words = f"<b>{identities[recipe].label}</b> {quantities.percent(fraction)}"
        tail = target + (top - target) * place / (len(first) + 1)
        arrow = _arrow(words, identities[recipe].color, x / scale, target, tail)
        found.append({**arrow, "xanchor": "right" if fraction > _MIDDLE else "left"})
    return found


def _arrow(words: str, color: str, x: float, y: float, tail: float) -> Figure:
    """Point down at (x, y), from ``tail`` on the same axis."""
    return {
        "text": words,
        "x": x,
        "y": y,
        "ax": 0,
        "ay": tail,
        "ayref": "y",
        "font": {"color": color, "size": 14},
        "bgcolor": "@card",
        "bordercolor": CLEAR,
        "arrowcolor": color,
        "arrowhead": 2,
        "arrowwidth": 1.4,
        "standoff": 3,
    }


def _fraction(analysis: Analysis, recipe: str, along: Axis) -> Spread | None:
    comparison = analysis.comparisons[recipe]
    return comparison.token_fraction if along == "tokens" else comparison.time_fraction
