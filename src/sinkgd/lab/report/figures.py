"""Elements that charts share: figures as plain data, axes, rows with words, colors and markers.

Figures are dicts in plotly.js's format. The value of a key that ends in ``color`` may be the name
of a role, such as ``"@ink"``, or a tint of a role over the card, such as ``"@ink:0.4"``. `page.css`
gives each role a color for light and dark, and `page.js` inserts the color when it draws a chart.

A recipe has one color, one marker and one label everywhere on a page: its `Identity`.
"""

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sinkgd.lab.report.analysis import Analysis, RecipeSummary

Figure = dict[str, Any]

SOFT = 0.38  # strength of the color of parts of a bar that are only context
CLEAR = "rgba(0,0,0,0)"
_LETTERS = 36  # number of letters that fit in a row on a phone
_SECOND_LINE = 24  # CSS pixels that are added to each row if a row has a second line of words


@dataclass(frozen=True)
class Chart:
    """A figure with its title and texts."""

    key: str  # the id of its HTML element
    title: str
    caption: str  # what the marks mean, in a few sentences
    description: str  # the content in words, for readers who cannot see the chart
    figure: Figure
    share: int = 2  # number of charts of this width that share a row on a wide screen


def axis(title: str = "", **options: Any) -> Figure:
    """Make an axis in the page's style."""
    return {
        "title": {"text": title, "standoff": 10, "font": {"size": 12.5, "color": "@soft"}},
        "gridcolor": "@rule",
        "linecolor": "@rule",
        "tickfont": {"color": "@soft", "size": 12},
        "zeroline": False,
        "automargin": True,
        "nticks": 7,
        **options,
    }


def layout(height: int, **options: Any) -> Figure:
    """Make a layout in the page's style: transparent, legend below.

    Args:
        height: Height in CSS pixels; the chart is as wide as its HTML element.
        options: Options of plotly's layout that override the defaults.
    """
    return {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "font": {"color": "@ink", "size": 13},
        "hoverlabel": {
            "bgcolor": "@card",
            "bordercolor": "@rule",
            "font": {"color": "@ink", "size": 13},
            "align": "left",
        },
        "legend": {
            "orientation": "h",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "x": 0,
            "traceorder": "normal",
            "font": {"color": "@ink", "size": 13},
            "bgcolor": CLEAR,
        },
        "uirevision": "keep",  # a change of theme keeps the zoom
        **options,
    }


def error_bars(above: Sequence[float], below: Sequence[float], color: str) -> Figure:
    """Make error bars of marks.

    Args:
        above: Length of each bar above its mark, or to the right of it.
        below: Length of each bar below its mark, or to the left of it.
        color: Role of the bars' color.
    """
    return {
        "type": "data",
        "symmetric": False,
        "array": list(above),
        "arrayminus": list(below),
        "color": color,
        "thickness": 1.4,
        "width": 5,
    }


def dotted_line(y: float | None, *, color: str, width: float) -> Figure:
    """Make a horizontal dotted line across the chart."""
    line = {"color": color, "width": width, "dash": "dot"}
    ends = {"x0": 0, "x1": 1, "y0": y, "y1": y}
    return {"type": "line", "xref": "paper", **ends, "line": line, "layer": "below"}


def rows_axis(rows: int) -> Figure:
    """Make an invisible axis with rows 0, 1, ... from the top; `row_words` shows their names."""
    return axis(range=[rows - 0.5, -0.5], fixedrange=True, visible=False)


def row_words(name: str, words: str, y: float) -> Figure:
    """Make the words above the marks of a row, in two lines if one line is too long for a phone.

    Args:
        name: The row's name, shown in bold; plotly reads it as HTML, so it must be escaped.
        words: The words after the name, which must also be escaped; may be empty.
        y: Position of the lower edge of the words, on `rows_axis`.
    """
    between = "<br>" if len(name) + len(words) > _LETTERS else "  "
    text = f"<b>{name}</b>{between if words else ''}{words}"
    return {
        "text": text,
        "xref": "paper",
        "x": 0,
        "xanchor": "left",
        "xshift": -3,
        "y": y,
        "yanchor": "bottom",
        "showarrow": False,
        "align": "left",
        "bgcolor": "@card",
        "borderpad": 0,
        "font": {"color": "@ink", "size": 13.5},
    }


def row_height(height: int, words: Sequence[Figure]) -> int:
    """Return the height of each row in CSS pixels.

    Args:
        height: The height if the words of every row fit in one line.
        words: The results of `row_words`.
    """
    return height + _SECOND_LINE * any("<br>" in one["text"] for one in words)


_SERIES = 8  # number of colors in page.css; series-0 is the baseline's gray
_OTHERS = 9  # series-9 is the paler gray of all recipes that have no color of their own
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "cross", "star", "hexagon")
_GRAY_SYMBOLS = (*_SYMBOLS, *(f"{symbol}-open" for symbol in _SYMBOLS))
_LONGEST_LABEL = 22


@dataclass(frozen=True)
class Identity:
    """Color, marker and label of a recipe."""

    series: int  # number of its color; 0: the baseline's gray, 9: the gray of the other recipes
    symbol: str  # name of a plotly marker
    label: str  # the name, shortened to fit an axis, and escaped, since plotly reads HTML

    @property
    def color(self) -> str:
        """The role of the color."""
        return f"@series-{self.series}"


Identities = Mapping[str, Identity]  # keys are recipes, or arms of a study


def identify(analysis: Analysis, others: Sequence[str] = ()) -> dict[str, Identity]:
    """Assign colors and markers: the eight best candidates get a color each, the others are gray.

    No two of up to 25 recipes, including a baseline, look alike.

    Args:
        analysis: The recipes.
        others: Names without a finished run, which are gray, too.

    Returns:
        Identities by recipe name, in the order of ``analysis.recipes``.
    """
    identities = {}
    if analysis.baseline is not None:
        name = analysis.baseline.name
        identities[name] = Identity(0, _SYMBOLS[0], plotly_label(name))
    best = {one.name for one in sorted(analysis.candidates, key=_final_loss)[:_SERIES]}
    colors, grays = itertools.count(1), itertools.cycle(_GRAY_SYMBOLS)
    named = dict.fromkeys([*(recipe.name for recipe in analysis.candidates), *others])
    for name in named:
        if name in identities:
            continue
        if name in best:
            series = next(colors)
            symbol = _SYMBOLS[series % len(_SYMBOLS)]
        else:
            series, symbol = _OTHERS, next(grays)
        identities[name] = Identity(series, symbol, plotly_label(name))
    return identities


def _final_loss(recipe: RecipeSummary) -> float:
    loss = recipe.val_loss.mean if recipe.val_loss else math.inf
    return loss if math.isfinite(loss) else math.inf


def plotly_label(name: str) -> str:
    """Shorten a name to fit an axis, and escape it.

    >>> plotly_label("<b>adamw</b> with a long name")
    '&lt;b&gt;adamw&lt;/b&gt; with a l…'
    """
    short = name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…"
    return html.escape(short)
