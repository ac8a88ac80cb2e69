"""The two charts of the loss: against tokens, and against seconds of training."""

from collections.abc import Sequence
from typing import Any

from sinkgd.lab.report import quantities
from sinkgd.lab.report.analysis import Analysis
from sinkgd.lab.report.charts import Chart, Figure, axis, layout
from sinkgd.lab.report.curves import (
    MOST_ARROWS,
    Axis,
    Curve,
    crossed,
    level,
    marks,
    mean_validation_curve,
    training_curve,
    validation_curve,
)
from sinkgd.lab.report.identity import Identities, Identity, plotly_label
from sinkgd.lab.report.summary import RecipeSummary
from sinkgd.lab.report.verdict import unequal_speed
from sinkgd.lab.results import Run

_VIEW_BEGINS = 0.15  # of the x axis: the first plunge would flatten everything after it
_CROWD = 8  # recipes; of more the means alone are drawn
_HEIGHT = 470


def loss_chart(analysis: Analysis, identities: Identities, along: Axis) -> Chart:
    """Draw the losses of every run, the baseline's final loss and who crossed it where."""
    scale, unit = _x_unit(analysis, along)
    curves = _Traces(along, scale, means_alone=_means_alone(analysis))
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
                shapes=level(analysis),
                annotations=marks(analysis, identities, along, scale=scale, top=top),
            ),
        },
        share=1,
    )


class _Traces:
    """Collects the plotly traces of one chart, and the curves they draw."""

    def __init__(self, along: Axis, scale: float, *, means_alone: bool) -> None:
        self.along = along
        self.scale = scale
        self.means_alone = means_alone
        self.traces: list[Figure] = []
        self.drawn: list[Curve] = []

    def add(self, recipe: RecipeSummary, identity: Identity) -> None:
        averaged = len(recipe.finished) > 1
        if not self.means_alone:
            for run in recipe.runs:
                curve = training_curve(run, self.along)
                self._line(
                    curve, recipe, identity, line={"width": 1}, opacity=0.4, hoverinfo="skip"
                )
        for run in recipe.runs:
            if not (self.means_alone and averaged and run.finished):
                self._validation(run, recipe, identity, thin=averaged and run.finished)
        if averaged:
            curve = mean_validation_curve(recipe.finished, self.along)
            self._bold(curve, recipe, identity, f"mean of {len(recipe.finished)} runs")
        # The legend's own entry: it is there whatever was drawn.
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
    """Choose what one unit of the x axis is, and its name."""
    if along == "tokens":
        return 1.0, "training tokens"
    longest = max((run.steps[-1].seconds for run in analysis.runs if run.steps), default=0.0)
    for scale, name in ((3600.0, "hours"), (60.0, "minutes")):
        if longest >= 2 * scale:
            return scale, f"{name} of training"
    return 1.0, "seconds of training"


def _view(curves: Sequence[Curve]) -> list[float] | None:
    """Choose the y range: all that is drawn once the first plunge is over."""
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


def _means_alone(analysis: Analysis) -> bool:
    return len(analysis.recipes) > _CROWD


def _caption(analysis: Analysis, along: Axis, *, comparable: bool) -> str:
    parts = ["Marked lines: held-out text, one mark per evaluation."]
    if any(len(recipe.finished) > 1 for recipe in analysis.recipes):
        thin = "." if _means_alone(analysis) else ", thin is each seed."
        parts.append(f"Bold is the mean over seeds{thin}")
    if not _means_alone(analysis):
        parts.append("Faint: training loss, smoothed.")
    if any(not run.finished for run in analysis.runs):
        parts.append("Dashed: a run that did not finish.")
    if not comparable:
        parts.append("Do not compare these times: some runs were slowed down.")
    elif analysis.target is not None:
        crowd = len(crossed(analysis, along)) > MOST_ARROWS
        who = f"the first {MOST_ARROWS}" if crowd else "a recipe first"
        parts.append(f"Arrows: where {who} reached the dotted level.")
    return " ".join(parts)


def _description(analysis: Analysis, where: str) -> str:
    ends = [
        f"{recipe.name} ends at {quantities.loss(recipe.val_loss.mean)}"
        for recipe in analysis.recipes
        if recipe.val_loss
    ]
    return f"Line chart of the loss against {where}: {', '.join(ends) or 'no run has finished'}."
