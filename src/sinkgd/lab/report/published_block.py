"""The block of published figures on a page, separate from the figures that the page measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from sinkgd.lab.report import quantities
from sinkgd.lab.report.analysis import preset_of, summarize
from sinkgd.lab.report.figures import Chart
from sinkgd.lab.report.published import (
    AGAINST,
    APOLLO,
    GALORE,
    LARGEST,
    LONGER,
    LONGER_STEPS,
    MEASURED_GB,
    RACS,
    ROWS,
    SINKGD,
    SIZES,
    SPEEDUPS,
    THROUGHPUT,
    THROUGHPUT_GPUS,
    TOKEN_FRACTION,
    Provenance,
    Row,
    Size,
    Source,
    State,
    Value,
    memory_gib,
)
from sinkgd.lab.report.published_charts import memory_charts
from sinkgd.lab.results import Run

_LAST_DIGIT = 0.1  # unit of the last digit of perplexities that were read from a plot
# Models of one preset count as the same if their numbers of parameters differ by less than this
# fraction. A vocabulary of 32,100 entries, as T5's, instead of 32,000 makes a smaller difference.
_SAME_MODEL = 0.01


@dataclass(frozen=True)
class Column:
    """A column of the table: a model size."""

    size: str
    training: str  # the benchmark's steps and tokens


@dataclass(frozen=True)
class Cell:
    """A formatted perplexity."""

    text: str
    lowest: bool = False  # whether it is, within its precision, the lowest of its column
    from_plot: bool = False  # whether it was read from a plot


@dataclass(frozen=True)
class PublishedRow:
    """A row of the table."""

    method: str
    note: str
    provenance: Provenance
    source: Source  # the paper that has the figures
    origin: Source | None  # the method's paper, if that is another paper
    cells: tuple[Cell | None, ...]  # in the order of the sizes


@dataclass(frozen=True)
class MeasuredRow:
    """A measurement of this page at one size of the table."""

    recipe: str
    size: str
    perplexity: str
    note: str  # tokens, data and seeds of the measurement


@dataclass(frozen=True)
class Detail:
    """A small table with its note and papers; the first cell of each row names the row."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class PublishedBlock:
    """The content of ``published.html``; the page must also draw ``charts``."""

    columns: tuple[Column, ...]
    rows: tuple[PublishedRow, ...]
    measured: tuple[MeasuredRow, ...]
    absent: tuple[str, ...]  # for each model without a column, the reason
    against: tuple[str, ...]
    details: tuple[Detail, ...]
    charts: tuple[Chart, ...]


def published_block(runs: Sequence[Run]) -> PublishedBlock:
    """Collect the published figures, and the measurements of ``runs`` at the same sizes.

    Args:
        runs: The page's runs. Finished runs of the benchmark's models get a row for each recipe and
            size. For runs of other models the block gives the reason why they have none.

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
    """Return the lowest perplexity of a column, among those that are exact to their last digit."""
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
    r"""Format a perplexity with the digits that are known.

    >>> _written(Value(30.0)), _written(Value(31.0, at_most=True))
    ('30.00', '≤\xa031.0')
    """
    if value.at_most:
        return f"≤{quantities.NO_BREAK}{value.perplexity:.1f}"
    return f"{value.perplexity:.{1 if value.from_plot else 2}f}"


def _size_of(run: Run) -> Size | None:
    """Find the size that has the run's preset and nearly the run's number of parameters."""
    for size in SIZES:
        difference = run.start.parameters / size.config.parameter_count - 1
        if preset_of(run) == size.preset and abs(difference) < _SAME_MODEL:
            return size
    return None


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
                recipe,
                name,
                summary.perplexity.with_range(digits=2),
                f"{seeds}{tokens} of {corpora}",
            )
        )
    return rows


def _absences(runs: Sequence[Run]) -> list[str]:
    """Give the reason for each model without a column."""
    presets = {size.preset: size for size in SIZES}
    reasons: dict[str, None] = {}
    for run in runs:
        if _size_of(run) is not None:
            continue
        preset, parameters = preset_of(run), quantities.count(run.start.parameters)
        if preset in presets:
            usual = quantities.count(presets[preset].config.parameter_count)
            why = f"has {parameters} parameters, not the benchmark’s {usual}"
        else:
            why = f"({parameters} parameters) is another model"
        reasons[f"{preset} {why}."] = None
    return list(reasons)


def _training(size: Size) -> str:
    steps = f"{size.steps // 1000}k{quantities.NO_BREAK}steps"
    return f"{steps}, {quantities.count(size.tokens)}{quantities.NO_BREAK}tokens"


_KEEPERS = (
    ("Adam, Stable-SPAM", State.MOMENTS),
    ("Muon in the blocks", State.MATRIX_MOMENTUM),
    ("SinkGD, SWAN, RACS, APOLLO-Mini", State.NONE_IN_BLOCKS),
    ("SCALE", State.HEAD_MOMENTUM),
    ("SGD", State.NOTHING),
)


def details() -> tuple[Detail, ...]:
    """Make the small tables: memory by formula, speed, longer runs, and measured memory.

    >>> [len(detail.rows) for detail in details()]
    [5, 8, 3, 3]
    """
    return _memory(), _speed(), _longer(), _measured_memory()


def _memory() -> Detail:
    sizes = (*SIZES, LARGEST)
    return Detail(
        title="Memory of weights and state",
        note="GiB, by the benchmark’s formula: two bytes per weight and per number of state. Adam "
        "updates embedding, head and norms, except with SCALE and SGD. Vectors of the length of a "
        "row or column are not counted (below 0.3 %). GaLore, Fira and APOLLO-SVD are not "
        "listed, because their state depends on a rank.",
        columns=("method", *(size.name for size in sizes)),
        rows=tuple(
            (name, *(f"{memory_gib(size, state):.3g}" for size in sizes))
            for name, state in _KEEPERS
        ),
        sources=(SINKGD, GALORE),
    )


def _speed() -> Detail:
    speedups = tuple(
        (f"steps of {one.against} per step of SinkGD, to the same loss", one.size,
         f"{one.steps:.1f}×")
        for one in SPEEDUPS
    )  # fmt: skip
    abstract = (
        "share of Adam’s tokens that SinkGD needs for Adam’s perplexity",
        quantities.ABSENT,
        quantities.percent(TOKEN_FRACTION),
    )
    throughput = tuple(
        (f"tokens per second, {name}", "1.3B", quantities.count(speed))
        for name, speed in THROUGHPUT.items()
    )
    return Detail(
        title="Speed",
        note="Effective: all of Adam’s tokens, divided by the seconds that SinkGD needs to reach "
        "Adam’s final perplexity. It already includes the saved steps. "
        f"On {THROUGHPUT_GPUS} A100.",
        columns=("what", "size", "published"),
        rows=(*speedups, abstract, *throughput),
        sources=(SINKGD,),
    )


def _longer() -> Detail:
    return Detail(
        title="1.3B against 7B",
        note="Perplexity during a training of 150,000 steps.",
        columns=("method", *(f"{steps // 1000}k steps" for steps in LONGER_STEPS)),
        rows=tuple(
            (f"{one.method}, {one.size}", *(f"{value:.2f}" for value in one.values))
            for one in LONGER
        ),
        sources=(APOLLO, RACS),
    )


def _measured_memory() -> Detail:
    return Detail(
        title="Measured memory",
        note="GB at 1.3B and a batch of 256, everything included.",
        columns=("method", "GB"),
        rows=tuple((name, f"{value:.2f}") for name, value in MEASURED_GB.items()),
        sources=(GALORE,),
    )
