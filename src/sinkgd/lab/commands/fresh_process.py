"""A command of `sinkgd` in a process of its own, so that its memory and speed are its own too."""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Sequence

from sinkgd.lab.train.interrupt import Interrupt

_PROGRAM = """\
from sinkgd.lab.cli import main
from sinkgd.lab.commands.fresh_process import end_with_parent
end_with_parent()
raise SystemExit(main())
"""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_in_fresh_process(arguments: Sequence[str]) -> int:
    """Run ``sinkgd`` with ``arguments`` in this terminal; return its exit code.

    Ctrl-C and SIGTERM are handed on once, and waited out: the command may have work to save. On
    Linux the command is also told to stop, and saves, when this process is killed.
    """
    # A process group of its own: else the terminal would send Ctrl-C to both, and then twice.
    child = subprocess.Popen([sys.executable, "-c", _PROGRAM, *arguments], process_group=0)
    try:
        with Interrupt(forward=child.send_signal):
            return child.wait()
    except KeyboardInterrupt:  # the second Ctrl-C
        child.send_signal(signal.SIGINT)
        child.wait()
        raise


def end_with_parent() -> None:
    """Ask Linux for a SIGTERM when the parent process ends; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
