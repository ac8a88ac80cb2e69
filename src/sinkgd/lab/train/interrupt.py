"""Ctrl-C, SIGTERM and SIGHUP, asked about between steps rather than met in the middle of one."""

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

# What asks a run to stop; a terminal that is closed sends SIGHUP.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# One wish to stop may arrive as several signals: Linux tells a child once for each thread of a
# parent that is killed, and a terminal and a supervisor may both pass on the same Ctrl-C.
_SAME_WISH_SECONDS = 1.0


class Interrupt:
    """While active, a first signal of `SIGNALS` is only remembered; one more, later, acts at once.

    SIGHUP stays ignored where it is, as under nohup.

    Args:
        forward: Handed the first signal too, e.g. to send it on to a child process.

    Examples:
        >>> with Interrupt() as interrupt:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     interrupt.received
        <Signals.SIGTERM: 15>
    """

    def __init__(self, forward: Callable[[signal.Signals], None] | None = None) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._forward = forward
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._handlers = {
            number: signal.signal(number, self._receive)
            for number in SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
            if self._forward is not None:
                self._forward(self.received)
        elif now - self._received_at >= _SAME_WISH_SECONDS:
            self.__exit__()
            signal.raise_signal(number)


def exit_code(received: signal.Signals) -> int:
    """Return what a shell reports for a program that a signal ended: 130 for Ctrl-C."""
    return 128 + received
