"""The console script `sinkgd`: it answers Ctrl-C even in the second or two of importing torch.

This module is not in the package: importing any module of the package first imports torch.
"""

import os
import signal
import sys
from types import FrameType

# OpenMP's threads spin for a while when they wait for each other. With libgomp's default number of
# spins, waiting threads first keep the cores from other processes, and then lose the cores to them.
# Beside two busy processes on two cores, 24 steps of llama-nano took 23 s with the default and 6 to
# 11 s with this number; on an idle machine the number makes no difference. libgomp reads it once,
# when torch is imported.
_SPIN_COUNT = "30000"
_WAIT_POLICIES = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"}

_STDERR = 2


def main(*, child: bool = False) -> int:
    """Run the program; return the exit code.

    Args:
        child: Whether another command of `sinkgd` started this process. On Linux this process then
            ends when that command does.
    """
    begin()
    if not _WAIT_POLICIES & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT
    from sinkgd.lab import cli  # noqa: PLC0415  the import that takes its time

    if child:
        from sinkgd.lab.launch import end_with_parent  # noqa: PLC0415

        end_with_parent()
    return cli.main()


def begin() -> None:
    """Do what must happen before torch is imported; `sinkgd.lab.cli` does the rest."""
    _open_closed_streams()
    # If the parent process made this one ignore Ctrl-C, the handler is SIG_IGN, which stays.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def _open_closed_streams() -> None:
    """Open the null device in place of streams that the shell closed, for example by ``2>&-``.

    Otherwise the next file that is opened gets the stream's number, and output goes to this file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115


def hand_over_ctrl_c() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, which the program catches."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(_number: int, _frame: FrameType | None) -> None:
    # An exception could end up anywhere inside the import, and be swallowed there.
    sys.stderr.write("error: stopped by Ctrl-C\n")
    sys.stderr.flush()
    os._exit(130)
