"""The published figures as a block of a page, apart from what the page's runs measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from sinkgd.lab.report import quantities
from sinkgd.lab.report.charts import Chart
from sinkgd.lab.report.published import (
    AGAINST,
    ROWS,
    SIZES,
    Provenance,
    Row,
    Size,
    Source,
    Value,
)
from sinkgd.lab.report.published_charts import memory_charts
from sinkgd.lab.report.published_details import Detail, details
from sinkgd.lab.report.summary import Spread, summarize
from sinkgd.lab.results import Run

_LAST_DIGIT = 0.1  # of what is read off a plot
_SAME_MODEL = 0.01  # of the parameters: T5's 32,100 tokens instead of 32,000 are within it


@dataclass(frozen=True)
class Column:
    """A size of the table."""

    size: str
    training: str  # how long the benchmark trains it


@dataclass(frozen=True)
class Cell:
    """A perplexity as it is written."""

    text: str
    lowest: bool = False  # of its size, or not to be told from it
    from_plot: bool = False


@dataclass(frozen=True)
class PublishedRow:
    """A row of the table."""

    method: str
    note: str
    provenance: Provenance
    source: Source  # of the figures
    origin: Source | None  # of the method, where it is another paper
    cells: tuple[Cell | None, ...]  # in the order of the sizes


@dataclass(frozen=True)
class MeasuredRow:
    """What a recipe of this page measured at one size of the table."""

    recipe: str
    size: str
    perplexity: str
    note: str  # its tokens, data and seeds


@dataclass(frozen=True)
class PublishedBlock:
    """What ``published.html`` shows; the page has to draw ``charts``, too."""

    columns: tuple[Column, ...]
    rows: tuple[PublishedRow, ...]
    measured: tuple[MeasuredRow, ...]
    absent: tuple[str, ...]  # why runs of this page stand in no column
    against: tuple[str, ...]
    details: tuple[Detail, ...]
    charts: tuple[Chart, ...]


def published_block(runs: Sequence[Run]) -> PublishedBlock:
    """Put the published figures together, and beside them what ``runs`` measured at a same size.

    Args:
        runs: Of the page. Those of a model that the benchmark has get a row in the table; of the
            others it is said why they have none.

    Examples:
        >>> [column.size for column in published_block([]).columns]
        ['60M', '130M', '350M', '1.3B']
    """
    lowest = [_lowest(column) for column in range(len(SIZES))]
    return PublishedBlock(
        columns=tuple(Column(size.name, _training(size)) for size in SIZES),
        rows=tuple(_row(row, lowest) for row in ROWS),
        measured=tuple(_measured(runs)),
        absent=tuple(_absences(runs)),
        against=AGAINST,
        details=details(),
        charts=memory_charts(),
    )


def _lowest(column: int) -> float:
    """Return the lowest perplexity that is known to its last digit."""
    values = [value for row in ROWS if (value := row.values[column])]
    return min(one.perplexity for one in values if not (one.from_plot or one.at_most))


def _row(row: Row, lowest: Sequence[float]) -> PublishedRow:
    cells = tuple(
        None if value is None else Cell(_written(value), _reaches(value, low), value.from_plot)
        for value, low in zip(row.values, lowest, strict=True)
    )
    return PublishedRow(row.method, row.note, row.provenance, row.source, row.origin, cells)


def _reaches(value: Value, lowest: float) -> bool:
    return value.perplexity <= lowest + (_LAST_DIGIT / 2 if value.from_plot else 0)


def _written(value: Value) -> str:
    r"""Write a perplexity with the digits that are known.

    >>> _written(Value(30.0)), _written(Value(31.0, at_most=True))
    ('30.00', '≤\xa031.0')
    """
    if value.at_most:
        return f"≤{quantities.NO_BREAK}{value.perplexity:.1f}"
    return f"{value.perplexity:.{1 if value.from_plot else 2}f}"


def _size_of(run: Run) -> Size | None:
    """Find the column of a run: the same preset, with as many parameters."""
    for size in SIZES:
        difference = run.start.parameters / size.config.parameter_count - 1
        if _preset(run) == size.preset and abs(difference) < _SAME_MODEL:
            return size
    return None


def _preset(run: Run) -> str:
    return str(run.start.config.get("model", {}).get("preset", "an unnamed model"))


def _corpus(run: Run) -> str:
    return str(run.start.config.get("data", {}).get("corpus", "an unnamed corpus"))


def _measured(runs: Sequence[Run]) -> list[MeasuredRow]:
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if (size := _size_of(run)) is not None and run.finished:
            groups.setdefault((run.start.recipe, size.name), []).append(run)
    rows = []
    for (recipe, name), group in sorted(groups.items()):
        summary = summarize(recipe, group)
        if summary.perplexity is None or summary.tokens is None:
            continue
        whole = next(size.tokens for size in SIZES if size.name == name)
        corpora = ", ".join(dict.fromkeys(map(_corpus, group)))
        seeds = f"{summary.seeds} seeds, " if summary.seeds > 1 else ""
        tokens = f"{quantities.count(summary.tokens.mean)} of {quantities.count(whole)} tokens"
        rows.append(
            MeasuredRow(
                recipe, name, _with_spread(summary.perplexity), f"{seeds}{tokens} of {corpora}"
            )
        )
    return rows


def _with_spread(spread: Spread) -> str:
    mean = f"{spread.mean:.2f}"
    half = f"{(spread.high - spread.low) / 2:.2f}"
    return mean if spread.count == 1 else f"{mean} ±{quantities.NO_BREAK}{half}"


def _absences(runs: Sequence[Run]) -> list[str]:
    """Say of each model without a column why it has none."""
    presets = {size.preset: size for size in SIZES}
    reasons: dict[str, None] = {}
    for run in runs:
        if _size_of(run) is not None:
            continue
        preset, parameters = _preset(run), quantities.count(run.start.parameters)
        if preset in presets:
            usual = quantities.count(presets[preset].config.parameter_count)
            why = f"has {parameters} parameters, the benchmark’s {usual}: another tokenizer"
        else:
            why = f"({parameters} parameters) is another model, on other data, by other tokens"
        reasons[f"{preset} {why}."] = None
    return list(reasons)


def _training(size: Size) -> str:
    steps = f"{size.steps // 1000}k{quantities.NO_BREAK}steps"
    return f"{steps}, {quantities.count(size.tokens)}{quantities.NO_BREAK}tokens"
