"""The console script `sinkgd`: it answers Ctrl-C while torch is imported, for a second or two.

This module lies beside the package, as any module of the package imports torch before its own code.
"""

import os
import signal
import sys
from types import FrameType

# OpenMP's threads spin for a while when they wait for each other. libgomp's default keeps the cores
# from other processes' threads and then loses its own: beside two busy processes on two cores, 24
# steps of llama-nano took 23 s with the default and 6 to 11 s with this count, and as long as
# before on an idle machine. libgomp reads it once, when torch is imported.
_SPIN_COUNT = "30000"
_WAIT_POLICIES = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"}


def main(*, child: bool = False) -> int:
    """Run the program; return the exit code.

    Args:
        child: Whether another command of `sinkgd` started this process, and is to end it.
    """
    asked = signal.getsignal(signal.SIGINT)
    if asked is signal.default_int_handler:  # otherwise the parent had Ctrl-C ignored
        signal.signal(signal.SIGINT, _stop)
    if not _WAIT_POLICIES & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT
    from sinkgd.lab import cli  # noqa: PLC0415  the import that takes its time

    if child:
        from sinkgd.lab.commands.fresh_process import end_with_parent  # noqa: PLC0415

        end_with_parent()
    signal.signal(signal.SIGINT, asked)
    return cli.main()


def _stop(_number: int, _frame: FrameType | None) -> None:
    # An exception could end up anywhere inside the import, and be swallowed there.
    sys.stderr.write("error: stopped by Ctrl-C\n")
    sys.stderr.flush()
    os._exit(130)
