"""How a recipe is recognized: one color, one marker and one label, everywhere on the page.

Colors are named by role (``"@series-1"``); `page.css` gives each role a value for light and dark,
and `page.js` puts it in when a chart is drawn.
"""

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass

from sinkgd.lab.report.analysis import Analysis
from sinkgd.lab.report.summary import RecipeSummary

_SERIES = 8  # colors in page.css; series-0 is the baseline's gray
_OTHERS = 9  # the paler gray of every recipe that has no color of its own
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "cross", "star", "hexagon")
_LONGEST_LABEL = 22


@dataclass(frozen=True)
class Identity:
    """The looks of a recipe."""

    series: int  # 0 is the baseline's neutral gray, 9 that of recipes without a color
    symbol: str  # of plotly's markers
    label: str  # the name cut to fit an axis, escaped: plotly reads its texts as HTML

    @property
    def color(self) -> str:
        """The role of the color."""
        return f"@series-{self.series}"


Identities = Mapping[str, Identity]  # by recipe, or by arm of a study


def identify(analysis: Analysis) -> dict[str, Identity]:
    """Give every recipe its looks: a color of its own to the eight best candidates, gray to others.

    Returns:
        Identities by recipe name, in the order of ``analysis.recipes``.
    """
    identities = {}
    if analysis.baseline is not None:
        name = analysis.baseline.name
        identities[name] = Identity(0, _SYMBOLS[0], plotly_label(name))
    best = {one.name for one in sorted(analysis.candidates, key=_final_loss)[:_SERIES]}
    colors = iter(range(1, _SERIES + 1))
    for i, recipe in enumerate(analysis.candidates):
        symbol = _SYMBOLS[(i + 1 + i // _SERIES) % len(_SYMBOLS)]
        series = next(colors) if recipe.name in best else _OTHERS
        identities[recipe.name] = Identity(series, symbol, plotly_label(recipe.name))
    return identities


def _final_loss(recipe: RecipeSummary) -> float:
    loss = recipe.val_loss.mean if recipe.val_loss else math.inf
    return loss if math.isfinite(loss) else math.inf


def plotly_label(name: str) -> str:
    """Cut a name to fit an axis and escape it.

    >>> plotly_label("<b>adamw</b> with a long name")
    '&lt;b&gt;adamw&lt;/b&gt; with a l…'
    """
    short = name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…"
    return html.escape(short)
