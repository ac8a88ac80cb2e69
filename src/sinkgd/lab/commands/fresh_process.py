"""A command of `sinkgd` in a process of its own, so that its memory and speed are its own too."""

import signal
import subprocess
import sys
from collections.abc import Sequence

from sinkgd.lab.train.interrupt import Interrupt, exit_code

_PROGRAM = "from _sinkgd_cli import main; raise SystemExit(main(child=True))"


def run_in_fresh_process(arguments: Sequence[str]) -> int:
    """Run ``sinkgd`` with ``arguments`` in this terminal; return its exit code.

    Ctrl-C, SIGTERM and SIGHUP are handed on once, and waited out: the command may have work
    to save. On Linux the command is also told to stop, and saves, when this process is killed.
    """
    # A process group of its own: else the terminal would send Ctrl-C to both, and then twice.
    child = subprocess.Popen([sys.executable, "-c", _PROGRAM, *arguments], process_group=0)
    try:
        with Interrupt(forward=child.send_signal):
            code = child.wait()
    except KeyboardInterrupt:  # the second Ctrl-C
        child.send_signal(signal.SIGINT)
        child.wait()
        raise
    # A signal that comes before the command has its own handlers ends it by itself.
    return exit_code(signal.Signals(-code)) if code < 0 else code
