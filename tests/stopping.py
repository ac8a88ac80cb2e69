"""A run that is told to stop, at a step that can be foretold."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sinkgd.lab.train import loop


@contextmanager
def stopping_at(step: int, sent: signal.Signals = signal.SIGTERM) -> Iterator[None]:
    """Send a signal in the middle of a step."""

    def take_step(*arguments, number: int, **options):
        if number == step:
            signal.raise_signal(sent)
        return original(*arguments, number=number, **options)

    original = loop.take_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", take_step)
        yield
