"""Bar charts: tokens to reach the baseline's loss, throughput, memory, and the time of a step.

Bars have the color of their recipe; parts that are only context have a paler tint of that color.
"""

from collections.abc import Callable, Sequence
from typing import Any

from sinkgd.lab.report import quantities
from sinkgd.lab.report.analysis import Analysis, Comparison, RecipeSummary, Spread
from sinkgd.lab.report.figures import (
    SOFT,
    Chart,
    Figure,
    Identities,
    axis,
    error_bars,
    layout,
    row_height,
    row_words,
    rows_axis,
)
from sinkgd.lab.results import Memory

_REMADE = "This chart remakes a part of figure 1 of the SinkGD paper with the runs of this page."
_ROW = 66  # height in CSS pixels of a recipe's row, with its words and the bar below them
_THICKNESS = 0.46  # thickness of a bar, as a fraction of the row
_BELOW = 0.14  # distance of a bar below the row's middle, as a fraction of the row


def bar_charts(analysis: Analysis, identities: Identities) -> list[Chart]:
    """Draw the charts for which there are finished runs."""
    charts = []
    if analysis.comparisons and len(analysis.recipes) > 1:
        charts += [_tokens_to_reach(analysis, identities), _throughput(analysis, identities)]
        # These two charts are side by side, and one may have taller rows, for words in two lines.
        height = max(chart.figure["layout"]["height"] for chart in charts)
        for chart in charts:
            chart.figure["layout"]["height"] = height
    if any(recipe.memory for recipe in analysis.recipes):
        charts += [_memory(analysis, identities), _peak(analysis, identities)]
    if any(recipe.step_seconds and recipe.optimizer_share for recipe in analysis.recipes):
        charts.append(_step_time(analysis, identities))
    return charts


def _tokens_to_reach(analysis: Analysis, identities: Identities) -> Chart:
    recipes = [one for one in analysis.recipes if one.finished]
    spreads = [analysis.comparisons[one.name].token_fraction for one in recipes]
    means = [100 * spread.mean if spread else 0.0 for spread in spreads]
    words = [
        quantities.percent(spread.mean) if spread else analysis.comparisons[one.name].shortfall
        for one, spread in zip(recipes, spreads, strict=True)
    ]
    colors = [identities[recipe.name].color for recipe in recipes]
    seeds = any(spread.count > 1 for spread in spreads if spread)
    longest = max(100 * spread.high if spread else 0.0 for spread in spreads)
    return Chart(
        key="tokens-to-reach",
        title="Tokens to reach the baseline’s loss",
        caption="Tokens until the validation loss first equals the baseline’s final loss, in % of "
        "the baseline’s tokens. Shorter is better; without a bar, not all runs reached it."
        + (" Whiskers: the range over seeds. " if seeds else " ")
        + _REMADE,
        description=_describe("Tokens needed", recipes, words),
        figure={
            "data": [_bars(means, colors), _whiskers(spreads)],
            "layout": _layout(
                _length_axis("% of the baseline’s tokens", longest),
                annotations=_words(recipes, identities, words),
            ),
        },
    )


def _throughput(analysis: Analysis, identities: Identities) -> Chart:
    recipes = [one for one in analysis.recipes if one.finished]
    raw = [one.tokens_per_second.mean if one.tokens_per_second else 0.0 for one in recipes]
    comparisons = [analysis.comparisons[one.name] for one in recipes]
    spreads = [one.effective_tokens_per_second for one in comparisons]
    effective = [spread.mean if spread else 0.0 for spread in spreads]
    words = [
        f"{quantities.count(speed)} raw, {_effective_words(one)}"
        for speed, one in zip(raw, comparisons, strict=True)
    ]
    colors = [identities[recipe.name].color for recipe in recipes]
    half = _THICKNESS / 2
    return Chart(
        key="throughput",
        title="Throughput, raw and effective",
        caption="Raw: tokens per second in the median step. Effective: all tokens of the baseline, "
        "divided by the seconds that the recipe needs to reach the baseline’s final loss. "
        f"{_REMADE}",
        description=_describe("Tokens per second", recipes, words),
        figure={
            "data": [
                _bars(raw, _tinted(colors, SOFT), below=_BELOW - half / 2, thickness=half),
                _bars(effective, colors, below=_BELOW + half / 2, thickness=half),
                _legend_entry("raw", SOFT),
                _legend_entry("effective", 1.0),
            ],
            "layout": _layout(
                _length_axis("tokens per second", max(raw + effective), tickformat="~s"),
                barmode="overlay",
                annotations=_words(recipes, identities, words),
            ),
        },
    )


def _effective_words(comparison: Comparison) -> str:
    spread = comparison.effective_tokens_per_second
    if spread:
        return f"{quantities.count(spread.mean)} effective"
    return f"loss {comparison.shortfall}"


def _memory(analysis: Analysis, identities: Identities) -> Chart:
    found = [(one, one.memory) for one in analysis.recipes if one.memory]
    recipes = [recipe for recipe, _ in found]
    colors = [identities[recipe.name].color for recipe in recipes]
    parts: tuple[tuple[str, float, Callable[[Memory], int]], ...] = (
        ("weights", 0.22, lambda memory: memory.weights_bytes),
        ("gradients", 0.5, lambda memory: memory.gradients_bytes),
        ("state", 1.0, lambda memory: memory.state_bytes),
    )
    held = [sum(part(memory) for _, _, part in parts) for _, memory in found]
    unit, unit_bytes = _unit(max(held))
    words = [quantities.size(value) for value in held]
    return Chart(
        key="memory",
        title="Memory by part",
        caption=f"Without activations. State is what the optimizer keeps between steps. {_REMADE}",
        description=_describe("Weights, gradients and state", recipes, words),
        figure={
            "data": [
                *(
                    _bars([part(memory) / unit_bytes for _, memory in found], _tinted(colors, tint))
                    for _, tint, part in parts
                ),
                *(_legend_entry(name, tint) for name, tint, _ in parts),
            ],
            "layout": _layout(
                _length_axis(unit, max(held) / unit_bytes),
                barmode="stack",
                annotations=_words(recipes, identities, words),
            ),
        },
        share=3,
    )


def _peak(analysis: Analysis, identities: Identities) -> Chart:
    found = [(one, one.memory.peak_bytes) for one in analysis.recipes if one.memory]
    recipes = [recipe for recipe, _ in found]
    words = [quantities.size(peak) for _, peak in found]
    longest = max(peak for _, peak in found)
    unit, unit_bytes = _unit(longest)
    colors = [identities[recipe.name].color for recipe in recipes]
    return Chart(
        key="peak-memory",
        title="Peak memory",
        caption="The largest memory in use: of the whole process on a CPU, of the allocator on a "
        "GPU.",
        description=_describe("Peak", recipes, words),
        figure={
            "data": [_bars([peak / unit_bytes for _, peak in found], colors)],
            "layout": _layout(
                _length_axis(unit, longest / unit_bytes),
                annotations=_words(recipes, identities, words),
            ),
        },
        share=3,
    )


def _step_time(analysis: Analysis, identities: Identities) -> Chart:
    found = [
        (one, one.step_seconds.mean, one.optimizer_share.mean)
        for one in analysis.recipes
        if one.step_seconds and one.optimizer_share
    ]
    recipes = [recipe for recipe, _, _ in found]
    colors = [identities[recipe.name].color for recipe in recipes]
    words = [f"{quantities.percent(s)} of {quantities.duration(t)}" for _, t, s in found]
    return Chart(
        key="step-time",
        title="Time in a step",
        caption="Mean over steps. The optimizer’s share is the time of optimizer.step() and of "
        "updates inside backward. The rest is reading the batch, forward, backward and clipping.",
        description=_describe("The optimizer takes", recipes, words),
        figure={
            "data": [
                _bars([step * share for _, step, share in found], colors),
                _bars([step * (1 - share) for _, step, share in found], _tinted(colors, SOFT)),
                _legend_entry("optimizer", 1.0),
                _legend_entry("the rest", SOFT),
            ],
            "layout": _layout(
                _length_axis("seconds", max(step for _, step, _ in found)),
                barmode="stack",
                annotations=_words(recipes, identities, words),
            ),
        },
        share=3,
    )


def _layout(x: Figure, *, annotations: Sequence[Figure], **options: Any) -> Figure:
    rows = len(annotations)
    return layout(
        110 + row_height(_ROW, annotations) * rows,
        xaxis=x,
        yaxis=rows_axis(rows),
        dragmode=False,
        annotations=annotations,
        **options,
    )


def _unit(longest: float) -> tuple[str, int]:
    """Return the unit in which ``longest`` bytes are written, and the unit's size in bytes."""
    name = quantities.size(longest).split(quantities.NO_BREAK)[1]
    return name, 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(name)


def _length_axis(title: str, longest: float, **options: Any) -> Figure:
    return axis(
        title, range=[0, 1.03 * (longest or 1.0)], fixedrange=True, **{"nticks": 6, **options}
    )


def _bars(
    lengths: Sequence[float],
    colors: Sequence[str],
    *,
    below: float = _BELOW,
    thickness: float = _THICKNESS,
) -> Figure:
    return {
        "type": "bar",
        "orientation": "h",
        "x": list(lengths),
        "y": [row + below for row in range(len(lengths))],
        "width": thickness,
        "marker": {"color": list(colors)},
        "showlegend": False,
        "hoverinfo": "skip",
    }


def _whiskers(spreads: Sequence[Spread | None]) -> Figure:
    """Draw ranges, in percent, at the ends of the bars that have a range."""
    ranged = [(row, s) for row, s in enumerate(spreads) if s and s.low < s.high]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [100 * s.mean for _, s in ranged],
        "y": [row + _BELOW for row, _ in ranged],
        "marker": {"size": 1, "color": "@ink"},
        "error_x": error_bars(
            [100 * (s.high - s.mean) for _, s in ranged],
            [100 * (s.mean - s.low) for _, s in ranged],
            "@ink",
        ),
        "showlegend": False,
        "hoverinfo": "skip",
    }


def _words(
    recipes: Sequence[RecipeSummary], identities: Identities, words: Sequence[str]
) -> list[Figure]:
    """Make the words above each bar: the recipe's name and figures."""
    return [
        row_words(identities[recipe.name].label, word, row + _BELOW - _THICKNESS / 2)
        for row, (recipe, word) in enumerate(zip(recipes, words, strict=True))
    ]


def _tinted(colors: Sequence[str], strength: float) -> list[str]:
    return [f"{color}:{strength}" for color in colors]


def _legend_entry(name: str, strength: float) -> Figure:
    return {
        "type": "bar",
        "orientation": "h",
        "x": [None],
        "y": [0],
        "name": name,
        "marker": {"color": f"@ink:{strength}"},
        "hoverinfo": "skip",
    }


def _describe(what: str, recipes: Sequence[RecipeSummary], words: Sequence[str]) -> str:
    each = (f"{recipe.name} {word}" for recipe, word in zip(recipes, words, strict=True))
    return f"{what}: {'; '.join(each)}."
