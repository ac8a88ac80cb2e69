"""The key figures: a card a recipe, four figures a card."""

from dataclasses import dataclass

from sinkgd.lab.report import quantities
from sinkgd.lab.report.analysis import Analysis, Comparison
from sinkgd.lab.report.summary import RecipeSummary, Spread
from sinkgd.lab.report.verdict import Verdict


@dataclass(frozen=True)
class Figure:
    """A number with its name, and a note that gives its scale."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Card:
    """A recipe at a glance."""

    recipe: str
    tag: str  # "baseline", "3 seeds", ...
    sentence: str
    figures: tuple[Figure, ...]


def cards(analysis: Analysis, verdict: Verdict) -> list[Card]:
    """Make every recipe's card: the candidates first, by their loss, and the baseline last."""
    candidates = sorted(analysis.candidates, key=_final_loss)
    recipes = [*candidates, *([analysis.baseline] if analysis.baseline else [])]
    return [
        Card(
            recipe.name,
            _tag(recipe, analysis),
            verdict.sentences[recipe.name],
            tuple(_figures(recipe, analysis)),
        )
        for recipe in recipes
    ]


def _final_loss(recipe: RecipeSummary) -> float:
    return recipe.val_loss.mean if recipe.val_loss else float("inf")


def _tag(recipe: RecipeSummary, analysis: Analysis) -> str:
    seeds = "no finished run"
    if recipe.seeds:
        seeds = "one seed" if recipe.seeds == 1 else f"{recipe.seeds} seeds"
    return f"baseline, {seeds}" if recipe is analysis.baseline else seeds


def _figures(recipe: RecipeSummary, analysis: Analysis) -> list[Figure]:
    comparison = analysis.comparisons.get(recipe.name)
    if recipe is analysis.baseline or comparison is None:
        return _absolute(recipe)
    if recipe.val_loss is None or analysis.baseline is None:
        return []
    if comparison.token_fraction and comparison.time_fraction:
        figures = [
            _needed("Tokens needed", comparison, comparison.token_fraction),
            _needed("Time needed", comparison, comparison.time_fraction),
        ]
    else:
        figures = _fell_short(recipe.val_loss, analysis.baseline)
    return [*figures, _speed(comparison), *_state(recipe, analysis.baseline)]


def _absolute(recipe: RecipeSummary) -> list[Figure]:
    figures = []
    if recipe.tokens:
        figures.append(Figure("Tokens", quantities.count(recipe.tokens.mean), "in all"))
    if recipe.seconds:
        figures.append(Figure("Time", quantities.duration(recipe.seconds.mean), "of training"))
    if recipe.tokens_per_second:
        speed = quantities.count(recipe.tokens_per_second.mean)
        figures.append(Figure("Throughput", speed, "tokens per second, raw"))
    if recipe.memory:
        state = quantities.size(recipe.memory.state_bytes)
        figures.append(Figure("Optimizer state", state, "kept between steps"))
    return figures


def _needed(name: str, comparison: Comparison, fraction: Spread) -> Figure:
    note = "of the baseline’s"
    if comparison.reached_runs < comparison.runs:
        note += f", in {comparison.reached_runs} of {comparison.runs} runs"
    elif fraction.count > 1:
        note += f", seeds {100 * fraction.low:.0f} to {quantities.percent(fraction.high)}"
    return Figure(name, quantities.percent(fraction.mean), note)


def _fell_short(loss: Spread, baseline: RecipeSummary) -> list[Figure]:
    figures = [Figure("Tokens needed", "–", "not reached")]
    if baseline.val_loss:
        gap = loss.mean - baseline.val_loss.mean
        figures.append(
            Figure("Final loss", quantities.loss(loss.mean), f"{gap:+.3f} against the baseline")
        )
    return figures


def _speed(comparison: Comparison) -> Figure:
    name = "Effective throughput"
    if comparison.effective_speedup is None:
        return Figure(name, "–", "not reached")
    return Figure(name, quantities.ratio(comparison.effective_speedup), "the baseline’s")


def _state(recipe: RecipeSummary, baseline: RecipeSummary) -> list[Figure]:
    if recipe.memory is None:
        return []
    value = quantities.size(recipe.memory.state_bytes)
    if baseline.memory is None or baseline.memory.state_bytes == 0:
        return [Figure("Optimizer state", value)]
    share = quantities.percent(recipe.memory.state_bytes / baseline.memory.state_bytes)
    return [Figure("Optimizer state", value, f"{share} of the baseline’s")]
