"""Charts of measurements and of plans, and the page that shows them with their tables.

The charts are dots on a logarithmic axis, stacked bars, and lines. The name of a row is above its
marks, so that it fits on a phone. A page is one HTML file that loads nothing from the network.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sinkgd.lab.report.console import TextTable
from sinkgd.lab.report.figures import (
    Chart,
    Figure,
    axis,
    layout,
    row_height,
    row_words,
    rows_axis,
)
from sinkgd.lab.report.shell import render

_TEMPLATE = Path(__file__).parent / "measurement.html"
_ROW = 54  # CSS pixels
_MARKS = 0.16  # how far the marks lie below a row's middle, as a fraction of its height
_WORDS = 0.12  # how far the words are above a row's middle, as a fraction of its height
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "cross", "star", "hexagon")
_COLORS = 8  # number of colors in page.css besides gray
_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


@dataclass(frozen=True)
class PageContent:
    """What the page of one measurement or plan shows."""

    headline: str
    footer: str
    charts: Sequence[Chart]
    tables: Sequence[TextTable]  # below the charts
    first: Sequence[TextTable] = ()  # above the charts
    details: Sequence[TextTable] = ()  # collapsed at first
    answers: Sequence[str] = ()  # sentences below the headline
    cautions: Sequence[str] = ()


def measurement_page(
    content: PageContent, *, title: str, environment: TextTable, command: str
) -> str:
    """Make the page's HTML.

    Args:
        content: The content of the page.
        title: Title of the document.
        environment: The machine that was measured, or the assumptions of a plan.
        command: A command that makes the page again.
    """
    return render(
        _TEMPLATE,
        title=title,
        charts=content.charts,
        filters={},
        content=content,
        environment=environment,
        command=command,
    )


def environment_table(environment: Mapping[str, Any]) -> TextTable:
    """Make the table of the versions and the hardware that a measurement ran on."""
    rows = tuple((name, str(value)) for name, value in environment.items())
    return TextTable("Environment", "", ("what", "value"), rows)


class HasQuartiles(Protocol):
    """A median with its quartiles."""

    @property
    def lower(self) -> float: ...  # noqa: D102
    @property
    def median(self) -> float: ...  # noqa: D102
    @property
    def upper(self) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class Series:
    """Marks of one color."""

    name: str
    color: int  # index of the series' color and symbol, the same in every chart
    points: Mapping[int, HasQuartiles]  # keys are rows
    floors: Mapping[int, float] = field(default_factory=dict)  # lower bounds; keys are rows


def dots(rows: Sequence[str], series: Sequence[Series], *, unit: str, one: str) -> Figure:
    """Draw medians as dots, quartiles as whiskers and floors as strokes, on a logarithmic axis.

    Args:
        rows: Names of the rows, from the top.
        series: Marks, one series per color.
        unit: Unit of the axis.
        one: Label of the line at 1.
    """
    spreads = [spread for one_series in series for spread in one_series.points.values()]
    values = [end for spread in spreads for end in (spread.lower, spread.upper)]
    values += [floor for one_series in series for floor in one_series.floors.values()]
    low, high = min(*values, 0.8), max(*values, 1.25)
    data = [*map(_marks, series), *(_strokes(s) for s in series if s.floors)]
    return {
        "data": data,
        "layout": layout(
            150 + _ROW * len(rows) + 22 * (len(series) // 3),
            xaxis=_log_axis(unit, low / 1.15, high * 1.15),
            yaxis=rows_axis(len(rows)),
            margin={"l": 8, "r": 12, "t": 26, "b": 8},
            dragmode=False,
            annotations=[
                *(row_words(html.escape(r), "", i - _WORDS) for i, r in enumerate(rows)),
                _label_of_one(one),
            ],
            shapes=[_line_at_one()],
        ),
    }


def stacked_bars(
    rows: Sequence[str],
    words: Sequence[str],
    parts: Sequence[tuple[str, float, Sequence[float]]],
    *,
    unit: str = "× the parameters",
) -> Figure:
    """Draw one bar per row, divided into parts.

    Args:
        rows: Names of the rows, from the top.
        words: Text beside each name.
        parts: For each part its name, the strength of its color, and one length per row.
        unit: Unit of the lengths.
    """
    longest = max((sum(lengths) for lengths in zip(*(p[2] for p in parts), strict=True)), default=1)
    annotations = [
        row_words(html.escape(row), word, i - _WORDS)
        for i, (row, word) in enumerate(zip(rows, words, strict=True))
    ]
    return {
        "data": [
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "x": list(lengths),
                "y": [i + _MARKS for i in range(len(rows))],
                "width": 0.4,
                "marker": {"color": f"@series-1:{strength}"},
                "hoverinfo": "skip",
            }
            for name, strength, lengths in parts
        ],
        "layout": layout(
            120 + row_height(_ROW, annotations) * len(rows),
            xaxis=axis(unit, range=[0, 1.03 * (longest or 1)], fixedrange=True),
            yaxis=rows_axis(len(rows)),
            barmode="stack",
            dragmode=False,
            annotations=annotations,
        ),
    }


def lines(
    places: Sequence[float], series: Sequence[tuple[str, Sequence[float]]], *, x: str, y: str
) -> Figure:
    """Draw one line per series over a logarithmic axis, with a tick at each position."""
    return {
        "data": [
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": html.escape(name),
                "x": list(places),
                "y": list(values),
                "line": {"color": _color(i), "width": 2},
                "marker": {"color": _color(i), "symbol": _SYMBOLS[i % len(_SYMBOLS)], "size": 8},
                "hovertemplate": f"{html.escape(name)}: %{{y:.0%}}<extra></extra>",
            }
            for i, (name, values) in enumerate(series)
        ],
        "layout": layout(
            430 + 22 * (len(series) // 2),
            xaxis=axis(x, type="log", tickvals=list(places), ticktext=[f"{p:g}" for p in places]),
            yaxis=axis(y, rangemode="tozero", tickformat=".0%"),
        ),
    }


def _color(place: int) -> str:
    return f"@series-{place % _COLORS + 1}"


def _marks(series: Series) -> Figure:
    color, spreads = _color(series.color), series.points.values()
    return {
        "type": "scatter",
        "mode": "markers",
        "name": html.escape(series.name),
        "x": [spread.median for spread in spreads],
        "y": [row + _MARKS for row in series.points],
        "marker": {
            "color": color,
            "size": 11,
            "symbol": _SYMBOLS[series.color % len(_SYMBOLS)],
        },
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [spread.upper - spread.median for spread in spreads],
            "arrayminus": [spread.median - spread.lower for spread in spreads],
            "color": color,
            "thickness": 1.4,
            "width": 4,
        },
        "hovertemplate": f"{html.escape(series.name)}: %{{x:.3g}}<extra></extra>",
    }


def _strokes(series: Series) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(series.floors.values()),
        "y": [row + _MARKS for row in series.floors],
        "marker": {
            "symbol": "line-ns",
            "size": 17,
            "line": {"color": _color(series.color), "width": 2.5},
        },
        "showlegend": False,
        "hovertemplate": f"{html.escape(series.name)}, floor: %{{x:.3g}}<extra></extra>",
    }


def _log_axis(title: str, low: float, high: float) -> Figure:
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    if len(ticks) > 7:  # more do not fit on a phone
        ticks = [tick for tick in ticks if f"{tick:e}"[0] == "1"]
    return axis(
        title,
        type="log",
        range=[math.log10(low), math.log10(high)],
        fixedrange=True,
        tickvals=ticks,
        ticktext=[f"{tick:g}" for tick in ticks],
    )


def _line_at_one() -> Figure:
    return {
        "type": "line",
        "xref": "x",
        "x0": 1,
        "x1": 1,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "layer": "below",
        "line": {"color": "@soft", "width": 1.5, "dash": "dot"},
    }


def _label_of_one(text: str) -> Figure:
    return {
        "text": html.escape(text),
        "x": 0,  # the logarithm of 1
        "xanchor": "left",
        "xshift": 4,
        "yref": "paper",
        "y": 1,
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"color": "@soft", "size": 12},
    }
