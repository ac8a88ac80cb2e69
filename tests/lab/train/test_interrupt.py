"""The first signal waits, the second does not."""

import signal

import pytest

from sinkgd.lab.train.interrupt import Interrupt, exit_code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_remembered_and_has_the_shells_exit_code(number, code):
    with Interrupt() as interrupt:
        assert interrupt.received is None
        signal.raise_signal(number)
        assert interrupt.received is number
    assert exit_code(number) == code


def test_the_second_ctrl_c_acts_at_once():
    with pytest.raises(KeyboardInterrupt), Interrupt():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_first_signal_is_handed_on_once():
    handed_on: list[signal.Signals] = []
    with pytest.raises(KeyboardInterrupt), Interrupt(forward=handed_on.append):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert handed_on == [signal.SIGINT]
