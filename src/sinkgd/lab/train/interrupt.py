"""Ctrl-C and SIGTERM, asked about between steps rather than met in the middle of one."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """While active, the first SIGINT or SIGTERM is only remembered; a second one acts at once.

    Args:
        forward: Handed the first signal too, e.g. to send it on to a child process.

    Example:
        >>> with Interrupt() as interrupt:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     interrupt.received
        <Signals.SIGTERM: 15>
    """

    def __init__(self, forward: Callable[[signal.Signals], None] | None = None) -> None:
        self.received: signal.Signals | None = None
        self._forward = forward
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()
        if self._forward is not None:
            self._forward(self.received)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def exit_code(received: signal.Signals) -> int:
    """Return what a shell reports for a program that a signal ended: 130 for Ctrl-C."""
    return 128 + received
