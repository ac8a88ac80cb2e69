"""All charts of what was measured, in the order of the page, those of inner workings last."""

import statistics
from collections.abc import Sequence

from sinkgd.lab.report.analysis import Analysis
from sinkgd.lab.report.bar_charts import bar_charts
from sinkgd.lab.report.charts import Chart, Figure, axis, layout
from sinkgd.lab.report.curves import Curve, finite
from sinkgd.lab.report.identity import Identities, Identity
from sinkgd.lab.report.loss_charts import loss_chart
from sinkgd.lab.report.summary import RecipeSummary
from sinkgd.lab.results import Run

_MEAN = "/mean"  # over heads and blocks; the rest of a record is for who reads it himself
_HEIGHT = 300


def inner_charts(analysis: Analysis, identities: Identities) -> list[Chart]:
    """Draw the mean of every figure against tokens; none where no model has any.

    Args:
        analysis: Of the runs.
        identities: Looks of the recipes, by name.
    """
    names = dict.fromkeys(
        name.removesuffix(_MEAN)
        for run in analysis.runs
        for record in run.statistics
        for name in record.values
        if name.endswith(_MEAN)
    )
    return [_chart(name, analysis, identities) for name in names]


def figure_curve(runs: Sequence[Run], name: str) -> Curve:
    """Return the mean of a figure over runs, at the steps that all of them have.

    Args:
        runs: Of one recipe.
        name: Of the figure, e.g. ``"attention_entropy"``.
    """
    rows: dict[int, list[float]] = {}
    for run in runs:
        for record in run.statistics:
            if name + _MEAN in record.values:
                tokens = record.step * run.start.tokens_per_step
                rows.setdefault(tokens, []).append(record.values[name + _MEAN])
    shared = [(x, values) for x, values in sorted(rows.items()) if len(values) == len(runs)]
    return Curve(tuple(x for x, _ in shared), tuple(finite(statistics.fmean(y)) for _, y in shared))


def _chart(name: str, analysis: Analysis, identities: Identities) -> Chart:
    title = name.replace("_", " ").capitalize()
    traces, ends = [], []
    for recipe in analysis.recipes:
        runs = recipe.finished or recipe.runs
        identity = identities[recipe.name]
        traces += [_line(figure_curve([run], name), recipe, identity, thin=True) for run in runs]
        mean = figure_curve(runs, name)
        traces.append(_line(mean, recipe, identity, thin=False))
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
                _HEIGHT,
                xaxis=axis("training tokens", rangemode="tozero", tickformat="~s"),
                yaxis=axis(""),
                hovermode="closest",
            ),
        },
    )


def _line(curve: Curve, recipe: RecipeSummary, identity: Identity, *, thin: bool) -> Figure:
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


def measured_charts(analysis: Analysis, identities: Identities) -> list[Chart]:
    """Draw losses, bars, and the inner workings of models that have any."""
    return [
        loss_chart(analysis, identities, "tokens"),
        loss_chart(analysis, identities, "seconds"),
        *bar_charts(analysis, identities),
        *inner_charts(analysis, identities),
    ]
