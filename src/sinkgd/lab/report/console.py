"""Output on the terminal: tables of text, and a line that shows the progress of a measurement.

A `TextTable` is shown on pages, too, with the same figures.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from rich.table import Table
from rich.text import Text

from sinkgd.lab.report import quantities

_GAP = 2  # characters between columns
_EVERY_SECONDS = 10.0  # time between lines of progress if the output is not a terminal


@dataclass(frozen=True)
class TextTable:
    """A table of text: the first column names the row."""

    title: str
    note: str  # what the columns mean, in a sentence or two
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    absent: tuple[tuple[str, str], ...] = ()  # rows without figures: name and reason of each


def terminal_table(table: TextTable) -> Table:
    """Make the table for a terminal, with the absent rows and the note below it."""
    shown = Table(
        title=Text(table.title, style="bold"),
        title_justify="left",
        caption=Text("\n".join(_lines_below(table))),
        caption_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, _GAP, 0, 0),
    )
    for i, column in enumerate(table.columns):
        if i:
            shown.add_column(Text(column), justify="right")
        else:  # a long name is folded, not cut, because names may differ only at the end
            shown.add_column(Text(column), overflow="fold")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return shown


def fitting_tables(table: TextTable, width: int) -> list[Table]:
    """Split a table into groups of columns that fit the terminal; each repeats the first column.

    Args:
        table: The table; its note is below the last group.
        width: Width of the terminal in characters.
    """
    widths = [
        max(map(len, (column, *(row[i] for row in table.rows)))) + _GAP
        for i, column in enumerate(table.columns)
    ]
    groups: list[list[int]] = [[]]
    left = width - widths[0]
    for i in range(1, len(table.columns)):
        if groups[-1] and left < widths[i]:
            groups.append([])
            left = width - widths[0]
        groups[-1].append(i)
        left -= widths[i]
    return [
        terminal_table(_select(table, group, first=group is groups[0], last=group is groups[-1]))
        for group in groups
    ]


def _select(table: TextTable, group: list[int], *, first: bool, last: bool) -> TextTable:
    kept = (0, *group)
    return TextTable(
        title=table.title if first else f"{table.title} (continued)",
        note=table.note if last else "",
        columns=tuple(table.columns[i] for i in kept),
        rows=tuple(tuple(row[i] for i in kept) for row in table.rows),
        absent=table.absent if last else (),
    )


def _lines_below(table: TextTable) -> list[str]:
    absent = [f"{name}: {reason}" for name, reason in table.absent]
    return [*absent, table.note] if table.note else absent


class Progress:
    """Shows how much of a measurement is done, and how long the rest will take.

    Args:
        total: Sum of the weights of all stages.
        stream: The stream to write to, by default standard error. On a terminal one line is
            overwritten again and again; elsewhere a line is written at most every ten seconds.
    """

    def __init__(self, total: float, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._done = 0.0
        self._started = time.monotonic()
        self._shown = -_EVERY_SECONDS

    def stage(self, name: str, weight: float) -> Callable[[float], None]:
        """Begin a stage; return a function to call with the fraction of it that is done, 0 to 1."""
        begun = self._done
        self._done += weight
        self._show(name, begun / self._total)
        return lambda part: self._show(name, (begun + part * weight) / self._total)

    def end(self) -> None:
        """Clear the terminal's line."""
        if self._stream.isatty():
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _show(self, name: str, part: float) -> None:
        now = time.monotonic()
        terminal = self._stream.isatty()
        if not terminal and now - self._shown < _EVERY_SECONDS:
            return
        self._shown = now
        elapsed = now - self._started
        left = f", {quantities.duration(elapsed / part - elapsed)} left" if part > 0.02 else ""
        line = f"{name}: {quantities.percent(part)}{left}"
        self._stream.write(f"\r\x1b[K{line}" if terminal else f"{line}\n")
        self._stream.flush()
