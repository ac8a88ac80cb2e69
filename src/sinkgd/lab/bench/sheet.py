"""A table of figures, the same in the terminal and on the page."""

from dataclasses import dataclass

from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Sheet:
    """A table of text: the first column names the row."""

    title: str
    note: str  # what the columns mean, in a sentence or two
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    absent: tuple[tuple[str, str], ...] = ()  # rows without figures, and why


def terminal_table(sheet: Sheet) -> Table:
    """Make the table for a terminal; who is absent and the note stand below it."""
    table = Table(
        title=Text(sheet.title, style="bold"),
        title_justify="left",
        caption=Text("\n".join(_below(sheet))),
        caption_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for i, column in enumerate(sheet.columns):
        if i:
            table.add_column(Text(column), justify="right")
        else:  # a name that is too long is folded, for its end may be all that tells it apart
            table.add_column(Text(column), overflow="fold")
    for row in sheet.rows:
        table.add_row(*map(Text, row))
    return table


def fitting_tables(sheet: Sheet, width: int) -> list[Table]:
    """Make tables that are no wider than the terminal: groups of columns, each with the names.

    Args:
        sheet: The table; its note stands below the last group.
        width: Of the terminal, characters.
    """
    gap = 2
    widths = [
        max(map(len, (column, *(row[i] for row in sheet.rows)))) + gap
        for i, column in enumerate(sheet.columns)
    ]
    groups: list[list[int]] = [[]]
    room = width - widths[0]
    for i in range(1, len(sheet.columns)):
        if groups[-1] and room < widths[i]:
            groups.append([])
            room = width - widths[0]
        groups[-1].append(i)
        room -= widths[i]
    return [
        terminal_table(_part(sheet, group, last=group is groups[-1], first=group is groups[0]))
        for group in groups
    ]


def _part(sheet: Sheet, group: list[int], *, first: bool, last: bool) -> Sheet:
    kept = (0, *group)
    return Sheet(
        title=sheet.title if first else f"{sheet.title} (continued)",
        note=sheet.note if last else "",
        columns=tuple(sheet.columns[i] for i in kept),
        rows=tuple(tuple(row[i] for i in kept) for row in sheet.rows),
        absent=sheet.absent if last else (),
    )


def _below(sheet: Sheet) -> list[str]:
    absent = [f"{name}: {reason}" for name, reason in sheet.absent]
    return [*absent, sheet.note] if sheet.note else absent
