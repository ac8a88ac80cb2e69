"""The charts of a study: final losses along its axis or by arm, and the grids behind them."""

import html
import math
from collections.abc import Sequence
from typing import Any

from sinkgd.lab.experiments.results import ArmResults, StudyResults
from sinkgd.lab.experiments.study import Axis, Point, point_words
from sinkgd.lab.report.charts import Chart, Figure, axis, layout, row_height, row_words, rows_axis
from sinkgd.lab.report.identity import Identity
from sinkgd.lab.report.quantities import loss

Identities = dict[str, Identity]

_ROW = 54  # CSS pixels
_BELOW = 0.16  # of a row: how far its marks lie below its middle


def final_chart(results: StudyResults, along: Axis | None, identities: Identities) -> Chart:
    """Draw the final losses: along the study's axis where it has one, else an arm a row."""
    arms = [one for one in results.ranked if one.seeds and not one.diverged]
    figure = _along(arms, along, identities) if along else _by_arm(arms, identities)
    where = along.title if along else "arm"
    words = [f"{one.arm.name} {loss(one.loss)}" for one in arms if one.loss is not None]
    return Chart(
        key="final",
        title=f"Final loss by {where}",
        caption="Validation loss at the end, nats per token: every seed, and their mean with its "
        "range. Lower is better.",
        description=f"Final losses: {', '.join(words) or 'none yet'}.",
        figure=figure,
        share=1,
    )


def _along(arms: Sequence[ArmResults], along: Axis, identities: Identities) -> Figure:
    """Join arms of one series that have a place on the axis; the others are level lines."""
    lines: dict[str, list[ArmResults]] = {}
    for one in arms:
        if one.arm.value is not None:
            series = one.arm.series or one.arm.recipe
            lines.setdefault(series, []).append(one)
    data = [trace for recipe, line in lines.items() for trace in _line(recipe, line, identities)]
    levels = [one for one in arms if one.arm.value is None and one.loss is not None]
    values = sorted({one.arm.value for line in lines.values() for one in line if one.arm.value})
    options: dict[str, Any] = {"tickvals": values, "ticktext": [f"{v:g}" for v in values]}
    if along.log and values:
        ends = math.log10(values[0]), math.log10(values[-1])
        options |= {"type": "log", "range": [ends[0] - 0.12, ends[1] + 0.12]}
    return {
        "data": data,
        "layout": layout(
            440,
            xaxis=axis(along.title, **options),
            yaxis=axis("nats per token"),
            shapes=[_level(one, identities) for one in levels],
            annotations=[_level_words(one, identities, i) for i, one in enumerate(levels)],
            hovermode="closest",
        ),
    }


def _line(recipe: str, line: Sequence[ArmResults], identities: Identities) -> list[Figure]:
    look = identities[line[0].arm.name]  # its best arm's: the others may be gray
    line = sorted(line, key=lambda one: one.arm.value or 0.0)
    means = [one.loss for one in line]
    seeds = [(one.arm.value, value) for one in line for value in one.losses.values()]
    spread = [(min(one.losses.values()), max(one.losses.values())) for one in line]
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": html.escape(recipe),
            "x": [one.arm.value for one in line],
            "y": means,
            "line": {"color": look.color, "width": 2.4},
            "marker": {"color": look.color, "symbol": look.symbol, "size": 10},
            "error_y": whiskers(means, spread, look),
            "hovertext": [f"{html.escape(one.arm.name)}<br>{loss(one.loss or 0)}" for one in line],
            "hoverinfo": "text",
        },
        _dots([x for x, _ in seeds], [y for _, y in seeds], look),
    ]


def _dots(x: Sequence[float | None], y: Sequence[float], look: Identity) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(x),
        "y": list(y),
        "marker": {"color": look.color, "size": 6, "opacity": 0.5},
        "showlegend": False,
        "hoverinfo": "skip",
    }


def whiskers(
    means: Sequence[float | None], spread: Sequence[tuple[float, float]], look: Identity
) -> Figure:
    """Make the error bars of means, from the lowest to the highest of each one's seeds."""
    pairs = [(mean or 0.0, low, high) for mean, (low, high) in zip(means, spread, strict=True)]
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - mean for mean, _, high in pairs],
        "arrayminus": [mean - low for mean, low, _ in pairs],
        "color": look.color,
        "thickness": 1.4,
        "width": 5,
    }


def _level(one: ArmResults, identities: Identities) -> Figure:
    line = {"color": identities[one.arm.name].color, "width": 1.6, "dash": "dot"}
    ends = {"x0": 0, "x1": 1, "y0": one.loss, "y1": one.loss}
    return {"type": "line", "xref": "paper", **ends, "line": line, "layer": "below"}


def _level_words(one: ArmResults, identities: Identities, place: int) -> Figure:
    """Write beside a level line, at the left and at the right in turn."""
    right = place % 2 == 1
    return {
        "text": f"{identities[one.arm.name].label} {loss(one.loss or 0)}",
        "xref": "paper",
        "x": 1 if right else 0,
        "xanchor": "right" if right else "left",
        "y": one.loss,
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"color": "@soft", "size": 12.5},
    }


def _by_arm(arms: Sequence[ArmResults], identities: Identities) -> Figure:
    rows = [(one.arm.name, list(one.losses.values()), loss(one.loss or 0)) for one in arms]
    return rows_figure(rows, axis("nats per token", fixedrange=True), identities)


def rows_figure(
    rows: Sequence[tuple[str, Sequence[float], str]], along: Figure, identities: Identities
) -> Figure:
    """Draw an arm a row: every seed, and their mean with its range.

    Args:
        rows: Names of arms, a value a seed that has one, and words that stand above.
        along: The axis of the values.
        identities: How arms are recognized.
    """
    data = []
    for row, (name, values, _) in enumerate(rows):
        if values:
            data += _seeds_and_mean(row + _BELOW, values, identities[name])
    annotations = [
        row_words(identities[name].label, words, i) for i, (name, _, words) in enumerate(rows)
    ]
    return {
        "data": data,
        "layout": layout(
            110 + row_height(_ROW, annotations) * len(rows),
            xaxis=along,
            yaxis=rows_axis(len(rows)),
            dragmode=False,
            annotations=annotations,
        ),
    }


def _seeds_and_mean(y: float, values: Sequence[float], look: Identity) -> list[Figure]:
    mean = sum(values) / len(values)
    return [
        _dots(values, [y] * len(values), look),
        {
            "type": "scatter",
            "mode": "markers",
            "x": [mean],
            "y": [y],
            "marker": {"color": look.color, "symbol": look.symbol, "size": 11},
            "error_x": whiskers([mean], [(min(values), max(values))], look),
            "showlegend": False,
            "hovertemplate": f"{look.label}: %{{x:.4~g}}<extra></extra>",
        },
    ]


def grid_chart(results: StudyResults, identities: Identities) -> Chart | None:
    """Draw every tuned point, an arm a row; None where nothing was tuned."""
    arms = [one for one in results.ranked if one.chosen is not None]
    if not arms:
        return None
    data = [_grid_row(row, one, identities[one.arm.name]) for row, one in enumerate(arms)]
    words = [(identities[one.arm.name].label, point_words(_searched(one))) for one in arms]
    annotations = [row_words(*pair, i) for i, pair in enumerate(words)]
    return Chart(
        key="grids",
        title="The grids",
        caption="Final loss of every point that was tried, one run each, with a seed that no "
        "reported run has. The large mark is the point that was chosen, whose values are named. "
        "Diverged points are in the table.",
        description=f"{len(arms)} grids; {'; '.join(': '.join(pair) for pair in words)}.",
        figure={
            "data": data,
            "layout": layout(
                110 + row_height(_ROW, annotations) * len(arms),
                xaxis=axis("nats per token", fixedrange=True),
                yaxis=rows_axis(len(arms)),
                dragmode=False,
                annotations=annotations,
            ),
        },
        share=1,
    )


def _searched(one: ArmResults) -> Point:
    """Return the chosen values of what was tried at more than one."""
    chosen = one.chosen or {}
    return {name: value for name, value in chosen.items() if len(one.arm.tuned[name]) > 1}


def _grid_row(row: int, one: ArmResults, look: Identity) -> Figure:
    finite = [result for result in one.grid if math.isfinite(result.loss)]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [result.loss for result in finite],
        "y": [row + _BELOW] * len(finite),
        "marker": {
            "color": look.color,
            "symbol": look.symbol,
            "size": [12 if result.point == one.chosen else 7 for result in finite],
        },
        "showlegend": False,
        "hovertext": [
            f"{html.escape(point_words(result.point))}<br>{loss(result.loss)}" for result in finite
        ],
        "hoverinfo": "text",
    }
