"""How far a measurement is, and how long it will still take."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from sinkgd.lab.report import quantities

_EVERY_SECONDS = 10.0  # between lines where the output is no terminal


class Progress:
    """Tells the part that is done of several stages of different weight.

    Args:
        total: Weight of all stages.
        stream: Where to write, by default the standard error; on a terminal one line is written
            over and over.
    """

    def __init__(self, total: float, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._done = 0.0
        self._started = time.monotonic()
        self._shown = -_EVERY_SECONDS

    def stage(self, name: str, weight: float) -> Callable[[float], None]:
        """Begin a stage; return what is to be told the part of it that is done, 0 to 1."""
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
