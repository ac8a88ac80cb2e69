"""Processes end with their parent; the first signal waits, a later one does not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sinkgd.lab import launch as module
from sinkgd.lab.launch import Interrupt, exit_code, in_fresh_process

PARENTS = {
    "bench memory": """\
if __name__ == "__main__":
    from pathlib import Path
    from lab.test_launch import sleep
    from sinkgd.lab.launch import in_fresh_process
    in_fresh_process(sleep, Path(sys.argv[1]))
""",
    "bench step": """\
import sys, torch
from pathlib import Path
from sinkgd.lab.bench import bench_step
bench_step._PROGRAM = bench_step._PROGRAM.replace(
    "grad = ", f"from lab.test_launch import sleep; sleep({sys.argv[1]!r})\\ngrad = "
)
bench_step._call("eager", torch.device("cpu"), Path(sys.argv[1]).parent)
""",
}


def sleep(path: Path | str) -> None:
    """Write the id of this process and stay for as long as it is let."""
    written = Path(f"{path}.part")
    written.write_text(str(os.getpid()))
    written.rename(path)
    time.sleep(600)


def test_what_is_called_in_a_fresh_process_is_returned():
    assert in_fresh_process(abs, -3) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells every child of its end")
@pytest.mark.parametrize("parent", PARENTS)
def test_a_helper_ends_with_a_parent_that_is_killed(tmp_path, parent):
    script, written = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(f"import sys\n{PARENTS[parent]}")
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, str(script), str(written)], env={**os.environ, "PYTHONPATH": path}
    ) as process:
        while not written.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    helper = int(written.read_text())
    deadline = time.monotonic() + 20
    while _lives(helper):
        if time.monotonic() > deadline:
            os.kill(helper, signal.SIGKILL)
            pytest.fail("the helper goes on")
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # nobody may have asked for its exit code yet


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
