"""Charts of every study: final losses along its axis or by arm, and the grids behind them.

Studies that draw charts of their own find whiskers, dots and rows of arms here.
"""

import html
import math
from collections.abc import Sequence
from typing import Any

from sinkgd.lab.experiments.arms import Point, point_words
from sinkgd.lab.experiments.study import Axis
from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.report.figures import (
    Chart,
    Figure,
    Identities,
    Identity,
    axis,
    dotted_line,
    error_bars,
    layout,
    row_height,
    row_words,
    rows_axis,
)
from sinkgd.lab.report.quantities import loss

_ROW = 54  # CSS pixels
_BELOW = 0.16  # how far a row's marks lie below its middle, as a fraction of its height


def final_chart(results: StudyResults, study_axis: Axis | None, identities: Identities) -> Chart:
    """Draw the final losses: along the study's axis if there is one, else one row per arm.

    Arms with a diverged seed are left out.
    """
    arms = [one for one in results.ranked if one.seeds and not one.diverged]
    figure = _along_axis(arms, study_axis, identities) if study_axis else _by_arm(arms, identities)
    by = study_axis.title if study_axis else "arm"
    words = [f"{one.arm.name} {loss(one.loss)}" for one in arms if one.loss is not None]
    lost = [one.arm.name for one in results.ranked if one.diverged]
    absent = f" Not shown, because a seed diverged: {', '.join(lost)}." if lost else ""
    return Chart(
        key="final",
        title=f"Final loss by {by}",
        caption="Validation loss at the end, nats per token: every seed, and the mean and range of "
        f"the seeds. Lower is better.{absent}",
        description=f"Final losses: {', '.join(words) or 'none yet'}.",
        figure=figure,
        share=1,
    )


def _along_axis(arms: Sequence[ArmResults], study_axis: Axis, identities: Identities) -> Figure:
    """Draw a line for each series of arms on the axis; other arms are horizontal lines."""
    lines: dict[str, list[ArmResults]] = {}
    for one in arms:
        if one.arm.value is not None:
            series = one.arm.series or one.arm.recipe
            lines.setdefault(series, []).append(one)
    data = [trace for recipe, line in lines.items() for trace in _line(recipe, line, identities)]
    levels = [one for one in arms if one.arm.value is None and one.loss is not None]
    values = sorted({one.arm.value for one in arms if one.arm.value is not None})
    options: dict[str, Any] = {"tickvals": values, "ticktext": [f"{v:g}" for v in values]}
    if study_axis.log and values:
        ends = math.log10(values[0]), math.log10(values[-1])
        options |= {"type": "log", "range": [ends[0] - 0.12, ends[1] + 0.12]}
    return {
        "data": data,
        "layout": layout(
            440,
            xaxis=axis(study_axis.title, **options),
            yaxis=axis("nats per token"),
            shapes=[
                dotted_line(one.loss, color=identities[one.arm.name].color, width=1.6)
                for one in levels
            ],
            annotations=[_level_label(one, identities, i) for i, one in enumerate(levels)],
            hovermode="closest",
        ),
    }


def _line(recipe: str, line: Sequence[ArmResults], identities: Identities) -> list[Figure]:
    look = identities[line[0].arm.name]  # the best arm's, because other arms may be gray
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
        seed_dots([x for x, _ in seeds], [y for _, y in seeds], look),
    ]


def seed_dots(x: Sequence[float | None], y: Sequence[float], look: Identity) -> Figure:
    """Make a small dot for each seed."""
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
    """Make error bars of means, each from the lowest to the highest value of its seeds."""
    pairs = [(mean or 0.0, low, high) for mean, (low, high) in zip(means, spread, strict=True)]
    above = [high - mean for mean, _, high in pairs]
    below = [mean - low for mean, low, _ in pairs]
    return error_bars(above, below, look.color)


def _level_label(one: ArmResults, identities: Identities, place: int) -> Figure:
    """Label a horizontal line, alternately at the left and at the right end."""
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
    rows: Sequence[tuple[str, Sequence[float], str]], value_axis: Figure, identities: Identities
) -> Figure:
    """Draw one row per arm: every seed, and the mean and range of the seeds.

    Args:
        rows: For each arm its name, the values of its seeds, and the words above these.
        value_axis: The axis of the values.
        identities: Colors and markers of the arms.
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
            xaxis=value_axis,
            yaxis=rows_axis(len(rows)),
            dragmode=False,
            annotations=annotations,
        ),
    }


def _seeds_and_mean(y: float, values: Sequence[float], look: Identity) -> list[Figure]:
    mean = sum(values) / len(values)
    return [
        seed_dots(values, [y] * len(values), look),
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
    """Draw every finite loss of the grids, one row per arm; None if there is none."""
    arms = [one for one in results.ranked if one.chosen is not None]
    if not arms:
        return None
    data = [_grid_row(row, one, identities[one.arm.name]) for row, one in enumerate(arms)]
    words = [(identities[one.arm.name].label, point_words(_searched(one))) for one in arms]
    annotations = [row_words(*pair, i) for i, pair in enumerate(words)]
    return Chart(
        key="grids",
        title="Grids",
        caption="Final loss of every point that was tried, one run each, with a seed that no "
        "reported run has. The large mark is the chosen point, whose values are given. Diverged "
        "points are only in the table.",
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
    """Return the chosen values of the fields with more than one value in the grid."""
    chosen, tuned = one.chosen or {}, one.tried
    return {name: chosen[name] for name in tuned if name in chosen and len(tuned[name]) > 1}


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
