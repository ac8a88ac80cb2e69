"""Charts of published perplexity against memory, one per model size, with labeled points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from sinkgd.lab.report.figures import Chart, Figure, axis, layout
from sinkgd.lab.report.published import ROWS, SIZES, Row, Size, State, memory_gib

_HEIGHT = 340  # CSS pixels
_INSIDE = 262  # CSS pixels between the ends of the y axis
_LINE = 16  # CSS pixels of a label's line
_LABELS = {
    "adam-sinkgd": "Adam",
    "adam-galore": "Adam, cited",
    "adam-tuned": "Adam, tuned",
}
# Adam has the baseline's gray, SinkGD the first color; the others are context.
_COLORS = {"adam": "@series-0", "sinkgd": "@series-1"}

Side = Literal["left", "right", "above", "below"]


@dataclass(frozen=True)
class _Point:
    label: str
    color: str
    memory: float  # GiB
    perplexity: float
    caution: str  # "about " if the perplexity was read from a plot, "at most " for an upper bound

    @property
    def words(self) -> str:
        return f"{self.label} {self.caution}{self.perplexity:g} in {self.memory:.3g} GiB"


def memory_charts() -> tuple[Chart, ...]:
    """Draw one chart per size, of the methods whose memory the C4 benchmark's formula gives."""
    return tuple(_chart(size, column) for column, size in enumerate(SIZES))


def _chart(size: Size, column: int) -> Chart:
    groups = _groups(size, column)
    points = [point for group in groups for point in group]
    low, high = min(p.perplexity for p in points), max(p.perplexity for p in points)
    margin = 0.09 * math.log10(high / low)
    view = (math.log10(low) - 1.7 * margin, math.log10(high) + margin)
    memories = [group[0].memory for group in groups]
    return Chart(
        key=f"published-{size.preset}",
        title=f"{size.name}, published",
        caption="Perplexity against GiB of weights and state. Lower left is better.",
        description="; ".join(point.words for point in points),
        figure={
            "data": [_marks(points)],
            "layout": layout(
                _HEIGHT,
                xaxis=axis(
                    "GiB, weights and state",
                    type="log",
                    range=[math.log10(memories[0] / 1.17), math.log10(memories[-1] * 1.75)],
                    tickvals=_apart(memories),
                    ticktext=[f"{value:.2f}" for value in _apart(memories)],
                    tickangle=0,
                    fixedrange=True,
                ),
                yaxis=axis(
                    "perplexity",
                    type="log",
                    range=list(view),
                    fixedrange=True,
                    **_ticks(low, high),
                ),
                dragmode=False,
                annotations=_names(groups, view),
            ),
        },
    )


def _groups(size: Size, column: int) -> list[list[_Point]]:
    """Group points by memory, smallest first; within a group, the highest perplexity is first."""
    groups: dict[State, list[_Point]] = {}
    for row in ROWS:
        if row.state is not None and row.values[column] is not None:
            groups.setdefault(row.state, []).append(_point(row, size, column))
    for group in groups.values():
        group.sort(key=lambda point: -point.perplexity)
    return sorted(groups.values(), key=lambda group: group[0].memory)


def _point(row: Row, size: Size, column: int) -> _Point:
    value, state = row.values[column], row.state
    assert value is not None
    assert state is not None
    return _Point(
        _LABELS.get(row.key, row.method),
        _COLORS.get(row.key.partition("-")[0], "@soft"),
        memory_gib(size, state),
        value.perplexity,
        "at most " if value.at_most else "about " if value.from_plot else "",
    )


def _marks(points: Sequence[_Point]) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [point.memory for point in points],
        "y": [point.perplexity for point in points],
        "hovertext": [point.words for point in points],
        "hoverinfo": "text",
        "showlegend": False,
        "marker": {
            "size": [12 if point.color == "@series-1" else 9 for point in points],
            "color": [point.color for point in points],
            "symbol": ["circle-open" if point.caution else "circle" for point in points],
            "line": {"width": 2, "color": [point.color for point in points]},
        },
    }


def _names(groups: Sequence[Sequence[_Point]], view: tuple[float, float]) -> list[Figure]:
    """Label every point, on the side where its group has room."""
    gaps = [math.log(after[0].memory / before[0].memory) for before, after in pairwise(groups)]
    names = []
    for place, group in enumerate(groups):
        side: Side = "right"
        if place == 0:
            side = "below"
        elif place < len(groups) - 1:
            side = "left" if gaps[place - 1] > gaps[place] else "right"
            side = "above" if len(group) == 1 else side
        heights = [_pixels(point, view) for point in group]
        for point, height, at in zip(group, heights, spread_out(heights, _LINE), strict=True):
            names.append(_name(point, at - height, side))
    return names


def _pixels(point: _Point, view: tuple[float, float]) -> float:
    """Return the distance of a point below the upper end of the axis, in CSS pixels."""
    return _INSIDE * (view[1] - math.log10(point.perplexity)) / (view[1] - view[0])


def spread_out(places: Sequence[float], least: float) -> list[float]:
    """Move sorted positions apart, to at least the distance ``least``; clusters keep their means.

    >>> spread_out([0, 4, 100], 10)
    [-3.0, 7.0, 100.0]
    """
    clusters: list[list[float]] = []
    for place in places:
        clusters.append([place])
        while len(clusters) > 1 and _start(clusters[-1], least) < (
            _start(clusters[-2], least) + least * len(clusters[-2])
        ):
            last = clusters.pop()
            clusters[-1] += last
    return [_start(cluster, least) + least * i for cluster in clusters for i in range(len(cluster))]


def _start(cluster: Sequence[float], least: float) -> float:
    return sum(cluster) / len(cluster) - least * (len(cluster) - 1) / 2


def _name(point: _Point, moved: float, side: Side) -> Figure:
    strong = point.color == "@series-1"
    across = {"left": -8, "right": 8}.get(side, 0)
    upright = {"above": -18, "below": 19}.get(side, round(moved, 1))
    return {
        "text": f"<b>{point.label}</b>" if strong else point.label,
        # On a logarithmic axis, plotly takes the position of an annotation as a logarithm.
        "x": math.log10(point.memory),
        "y": math.log10(point.perplexity),
        "ax": across,
        "ay": upright,
        "xanchor": {"left": "right", "right": "left"}.get(side, "center"),
        "yanchor": "middle",
        "showarrow": True,
        "arrowhead": 0,
        "arrowwidth": 1,
        "arrowcolor": "@rule",
        "standoff": 6,
        "borderpad": 0,
        "font": {"size": 11, "color": point.color if strong else "@ink"},
    }


def _apart(memories: Sequence[float]) -> list[float]:
    """Leave out ticks that would touch the tick on their right on a phone.

    >>> _apart([0.14, 0.23, 0.28, 0.33])
    [0.14, 0.23, 0.33]
    """
    kept = [memories[-1]]
    for value in memories[-2::-1]:
        if kept[0] / value > 1.25:
            kept.insert(0, value)
    return kept


def _ticks(low: float, high: float) -> Figure:
    step = 1 if high - low < 4.5 else 2
    values = list(range(math.ceil(low), math.floor(high) + 1, step))
    return {"tickvals": values, "ticktext": [str(value) for value in values]}
