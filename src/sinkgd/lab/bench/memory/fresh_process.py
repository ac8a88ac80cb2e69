"""A call in a process of its own, whose memory nobody has used before."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from sinkgd.lab.launch import stop_with_parent

Subject = TypeVar("Subject")
Found = TypeVar("Found")

_STDERR = 2


def in_fresh_process(function: Callable[[Subject], Found], subject: Subject) -> Found:
    """Call a function of a module's top level; what it raises is raised here.

    Raises:
        BrokenProcessPool: If the process was killed.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=stop_with_parent) as pool:
        return pool.submit(_quietly, function, subject).result()


def _quietly(function: Callable[[Subject], Found], subject: Subject) -> Found:
    # The profiler writes lines to the standard error that no setting turns off.
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDERR)
    return function(subject)
