"""Processes: how a command is started, how it is asked to stop, and how it ends.

The first Ctrl-C, SIGTERM or SIGHUP is only stored. A run checks for it between steps, so that no
step is cut short.
"""

import ctypes
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from threading import Thread
from types import FrameType
from typing import Any, Self, TypeVar

STARTED_BY = "SINKGD_STARTED_BY"  # environment variable: the command that started this one
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STDERR = 2

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def launched_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(environment.get("WORLD_SIZE", "1"))


def launch_command(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """Return the command that runs ``sinkgd`` with ``arguments`` in as many processes as now.

    If torchrun started several processes, the command calls torchrun.

    Args:
        arguments: Arguments after the program's name.
        environment: Environment variables; torchrun sets the number of processes there.

    Examples:
        >>> launch_command(["train", "--out", "runs/my run"], {})
        "sinkgd train --out 'runs/my run'"
        >>> launch_command(["train"], {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})
        'torchrun --nnodes 2 --nproc-per-node 4 -m sinkgd.lab train'
    """
    ranks = launched_ranks(environment)
    if ranks == 1:
        return shlex.join(["sinkgd", *arguments])
    own = int(environment["LOCAL_WORLD_SIZE"])
    nodes = ["--nnodes", str(ranks // own)] if ranks > own else []
    torchrun = ["torchrun", *nodes, "--nproc-per-node", str(own), "-m", "sinkgd.lab"]
    return shlex.join([*torchrun, *arguments])


def leave(code: int) -> int:
    """Return ``code``; if torchrun started several processes, exit immediately with ``code``.

    Threads of torch's process groups outlive the main thread. They may release Python objects after
    the interpreter has shut down, which would abort a finished run. The output is flushed before
    the exit.
    """
    if launched_ranks() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def end_with_parent() -> None:
    """Ask Linux for a SIGTERM when the parent process ends; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def stop_with_parent() -> None:
    """Send this process a SIGTERM when its parent is gone, if multiprocessing started this process.

    This also works if a fork server started the process; Linux then considers the fork server to
    be its parent.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=watch, daemon=True).start()


def in_fresh_process(function: Callable[[Argument], Result], argument: Argument) -> Result:
    """Call a top-level function of a module in a new process, and re-raise its exception here.

    What the process writes to standard error is discarded.

    Raises:
        BrokenProcessPool: If the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=stop_with_parent) as pool:
        return pool.submit(_quietly, function, argument).result()


def _quietly(function: Callable[[Argument], Result], argument: Argument) -> Result:
    # No setting prevents torch's profiler from writing lines to standard error.
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDERR)
    return function(argument)


# Signals that ask a run to stop; a terminal that is closed sends SIGHUP.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# One request may arrive as several signals: Linux sends one for each thread of a killed parent, and
# a terminal and a supervisor may both pass on the same Ctrl-C.
_SAME_REQUEST_SECONDS = 1.0


class Interrupt:
    """While this is active, the first signal of `SIGNALS` is only stored.

    Another one takes effect if it comes at least a second later, and is ignored before that.
    SIGHUP stays ignored if the process ignores it already, as under nohup.

    Args:
        forward: Called with the first signal, e.g. to send it to a child process.

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
        elif now - self._received_at >= _SAME_REQUEST_SECONDS:
            self.__exit__()
            signal.raise_signal(number)


class StopReport:
    """Whether the user has been told that the command was stopped, and how to go on.

    A further Ctrl-C while the process ends is then no news.
    """

    made = False


def exit_code(received: signal.Signals) -> int:
    """Return the exit code of a program that a signal ended: 130 for Ctrl-C."""
    return 128 + received
