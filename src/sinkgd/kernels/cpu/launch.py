"""Run the compiled loops on torch's own threads, and cache them between processes.

A second thread pool would compete with torch's threads, which spin for milliseconds after each
operation. The loops therefore run on torch's OpenMP team. This module calls the runtime that torch
is linked against, at the entry point that compilers use; the runtime then calls a compiled function
on as many threads as torch would use, or on one if there is little work. Several Python threads may
run loops at the same time, and a process may fork wherever torch allows it.

A loop works on a table of int64 fields (`sinkgd.kernels.cpu.tables`).
"""

import ctypes
import hashlib
import os
import sys
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import torch
from torch import Tensor

# Below this many entries in all, waking other threads takes longer than the work.
ONE_THREAD = 1 << 14
# Number of fields of a job's header, including the counter of the barrier.
HEADER_FIELDS = 48

_SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
# The functions that can be launched, and the modules that define them.
_LOOPS = {
    "find_scales": "solve",
    "update": "update",
    "isfinite": "reductions",
    "weighted_sums": "reductions",
    "multiply": "skinny_matmul",
}

# Per Python thread, because several may run loops at the same time, for example in backward hooks.
_local = threading.local()


def launch(function: str, table: "array[int]", fields: int, entries: int, *more: int) -> None:
    """Run a compiled function on a table. An empty table is skipped.

    Args:
        function: The function's name, a key of `_LOOPS`.
        table: The table, row after row.
        fields: Number of fields of a row.
        entries: How many matrix entries are read in all.
        more: The fields of the header that follow those that every job has.
    """
    if not table:
        return
    workers = torch.get_num_threads()
    address, _ = table.buffer_info()
    header = array("q", (address, len(table) // fields, workers, 0, *more))
    header.extend([0] * (HEADER_FIELDS - len(header)))
    openmp = torch_openmp()
    assert openmp is not None, "the backend is missing here"
    threads = workers if entries > ONE_THREAD else 1
    openmp.run(_announced_loops()[function], header.buffer_info()[0], threads)


def scratch(size: int) -> int:
    """Return the address of ``size`` bytes, aligned to 128, in a buffer of this Python thread.

    The thread's next call may return the same memory.
    """
    held: Tensor | None = getattr(_local, "scratch", None)
    if held is None or held.numel() < size:
        held = _local.scratch = torch.empty(size + 128, dtype=torch.uint8, device="cpu")
    return (held.data_ptr() + 127) // 128 * 128


class OpenMP:
    """The functions of an OpenMP runtime that the loops need."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._parallel = library.GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._parallel.restype = None
        # The compiled loops call these functions by these names.
        self.symbols = {
            "sinkgd_yield": _address(ctypes.CDLL(None).sched_yield),
            "sinkgd_thread_num": _address(library.omp_get_thread_num),
            "sinkgd_num_threads": _address(library.omp_get_num_threads),
        }

    def run(self, function: int, job: int, threads: int) -> None:
        """Call the compiled ``function(job)`` on each of ``threads`` threads, and wait."""
        self._parallel(function, job, threads, 0)


def _address(entry: object) -> int:
    address = ctypes.cast(entry, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None
    return address


@cache
def torch_openmp() -> OpenMP | None:
    """Return torch's OpenMP runtime, or None if it is not found or lacks a function."""
    path = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{_SUFFIX}"
    try:
        # Symbols are also looked up in the libraries that this one is linked against, and so in the
        # OpenMP runtime.
        return OpenMP(ctypes.CDLL(str(path)))
    except (OSError, AttributeError):
        return None


def compile_loops() -> None:
    """Compile the loops or read them from the cache, as the first launch would do.

    Compiling takes a minute or two of processor time. Unlike the first launch, this function does
    not announce it.
    """
    _loops()


@cache
def _announced_loops() -> dict[str, int]:
    """Return the loops; if they have to be compiled, say so on standard error."""
    if not loops_are_compiled():
        kept = f"once; they are kept in {cache_folder()}"
        if not cache_is_shared():
            kept = "in every process; set NUMBA_CACHE_DIR to a writable folder to keep them"
        sys.stderr.write(f"sinkgd: compiling the CPU loops, which takes a minute or two, {kept}\n")
        sys.stderr.flush()
    return _loops()


@cache
def _loops() -> dict[str, int]:
    """Return the address of each compiled function."""
    with _cached_by_numba():
        return {
            name: getattr(import_module(f"sinkgd.kernels.cpu.{module}"), name).address
            for name, module in _LOOPS.items()
        }


@contextmanager
def _cached_by_numba() -> Iterator[None]:
    """Make `cache_folder` numba's cache for modules that are imported in this context."""
    import numba  # noqa: PLC0415 - optional, and half a second to import

    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(cache_folder())
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def loops_are_compiled() -> bool:
    """Whether the cache contains every loop, so that `compile_loops` has little to compile."""
    found = {path.name.partition("-")[0] for path in cache_folder().rglob("*.nbc")}
    return found >= {f"{module}.{loop}" for loop, module in _LOOPS.items()}


def cache_is_shared() -> bool:
    """Whether other processes will find what this one compiles."""
    cache_folder()
    return not _temporary.cache_info().currsize


@cache
def cache_folder() -> Path:
    """Return a writable folder for compiled functions.

    It is in NUMBA_CACHE_DIR if that is set, else in the package's or the user's cache. If none of
    these is writable, a temporary folder is used, which is removed when the process ends.

    The folder's name has a digest of all files that the loops are compiled from. numba itself would
    only notice a change in the file of the cached function, not in the files of the functions that
    it calls.
    """
    here = Path(__file__).parent
    sources = [*sorted(here.glob("*.py")), here.parent / "rounding.py"]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    name = f"sinkgd-{digest.hexdigest()[:16]}"
    home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    parents = [chosen] if chosen else [str(here / "__pycache__"), f"{home}/sinkgd"]
    for parent in parents:
        path = Path(parent).expanduser() / name
        if _is_writable(path):
            return path
    return Path(_temporary().name)


def _is_writable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path).close()
    except OSError:
        return False
    return True


@cache
def _temporary() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="sinkgd-")
