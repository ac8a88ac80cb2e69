"""How a recipe is recognized: one color, one marker and one label, everywhere on the page.

Colors are named by role (``"@series-1"``); `page.css` gives each role a value for light and dark,
and `page.js` puts it in when a chart is drawn.
"""

import html
from dataclasses import dataclass

from sinkgd.lab.report.analysis import Analysis

_SERIES = 8  # colors in page.css beside the baseline's gray, series-0
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "cross", "star", "hexagon")
_LONGEST_LABEL = 22


@dataclass(frozen=True)
class Identity:
    """The looks of a recipe."""

    series: int  # 0 is the baseline's neutral gray
    symbol: str  # of plotly's markers
    label: str  # the name cut to fit an axis, escaped: plotly reads its texts as HTML

    @property
    def color(self) -> str:
        """The role of the color."""
        return f"@series-{self.series}"


def identify(analysis: Analysis) -> dict[str, Identity]:
    """Give every recipe its looks; with more than eight candidates the colors repeat, markers last.

    Returns:
        Identities by recipe name, in the order of ``analysis.recipes``.
    """
    identities = {}
    if analysis.baseline is not None:
        name = analysis.baseline.name
        identities[name] = Identity(0, _SYMBOLS[0], plotly_label(name))
    for i, recipe in enumerate(analysis.candidates):
        symbol = _SYMBOLS[(i + 1 + i // _SERIES) % len(_SYMBOLS)]
        identities[recipe.name] = Identity(i % _SERIES + 1, symbol, plotly_label(recipe.name))
    return identities


def plotly_label(name: str) -> str:
    """Cut a name to fit an axis and escape it.

    >>> plotly_label("<b>adamw</b> with a long name")
    '&lt;b&gt;adamw&lt;/b&gt; with a l…'
    """
    short = name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…"
    return html.escape(short)
