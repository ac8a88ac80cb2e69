"""Line charts: the loss against tokens and against time, and statistics of models against tokens.

A curve is a validation loss, its mean over seeds, a smoothed training loss, or a statistic.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sinkgd.lab.report import quantities
from sinkgd.lab.report.analysis import Analysis, RecipeSummary, Spread
from sinkgd.lab.report.figures import (
    CLEAR,
    Chart,
    Figure,
    Identities,
    Identity,
    axis,
    dotted_line,
    layout,
    plotly_label,
)
from sinkgd.lab.report.verdict import unequal_speed
from sinkgd.lab.results import Evaluation, Run, TrainStep

Axis = Literal["tokens", "seconds"]
_VIEW_BEGINS = 0.15  # fraction of x before which losses do not count for the range of y
_CROWD = 8  # largest number of recipes for which single runs are drawn, not only means
_HEIGHT = 470
_MOST_POINTS = 200  # largest number of points of a training curve
_WINDOW = 0.025  # time constant of the smoothing, as a fraction of the run
_MOST_ARROWS = 4  # number of arrows that fit on a phone; the bar charts show all recipes
# A fraction of the baseline's x. The words of an arrow before this point are on the arrow's right,
# those of a later arrow on its left.
_MIDDLE = 0.5
_MEAN = "/mean"  # suffix of means over heads and blocks; other values are not drawn
_STATISTIC_HEIGHT = 300


@dataclass(frozen=True)
class Curve:
    """Points (x, y); y is None if a value is not finite, which leaves a gap."""

    x: tuple[float, ...]
    y: tuple[float | None, ...]


def loss_chart(analysis: Analysis, identities: Identities, along: Axis) -> Chart:
    """Draw the losses of the runs, the baseline's final loss, and where recipes reached it."""
    scale, unit = _x_unit(analysis, along)
    curves = _Traces(along, scale, means_only=_means_only(analysis))
    for recipe in analysis.recipes:
        curves.add(recipe, identities[recipe.name])
    where = {"tokens": "tokens", "seconds": "time of training"}[along]
    view = _view(curves.drawn)
    comparable = along == "tokens" or not unequal_speed(analysis)
    top = view[1] if view and comparable else None
    return Chart(
        key=f"loss-{along}",
        title=f"Validation loss against {where}",
        caption=_caption(analysis, along, comparable=comparable),
        description=_description(analysis, where),
        figure={
            "data": curves.traces,
            "layout": layout(
                _HEIGHT,
                xaxis=axis(
                    unit, rangemode="tozero", tickformat="~s" if along == "tokens" else "~g"
                ),
                yaxis=axis("nats per token", range=view),
                hovermode="closest",
                shapes=[]
                if analysis.target is None
                else [dotted_line(analysis.target, color="@soft", width=1.4)],
                annotations=_target_labels(analysis, identities, along, scale=scale, top=top),
            ),
        },
        share=1,
    )


class _Traces:
    """Collects the plotly traces of one chart and their curves."""

    def __init__(self, along: Axis, scale: float, *, means_only: bool) -> None:
        self.along = along
        self.scale = scale
        self.means_only = means_only
        self.traces: list[Figure] = []
        self.drawn: list[Curve] = []

    def add(self, recipe: RecipeSummary, identity: Identity) -> None:
        averaged = len(recipe.finished) > 1
        if not self.means_only:
            for run in recipe.runs:
                curve = training_curve(run, self.along)
                self._line(
                    curve, recipe, identity, line={"width": 1}, opacity=0.4, hoverinfo="skip"
                )
        for run in recipe.runs:
            if not (self.means_only and averaged and run.finished):
                self._validation(run, recipe, identity, thin=averaged and run.finished)
        if averaged:
            curve = mean_validation_curve(recipe.finished, self.along)
            self._bold(curve, recipe, identity, f"mean of {len(recipe.finished)} runs")
        # An empty trace for the legend, so that every recipe has an entry.
        self._line(
            Curve((), ()),
            recipe,
            identity,
            name=identity.label,
            mode="lines+markers",
            showlegend=True,
            marker={"symbol": identity.symbol, "size": 9},
            line={"width": 2.6},
        )

    def _validation(
        self, run: Run, recipe: RecipeSummary, identity: Identity, *, thin: bool
    ) -> None:
        curve = validation_curve(run, self.along)
        if not thin:
            self._bold(curve, recipe, identity, plotly_label(run.start.name), done=run.finished)
            return
        self._line(
            curve,
            recipe,
            identity,
            line={"width": 1.2},
            opacity=0.75,
            hovertext=_hover(plotly_label(run.start.name), curve),
            hoverinfo="text",
        )

    def _bold(
        self, curve: Curve, recipe: RecipeSummary, identity: Identity, who: str, done: bool = True
    ) -> None:
        self._line(
            curve,
            recipe,
            identity,
            mode="lines+markers",
            line={"width": 2.6, "dash": "solid" if done else "dash"},
            marker={"symbol": identity.symbol, "size": 7, "line": {"width": 1, "color": "@card"}},
            hovertext=_hover(f"{identity.label}, {who}", curve),
            hoverinfo="text",
        )

    def _line(
        self, curve: Curve, recipe: RecipeSummary, identity: Identity, **options: Any
    ) -> None:
        self.drawn.append(curve)
        line = {"color": identity.color, **options.pop("line")}
        marker = {"color": identity.color, **options.pop("marker", {})}
        self.traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [x / self.scale for x in curve.x] or [None],
                "y": list(curve.y) or [None],
                "line": line,
                "marker": marker,
                "legendgroup": recipe.name,
                "showlegend": False,
                **options,
            }
        )


def _hover(who: str, curve: Curve) -> list[str]:
    return [f"{who}<br>{quantities.loss(y)}" if y is not None else "" for y in curve.y]


def _x_unit(analysis: Analysis, along: Axis) -> tuple[float, str]:
    """Return the size of the x axis's unit, in tokens or seconds, and the title of the axis."""
    if along == "tokens":
        return 1.0, "training tokens"
    longest = max((run.steps[-1].seconds for run in analysis.runs if run.steps), default=0.0)
    for scale, name in ((3600.0, "hours"), (60.0, "minutes")):
        if longest >= 2 * scale:
            return scale, f"{name} of training"
    return 1.0, "seconds of training"


def _view(curves: Sequence[Curve]) -> list[float] | None:
    """Choose the range of y; it shows all losses after the steep descent at the start."""
    longest = max((curve.x[-1] for curve in curves if curve.x), default=0.0)
    seen = [
        y
        for curve in curves
        for x, y in zip(curve.x, curve.y, strict=True)
        if y is not None and x >= _VIEW_BEGINS * longest
    ]
    if not seen or min(seen) == max(seen):
        return None
    low, high = min(seen), max(seen)
    margin = 0.06 * (high - low)
    return [low - margin, high + margin]


def _means_only(analysis: Analysis) -> bool:
    return len(analysis.recipes) > _CROWD


def _caption(analysis: Analysis, along: Axis, *, comparable: bool) -> str:
    parts = ["Marked lines: held-out text, one mark per evaluation."]
    if any(len(recipe.finished) > 1 for recipe in analysis.recipes):
        thin = "." if _means_only(analysis) else ", thin is each seed."
        parts.append(f"Bold is the mean over seeds{thin}")
    if not _means_only(analysis):
        parts.append("Faint: training loss, smoothed.")
    if any(not run.finished for run in analysis.runs):
        parts.append("Dashed: a run that did not finish.")
    if not comparable:
        parts.append("Do not compare these times: some runs were slowed down.")
    elif analysis.target is not None:
        crowd = len(_reached(analysis, along)) > _MOST_ARROWS
        who = f"the first {_MOST_ARROWS}" if crowd else "a recipe first"
        parts.append(f"Arrows: where {who} reached the dotted line.")
    return " ".join(parts)


def _description(analysis: Analysis, where: str) -> str:
    ends = [
        f"{recipe.name} ends at {quantities.loss(recipe.val_loss.mean)}"
        for recipe in analysis.recipes
        if recipe.val_loss
    ]
    return f"Line chart of the loss against {where}: {', '.join(ends) or 'no run has finished'}."


def validation_curve(run: Run, axis: Axis) -> Curve:
    """Return a run's evaluations as a curve."""
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
    """Smooth a run's training loss, without bias at the start; keep at most 200 points."""
    smooth = _smoothed(run.steps)
    stride = max(1, math.ceil(len(smooth) / _MOST_POINTS))
    kept = list(zip(run.steps, smooth, strict=True))[::-1][::stride][::-1]  # keeps the last point
    return Curve(tuple(getattr(row, axis) for row, _ in kept), tuple(value for _, value in kept))


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


def finite(value: float) -> float | None:
    """Return ``value``, or None if it is not finite."""
    return value if math.isfinite(value) else None


def _reached(analysis: Analysis, along: Axis) -> list[tuple[float, float, str]]:
    """List recipes that reached the target: x, x as a fraction of the baseline's, and the name."""
    return sorted(
        (point.mean, fraction.mean, recipe.name)
        for recipe in analysis.candidates
        if (point := getattr(analysis.comparisons[recipe.name], along))
        and (fraction := _fraction(analysis, recipe.name, along))
    )


def _target_labels(
    analysis: Analysis,
    identities: Identities,
    along: Axis,
    *,
    scale: float,
    top: float | None,
) -> list[Figure]:
    """Label the baseline's final loss, and mark with arrows where the first recipes reached it.

    Args:
        analysis: The comparison of the runs.
        identities: Colors and labels of the recipes.
        along: The quantity on the x axis.
        scale: Size of the unit of x, in tokens or seconds.
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
    first = _reached(analysis, along)[:_MOST_ARROWS]
    # The heights are chosen so that no arrow crosses the words of another. Late arrows have their
    # words on the left, so the first of them is the lowest. Early arrows have their words on the
    # right, so the last of them is the lowest.
    late = [row for row in first if row[1] > _MIDDLE]
    early = [row for row in reversed(first) if row[1] <= _MIDDLE]
    for place, (x, fraction, recipe) in enumerate([*late, *early], start=1):
        words = f"<b>{identities[recipe].label}</b> {quantities.percent(fraction)}"
        tail = target + (top - target) * place / (len(first) + 1)
        arrow = _arrow(words, identities[recipe].color, x / scale, target, tail)
        found.append({**arrow, "xanchor": "right" if fraction > _MIDDLE else "left"})
    return found


def _arrow(words: str, color: str, x: float, y: float, tail: float) -> Figure:
    """Point down at (x, y), from the loss ``tail`` on the y axis."""
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


def statistics_charts(analysis: Analysis, identities: Identities) -> list[Chart]:
    """Draw the means of the models' statistics over heads and blocks, against tokens.

    Args:
        analysis: The comparison of the runs.
        identities: Colors and labels of the recipes.
    """
    names = dict.fromkeys(
        name.removesuffix(_MEAN)
        for run in analysis.runs
        for record in run.statistics
        for name in record.values
        if name.endswith(_MEAN)
    )
    return [_statistic_chart(name, analysis, identities) for name in names]


def statistic_curve(runs: Sequence[Run], name: str) -> Curve:
    """Return the mean of a statistic over runs, at the steps that all of them have.

    Args:
        runs: Runs of one recipe.
        name: Name of the statistic, e.g. ``"attention_entropy"``.
    """
    rows: dict[int, list[float]] = {}
    for run in runs:
        for record in run.statistics:
            if name + _MEAN in record.values:
                tokens = record.step * run.start.tokens_per_step
                rows.setdefault(tokens, []).append(record.values[name + _MEAN])
    shared = [(x, values) for x, values in sorted(rows.items()) if len(values) == len(runs)]
    return Curve(tuple(x for x, _ in shared), tuple(finite(statistics.fmean(y)) for _, y in shared))


def _statistic_chart(name: str, analysis: Analysis, identities: Identities) -> Chart:
    title = name.replace("_", " ").capitalize()
    traces, ends = [], []
    for recipe in analysis.recipes:
        runs = recipe.finished or recipe.runs
        identity = identities[recipe.name]
        traces += [
            _statistic_line(statistic_curve([run], name), recipe, identity, thin=True)
            for run in runs
        ]
        mean = statistic_curve(runs, name)
        traces.append(_statistic_line(mean, recipe, identity, thin=False))
        if mean.y and (last := mean.y[-1]) is not None:
            ends.append(f"{recipe.name} ends at {last:.3f}")
    return Chart(
        key=f"inner-{name.replace('_', '-')}",
        title=title,
        caption="Mean over heads and blocks, on held-out text. Bold is the mean over seeds.",
        description=f"Line chart of {title} against tokens: {', '.join(ends) or 'no values'}.",
        figure={
            "data": traces,
            "layout": layout(
                _STATISTIC_HEIGHT,
                xaxis=axis("training tokens", rangemode="tozero", tickformat="~s"),
                yaxis=axis(""),
                hovermode="closest",
            ),
        },
    )


def _statistic_line(
    curve: Curve, recipe: RecipeSummary, identity: Identity, *, thin: bool
) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines" if thin else "lines+markers",
        "x": list(curve.x) or [None],
        "y": list(curve.y) or [None],
        "name": identity.label,
        "line": {"color": identity.color, "width": 1 if thin else 2.4},
        "marker": {"color": identity.color, "symbol": identity.symbol, "size": 6},
        "opacity": 0.4 if thin else 1.0,
        "legendgroup": recipe.name,
        "showlegend": not thin,
        "hoverinfo": "skip" if thin else "name+y",
    }
