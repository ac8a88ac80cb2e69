"""How a run is started, with as many processes as it has now, and how each of them leaves."""

import ctypes
import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from threading import Thread
from typing import TypeVar

STARTED_BY = "SINKGD_STARTED_BY"  # variable: the command that started this one as a part of it
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STDERR = 2

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def launched_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(environment.get("WORLD_SIZE", "1"))


def launch_command(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """Return how to run ``sinkgd`` with ``arguments``, under torchrun where that runs now.

    Args:
        arguments: After the program's name.
        environment: In which torchrun says how many processes there are.

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
    """Return ``code``; under torchrun, end the process with it at once, after what was written.

    Threads of torch's process groups outlive the main one there. What they still hold of Python
    they may return to an interpreter that is gone, and abort a run that is finished.
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
    """In a process of multiprocessing, send this process a SIGTERM once its parent is gone.

    Also where a server forked it, whose end Linux would tell instead.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=watch, daemon=True).start()


def in_fresh_process(function: Callable[[Argument], Result], argument: Argument) -> Result:
    """Call a top-level function of a module in a new process; raise here what it raises there.

    Raises:
        BrokenProcessPool: If the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=stop_with_parent) as pool:
        return pool.submit(_quietly, function, argument).result()


def _quietly(function: Callable[[Argument], Result], argument: Argument) -> Result:
    # torch's profiler writes lines to the standard error that no setting turns off.
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDERR)
    return function(argument)
