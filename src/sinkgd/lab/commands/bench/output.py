"""Where a measurement goes besides the terminal: its record as JSON, and its page."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from sinkgd.lab.bench.record_file import write_record
from sinkgd.lab.disk import write_whole


def print_warnings(console: Console, warnings: Iterable[str]) -> None:
    """Say what makes a measurement doubtful, a line each."""
    for warning in warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)


def write_measurement(folder: Path, name: str, record: Any, page: str, console: Console) -> None:
    """Write ``name.json`` and ``name.html`` into a folder, and say where."""
    path = folder / f"{name}.json"
    write_record(path, record)
    write_whole(path.with_suffix(".html"), page)
    for written in (path, path.with_suffix(".html")):
        console.print(f"written: {written}", markup=False, highlight=False, soft_wrap=True)
