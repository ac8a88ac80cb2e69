"""The summary table of a comparison, with one column per recipe, for the terminal and the page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sinkgd.lab.report import quantities
from sinkgd.lab.report.analysis import Analysis, Comparison, RecipeSummary, Spread
from sinkgd.lab.report.quantities import ABSENT
from sinkgd.lab.report.verdict import unequal_speed
from sinkgd.lab.results import Memory

_GAP = 3  # characters between columns of the table in a terminal

Cell = Callable[[RecipeSummary, Comparison | None], str]


@dataclass(frozen=True)
class Row:
    """A measure, its meaning if the title does not give it, and one cell per recipe."""

    title: str
    meaning: str
    cells: tuple[str, ...]


def header(analysis: Analysis) -> tuple[str, ...]:
    """Return the column titles: the recipes, with the baseline first and marked."""
    return tuple(
        f"{recipe.name} (baseline)" if recipe is analysis.baseline else recipe.name
        for recipe in analysis.recipes
    )


def summary_rows(analysis: Analysis) -> list[Row]:
    """Make a row for every measure that at least one recipe has."""
    comparisons = analysis.comparisons
    if unequal_speed(analysis):
        comparisons = {name: replace(c, time_fraction=None) for name, c in comparisons.items()}
    rows = [
        Row(
            title,
            meaning,
            tuple(cell(r, comparisons.get(r.name)) for r in analysis.recipes),
        )
        for title, meaning, cell in _MEASURES
    ]
    return [row for row in rows if any(cell != ABSENT for cell in row.cells)]


def summary_tables(analysis: Analysis, width: int) -> Group:
    """Make the table for a terminal, split into several if it has too many columns.

    Args:
        analysis: The recipes; the baseline is the first column of every table.
        width: Width of the terminal in characters.
    """
    rows = summary_rows(analysis)
    columns = [(name, *(row.cells[i] for row in rows)) for i, name in enumerate(header(analysis))]
    titles = ("", *(row.title for row in rows))
    lead = columns[: analysis.baseline is not None]
    tables: list[Table] = []
    chosen = list(lead)
    for column in columns[len(lead) :]:
        if len(chosen) > len(lead) and _width([titles, *chosen, column]) > width:
            tables.append(_table(titles, chosen))
            chosen = list(lead)
        chosen.append(column)
    return Group(*(part for table in tables for part in (table, "")), _table(titles, chosen))


def _table(titles: Sequence[str], columns: Sequence[Sequence[str]]) -> Table:
    table = Table(pad_edge=False, header_style="bold", box=None, padding=(0, _GAP, 0, 0))
    table.add_column("")
    for name, *_ in columns:
        # Names are text, not markup, so that a name like "[red]" is shown as it is.
        table.add_column(Text(name), justify="right")
    for title, *cells in list(zip(titles, *columns, strict=True))[1:]:
        table.add_row(Text(title), *(Text(cell) for cell in cells))
    return table


def _width(columns: Sequence[Sequence[str]]) -> int:
    return sum(max(cell_len(cell) for cell in column) for column in columns) + _GAP * len(columns)


def _memory(part: Callable[[Memory], int]) -> Cell:
    return lambda r, _: quantities.size(part(r.memory)) if r.memory else ABSENT


def _mean(spread: Spread | None, write: Callable[[float], str]) -> str:
    return write(spread.mean) if spread else ABSENT


def _with_range(spread: Spread | None, digits: int) -> str:
    return spread.with_range(digits) if spread else ABSENT


def _needed(
    amount: Callable[[Comparison], Spread | None],
    write: Callable[[float], str],
    fraction: Callable[[Comparison], Spread | None] = lambda _: None,
) -> Cell:
    """Return a function that formats the cost to reach the baseline's loss, or "not reached"."""

    def cell(_: RecipeSummary, comparison: Comparison | None) -> str:
        if comparison is None or comparison.runs == 0:
            return ABSENT
        needed, share = amount(comparison), fraction(comparison)
        if needed is None:
            return comparison.shortfall or ABSENT
        percent = f" ({quantities.percent(share.mean)})" if share else ""
        return f"{write(needed.mean)}{percent}"

    return cell


_MEASURES: tuple[tuple[str, str, Cell], ...] = (
    ("Runs finished", "", lambda r, _: f"{len(r.finished)} of {len(r.runs)}"),
    (
        "Validation loss",
        "nats per token at the end; ± half the range over seeds",
        lambda r, _: _with_range(r.val_loss, 3),
    ),
    ("Perplexity", "", lambda r, _: _with_range(r.perplexity, 2)),
    ("Bits per byte", "", lambda r, _: _with_range(r.bits_per_byte, 3)),
    (
        "Tokens to reach",
        "the baseline’s final loss; in % of the baseline’s tokens",
        _needed(lambda c: c.tokens, quantities.count, lambda c: c.token_fraction),
    ),
    ("Steps to reach", "", _needed(lambda c: c.steps, quantities.count)),
    (
        "Time to reach",
        "of training, without evaluations",
        _needed(lambda c: c.seconds, quantities.duration, lambda c: c.time_fraction),
    ),
    (
        "Tokens/s, raw",
        "of the median step",
        lambda r, _: _mean(r.tokens_per_second, quantities.count),
    ),
    (
        "Tokens/s, effective",
        "all tokens of the baseline ÷ the seconds to reach its final loss",
        _needed(lambda c: c.effective_tokens_per_second, quantities.count),
    ),
    ("Step", "mean time", lambda r, _: _mean(r.step_seconds, quantities.duration)),
    (
        "Optimizer’s share",
        "fraction of the time in steps",
        lambda r, _: _mean(r.optimizer_share, quantities.percent),
    ),
    ("Weights", "", _memory(lambda memory: memory.weights_bytes)),
    ("Gradients", "", _memory(lambda memory: memory.gradients_bytes)),
    (
        "Optimizer state",
        "kept between steps",
        _memory(lambda memory: memory.state_bytes),
    ),
    (
        "Peak memory",
        "of the process on a CPU, of the allocator on a GPU",
        _memory(lambda memory: memory.peak_bytes),
    ),
)
