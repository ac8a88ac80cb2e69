"""The first signal waits, a later one does not."""

import signal

import pytest

from sinkgd.lab import launch as module
from sinkgd.lab.launch import Interrupt, exit_code


@pytest.fixture(autouse=True)
def _pythons_own_handler():
    """A shell that starts the tests in the background has them ignore SIGINT, nohup SIGHUP."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGHUP, hang_up)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_is_remembered_and_has_the_shells_exit_code(number, code):
    with Interrupt() as interrupt:
        assert interrupt.received is None
        signal.raise_signal(number)
        assert interrupt.received is number
    assert exit_code(number) == code


def test_signals_in_a_burst_are_one_wish():
    handed_on: list[signal.Signals] = []
    with Interrupt(forward=handed_on.append) as interrupt:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert interrupt.received is signal.SIGTERM
    assert handed_on == [signal.SIGTERM]


def test_a_later_ctrl_c_acts_at_once(monkeypatch):
    monkeypatch.setattr(module, "_SAME_REQUEST_SECONDS", 0.0)
    with Interrupt():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_run_under_nohup_is_not_stopped_by_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert interrupt.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
