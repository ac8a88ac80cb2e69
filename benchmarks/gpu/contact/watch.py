"""Starts the processes that run a section, watches their time, and goes on after a crash."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from contact.items import CONTEXT_LOST, Rows, Section

SECONDS_TO_START = 60.0  # that a process may take to start, or between items
GRACE = 2.0  # seconds that an item may run over its section's deadline


class Watch(NamedTuple):
    """What the processes of all sections share."""

    command: Sequence[str]  # starts this script again; the section's arguments follow
    rows: Rows
    log: Path  # what the processes print
    patience: float = 1.0  # factor on the time limit of an item


class Ended(NamedTuple):
    """How a process ended."""

    beyond: int  # the first item that it did not begin
    status: str | None  # status of the item in which it died; None if it ended as it should
    why: str = ""


def run_section(section: Section, seconds: float, watch: Watch) -> None:
    """Run as many items of a section as ``seconds`` allow; every failure becomes a row."""
    begin = time.monotonic()
    deadline = begin + seconds
    if section.at_once > 1:
        with ThreadPoolExecutor(min(section.at_once, os.cpu_count() or 1)) as pool:
            spans = [(i, i + 1) for i in range(len(section.items))]
            list(pool.map(lambda span: _run_span(section, span, deadline, watch), spans))
    else:
        _run_span(section, (0, len(section.items)), deadline, watch)
    watch.rows.write(
        section.name, "section", "ok", seconds=round(time.monotonic() - begin, 1), allowed=seconds
    )


def run_together(sections: Sequence[Section], seconds: float, watch: Watch) -> None:
    """Run sections side by side, with ``seconds`` for each of them."""
    with ThreadPoolExecutor(len(sections)) as pool:
        list(pool.map(lambda section: run_section(section, seconds, watch), sections))


def _run_span(section: Section, span: tuple[int, int], deadline: float, watch: Watch) -> None:
    index, beyond = span
    while index < beyond and time.monotonic() < deadline:
        ended = _run_process(section, (index, beyond), deadline, watch)
        if ended.status is not None:
            name = section.items[ended.beyond - 1].name if ended.beyond > index else "start"
            watch.rows.write(section.name, name, ended.status, why=ended.why)
            index = max(ended.beyond, index + 1)
        elif ended.beyond == index:
            break
        else:
            index = ended.beyond
    for item in section.items[index:beyond]:
        watch.rows.write(section.name, item.name, "skipped", why="out of time")


def _run_process(section: Section, span: tuple[int, int], deadline: float, watch: Watch) -> Ended:
    """Run items ``span`` in one process until the process ends, hangs or is out of time."""
    first, beyond = span
    arguments = ["--section", section.name, "--span", f"{first}:{beyond}"]
    arguments += ["--deadline", f"{deadline:.2f}"]  # a clock that all processes share
    with watch.log.open("ab") as log:
        process = subprocess.Popen(
            [*watch.command, *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    said: queue.Queue[str | None] = queue.Queue()
    listener = threading.Thread(target=_listen, args=(process, said), daemon=True)
    listener.start()
    try:
        return _follow(section, first, deadline, watch, process, said)
    finally:
        kill_group(process)
        listener.join(10)
        assert process.stdout is not None
        process.stdout.close()


def _follow(
    section: Section,
    first: int,
    deadline: float,
    watch: Watch,
    process: "subprocess.Popen[str]",
    said: "queue.Queue[str | None]",
) -> Ended:
    """Listen to what a process says of its items until it ends, hangs or is out of time."""
    begun, running = first, False
    item_ends = time.monotonic() + SECONDS_TO_START
    while True:
        ends = min(item_ends, deadline + GRACE)
        try:
            word = said.get(timeout=max(0.01, ends - time.monotonic()))
        except queue.Empty:
            return Ended(begun, "timeout", "hung" if item_ends <= deadline else "out of time")
        if word is None:
            code = process.wait()
            if code in {0, CONTEXT_LOST} and not running:
                return Ended(begun, None)
            return Ended(begun, "crashed", f"exit code {code}: {_last_words(watch.log)}")
        verb, _, number = word.partition(" ")
        running = verb == "start"
        begun = int(number) + 1
        limit = section.items[int(number)].limit if running else SECONDS_TO_START
        item_ends = time.monotonic() + limit * watch.patience


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    said = [line for line in lines if line.strip() and not line.startswith("USDT")]
    return " / ".join(said[-3:])[-400:]


def _listen(process: "subprocess.Popen[str]", said: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(("start ", "end ")):
            said.put(line.strip())
    said.put(None)


def kill_group(process: "subprocess.Popen[str]") -> None:
    """End a process and whatever it started."""
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def this_script(path: Path, arguments: Sequence[str]) -> list[str]:
    """Return the command that starts this script again."""
    return [sys.executable, str(path), *arguments]
