"""What a chart of the page is: a plotly figure as plain data, with its words around it.

Figures are dicts in plotly.js's own format. Colors are roles such as ``"@ink"`` under keys that
end in ``color``, or tints of one on the card such as ``"@ink:0.4"``; `page.js` replaces them with
the theme's values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Figure = dict[str, Any]

SOFT = 0.38  # tint of the part of a bar that is context
CLEAR = "rgba(0,0,0,0)"
_LETTERS = 36  # in a row that a phone has room for
_SECOND_LINE = 24  # CSS pixels more of every row where words of one stand in two lines


@dataclass(frozen=True)
class Chart:
    """A figure and what a reader needs to read it."""

    key: str  # the id of its element
    title: str
    caption: str  # definitions, in a line
    description: str  # what it shows, in words, for who cannot see it
    figure: Figure
    share: int = 2  # how many of its kind stand in a row on a wide screen


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
        height: In CSS pixels; the width is the page's.
        options: Of plotly's layout, over the defaults.
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


def rows_axis(rows: int) -> Figure:
    """Make an axis whose rows 0, 1, ... go down, without ticks: words stand above the marks."""
    return axis(range=[rows - 0.5, -0.5], fixedrange=True, visible=False)


def row_words(name: str, words: str, y: float) -> Figure:
    """Write words above what is drawn in a row, in two lines where a phone has no room for one.

    Args:
        name: Of the row, in bold: HTML as plotly reads it; what comes from outside is escaped.
        words: That follow it, the same; may be empty.
        y: Of the lower edge of the words, on `rows_axis`.
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
    """Return the height of each row in CSS pixels, with room for words in two lines.

    Args:
        height: Where all words stand in one line.
        words: Of `row_words`.
    """
    return height + _SECOND_LINE * any("<br>" in one["text"] for one in words)
