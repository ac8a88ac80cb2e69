"""The page of a comparison in one file: verdict, cards, charts and tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkgd.lab.disk import write_whole
from sinkgd.lab.report import quantities
from sinkgd.lab.report.analysis import (
    Analysis,
    Comparison,
    RecipeSummary,
    Spread,
    analyze,
    state_of,
)
from sinkgd.lab.report.bar_charts import bar_charts
from sinkgd.lab.report.calculator import calculator_block
from sinkgd.lab.report.figures import Chart, Identities, identify
from sinkgd.lab.report.line_charts import loss_chart, statistics_charts
from sinkgd.lab.report.published_block import published_block
from sinkgd.lab.report.quantities import ABSENT
from sinkgd.lab.report.shell import render
from sinkgd.lab.report.tables import header, summary_rows
from sinkgd.lab.report.verdict import Verdict, judge
from sinkgd.lab.results import Run


@dataclass(frozen=True)
class Settings:
    """Dotted names with their values, as text."""

    shared: tuple[tuple[str, str], ...]
    differing: tuple[tuple[str, tuple[str, ...]], ...]  # one value per recipe, in order


def compare_settings(analysis: Analysis, of: Callable[[Run], Mapping[str, Any]]) -> Settings:
    """Split the settings of all runs into those that recipes share, and those that differ.

    Args:
        analysis: The comparison, whose recipes are the columns. If runs of one recipe differ, as in
            their seed, the column has each value once.
        of: Returns the settings of a run as nested mappings.
    """
    columns = [[dict(_flat(of(run))) for run in recipe.runs] for recipe in analysis.recipes]
    names = dict.fromkeys(name for runs in columns for run in runs for name in run)
    shared, differing = [], []
    for name in names:
        values = tuple(
            ", ".join(dict.fromkeys(run.get(name, ABSENT) for run in runs)) for runs in columns
        )
        if len(set(values)) == 1:
            shared.append((name, values[0]))
        else:
            differing.append((name, values))
    return Settings(tuple(shared), tuple(differing))


def _flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """List a nested table's leaves by dotted name.

    >>> _flat({"model": {"preset": "llama-nano"}, "seed": 0})
    [('model.preset', 'llama-nano'), ('seed', '0')]
    """
    rows = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


@dataclass(frozen=True)
class KeyFigure:
    """A number with its name, and a note that puts it into context."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Card:
    """The key figures of a recipe."""

    recipe: str
    tag: str  # "baseline", "3 seeds", ...
    sentence: str
    figures: tuple[KeyFigure, ...]


def cards(analysis: Analysis, verdict: Verdict) -> list[Card]:
    """Make a card for every recipe: the candidates in order of their loss, then the baseline."""
    candidates = sorted(analysis.candidates, key=_final_loss)
    recipes = [*candidates, *([analysis.baseline] if analysis.baseline else [])]
    return [
        Card(
            recipe.name,
            _tag(recipe, analysis),
            verdict.sentences[recipe.name],
            tuple(_figures(recipe, analysis, times_comparable=verdict.times_comparable)),
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


def _figures(
    recipe: RecipeSummary, analysis: Analysis, *, times_comparable: bool
) -> list[KeyFigure]:
    comparison = analysis.comparisons.get(recipe.name)
    if recipe is analysis.baseline or comparison is None:
        return _absolute(recipe)
    if recipe.val_loss is None or analysis.baseline is None:
        return []
    if comparison.token_fraction and comparison.time_fraction:
        figures = [
            _needed("Tokens needed", comparison.token_fraction),
            _needed("Time needed", comparison.time_fraction)
            if times_comparable
            else KeyFigure("Time needed", ABSENT, "not comparable"),
        ]
    else:
        figures = _fell_short(comparison, recipe.val_loss, analysis.baseline)
    return [
        *figures,
        _speed(comparison, times_comparable=times_comparable),
        *_state(recipe, analysis.baseline),
    ]


def _absolute(recipe: RecipeSummary) -> list[KeyFigure]:
    figures = []
    if recipe.tokens:
        figures.append(KeyFigure("Tokens", quantities.count(recipe.tokens.mean), "in all"))
    if recipe.seconds:
        figures.append(KeyFigure("Time", quantities.duration(recipe.seconds.mean), "of training"))
    if recipe.tokens_per_second:
        speed = quantities.count(recipe.tokens_per_second.mean)
        figures.append(KeyFigure("Throughput", speed, "tokens per second, raw"))
    if recipe.memory:
        state = quantities.size(recipe.memory.state_bytes)
        figures.append(KeyFigure("Optimizer state", state, "kept between steps"))
    return figures


def _needed(name: str, fraction: Spread) -> KeyFigure:
    note = "of the baseline’s"
    if fraction.count > 1:
        note += f", seeds {100 * fraction.low:.0f} to {quantities.percent(fraction.high)}"
    return KeyFigure(name, quantities.percent(fraction.mean), note)


def _fell_short(comparison: Comparison, loss: Spread, baseline: RecipeSummary) -> list[KeyFigure]:
    figures = [KeyFigure("Tokens needed", ABSENT, comparison.shortfall)]
    if baseline.val_loss:
        gap = loss.mean - baseline.val_loss.mean
        figures.append(
            KeyFigure("Final loss", quantities.loss(loss.mean), f"{gap:+.3f} against the baseline")
        )
    return figures


def _speed(comparison: Comparison, *, times_comparable: bool) -> KeyFigure:
    name = "Effective throughput"
    if comparison.effective_speedup is None:
        return KeyFigure(name, ABSENT, comparison.shortfall)
    if not times_comparable:
        return KeyFigure(name, ABSENT, "not comparable")
    return KeyFigure(name, quantities.ratio(comparison.effective_speedup), "the baseline’s")


def _state(recipe: RecipeSummary, baseline: RecipeSummary) -> list[KeyFigure]:
    if recipe.memory is None:
        return []
    value = quantities.size(recipe.memory.state_bytes)
    if baseline.memory is None or baseline.memory.state_bytes == 0:
        return [KeyFigure("Optimizer state", value)]
    share = quantities.percent(recipe.memory.state_bytes / baseline.memory.state_bytes)
    return [KeyFigure("Optimizer state", value, f"{share} of the baseline’s")]


_TEMPLATE = Path(__file__).parent / "page.html"
_FILTERS: dict[str, Callable[..., str]] = {
    "state": state_of,
    "loss": quantities.loss,
    "count": quantities.count,
    "duration": quantities.duration,
}


def build_page(runs: Sequence[Run], *, baseline: str | None, title: str, command: str) -> str:
    """Make the page's HTML.

    Args:
        runs: One or more runs; unfinished and failed ones are shown as such.
        baseline: The recipe that the others are compared with, or None.
        title: Title of the page, plain text.
        command: The shell command that repeats the comparison, plain text.

    Raises:
        ReportError: If there are no runs, or no run of the baseline's recipe.
    """
    return _render(analyze(runs, baseline), title, command)


def write_page(
    path: Path, runs: Sequence[Run], *, baseline: str | None, title: str, command: str
) -> None:
    """Write the page atomically, so that no reader sees half a page.

    Args:
        path: The file; its folder is made if absent.
        runs: One or more runs; unfinished and failed ones are shown as such.
        baseline: The recipe that the others are compared with, or None.
        title: Title of the page, plain text.
        command: The shell command that repeats the comparison, plain text.

    Raises:
        ReportError: If there are no runs, or no run of the baseline's recipe.
    """
    write_whole(path, build_page(runs, baseline=baseline, title=title, command=command))


def _render(analysis: Analysis, title: str, command: str) -> str:
    identities = identify(analysis)
    verdict = judge(analysis)
    charts = measured_charts(analysis, identities)
    published = published_block(analysis.runs)
    return render(
        _TEMPLATE,
        title=title,
        charts=[*charts, *published.charts],
        measured_charts=charts,
        published=published,
        calculator=calculator_block(analysis),
        filters=_FILTERS,
        command=command,
        analysis=analysis,
        verdict=verdict,
        identities=identities,
        cards=cards(analysis, verdict),
        columns=header(analysis),
        rows=summary_rows(analysis),
        config=compare_settings(analysis, lambda run: run.start.config),
        environment=compare_settings(analysis, lambda run: run.start.environment),
    )


def measured_charts(analysis: Analysis, identities: Identities) -> list[Chart]:
    """Draw all charts of measured runs, in the page's order; statistics of models come last."""
    return [
        loss_chart(analysis, identities, "tokens"),
        loss_chart(analysis, identities, "seconds"),
        *bar_charts(analysis, identities),
        *statistics_charts(analysis, identities),
    ]
