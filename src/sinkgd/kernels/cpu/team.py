"""Torch's own threads, lent for one job.

A second pool of threads would compete with torch's, which keep spinning for milliseconds after each
of its operations. So a job runs on the very team of torch: the OpenMP runtime that torch is linked
against is asked, by the entry that compilers use, to run a compiled function on as many threads as
torch would use. Several Python threads may do so at once, and a process may fork as far as torch
itself allows it.
"""

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch

SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")


class Team:
    """The entries of an OpenMP runtime that a job needs."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.fork = library.GOMP_parallel
        self.fork.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self.fork.restype = None
        # Compiled loops call these by the names on the left.
        self.symbols = {
            "sinkgd_yield": _address(ctypes.CDLL(None).sched_yield),
            "sinkgd_thread_num": _address(library.omp_get_thread_num),
            "sinkgd_num_threads": _address(library.omp_get_num_threads),
        }

    def run(self, function: int, job: int, threads: int) -> None:
        """Call the compiled ``function(job)`` on each of ``threads`` threads, and wait."""
        self.fork(function, job, threads, 0)


def _address(entry: object) -> int:
    address = ctypes.cast(entry, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None
    return address


@cache
def torch_team() -> Team | None:
    """Return the team of torch, or None where its OpenMP runtime lacks an entry."""
    path = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{SUFFIX}"
    try:
        # Symbols are looked up in what the library is linked against, its OpenMP runtime included.
        return Team(ctypes.CDLL(str(path)))
    except (OSError, AttributeError):
        return None
