"""What a section is made of: items that yield rows, and how one process runs them in turn."""

import gc
import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

Row = Mapping[str, Any]

CONTEXT_LOST = 3  # exit code


class Setting(NamedTuple):
    """What an item needs to know."""

    device: torch.device
    tiny: bool  # small shapes and few repetitions, to try the script itself
    out: Path  # folder of the rows
    tokens: Path | None  # uint16 tokens of a text, for the losses
    deadline: float  # of the section, by ``time.monotonic()``

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Return how many seconds the section has left."""
        return self.deadline - time.monotonic()


class Item(NamedTuple):
    """One thing to try; its rows are written as they are yielded."""

    name: str
    run: Callable[[Setting], Iterable[Row]]
    limit: float = 30.0  # seconds after which it counts as hung


def patient(items: Iterable[Item]) -> tuple[Item, ...]:
    """Give items the time to compile dozens of kernels while other processes do the same."""
    return tuple(item._replace(limit=120.0) for item in items)


class Section(NamedTuple):
    """Items that share a time budget."""

    name: str
    seconds: float  # its share of a budget of `BUDGET` seconds
    items: tuple[Item, ...]
    at_once: int = 1  # above 1: each item has its own process, and this many run at a time
    timed: bool = True  # False: it times nothing, and runs first, beside others of this kind


class Skipped(Exception):  # noqa: N818 - not an error
    """The item cannot run here; the message says why."""


def need_gpu(setting: Setting) -> None:
    """Skip an item that has no meaning on a CPU.

    Raises:
        Skipped: If the device is not a GPU.
    """
    if not setting.on_gpu:
        raise Skipped("needs a GPU")


class Rows:
    """A file of JSON lines; each is in the file when `write` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, section: str, item: str, status: str, **values: Any) -> None:
        """Append a row."""
        row = {"section": section, "item": item, "status": status, **values}
        line = (json.dumps(row, default=str) + "\n").encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)

    def read(self) -> list[dict[str, Any]]:
        """Return all rows; a line that a killed process left unfinished is marked unreadable."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                found.append({"section": "rows", "item": line[:80], "status": "unreadable"})
        return found


def run_items(
    section: Section, first: int, beyond: int, setting: Setting, say: Callable[[str], None]
) -> int:
    """Run some items of a section in this process, and return its exit code.

    Args:
        section: The section.
        first: Index of the first item to run.
        beyond: Index of the first item not to run.
        setting: Handed to every item.
        say: Called with ``start N`` and ``end N``, for the process that watches this one.

    Returns:
        0, or `CONTEXT_LOST` if only a new process can go on, because an error may have left a GPU,
        or torch's view of it, in any state.
    """
    rows = Rows(setting.out / "rows.jsonl")
    for index in range(first, beyond):
        if setting.left() <= 0:
            return 0
        say(f"start {index}")
        ran = run_item(section, section.items[index], setting, rows)
        say(f"end {index}")
        if setting.on_gpu and not (ran and clean_up(rows, section.name)):
            return CONTEXT_LOST
    return 0


def run_item(section: Section, item: Item, setting: Setting, rows: Rows) -> bool:
    """Write the rows of one item, or a row that says how it failed; return False if it failed."""
    begin = time.monotonic()
    try:
        for row in item.run(setting):
            values = dict(row)
            rows.write(section.name, item.name, values.pop("status", "ok"), **values)
    except Skipped as reason:
        rows.write(section.name, item.name, "skipped", why=str(reason))
    except Exception as error:  # noqa: BLE001 - whatever fails is a result
        where = traceback.extract_tb(error.__traceback__)[-1]
        rows.write(
            section.name,
            item.name,
            "error",
            error=f"{type(error).__name__}: {error}"[:600],
            where=f"{Path(where.filename).name}:{where.lineno} {where.name}",
            seconds=round(time.monotonic() - begin, 2),
        )
        return False
    return True


def clean_up(rows: Rows, section: str) -> bool:
    """Free what an item left on the GPU; return whether the GPU still answers."""
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    except RuntimeError as error:
        rows.write(section, "context", "error", error=f"the CUDA context is lost: {error}"[:300])
        return False
    return True
