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


def _below(sheet: Sheet) -> list[str]:
    absent = [f"{name}: {reason}" for name, reason in sheet.absent]
    return [*absent, sheet.note] if sheet.note else absent
