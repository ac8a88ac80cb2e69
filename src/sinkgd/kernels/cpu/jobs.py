"""Tables of addresses for the compiled loops, which run them on torch's threads.

The layout of the tables is in `sinkgd.kernels.cpu.tables`.
"""

import threading
from array import array
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from sinkgd.kernels.cpu.cache import kept_loops
from sinkgd.kernels.cpu.form import Form
from sinkgd.kernels.cpu.tables import (
    BAD,
    FAILED,
    GRADIENT_FIELDS,
    HEADER_FIELDS,
    LOOK_FIELDS,
    UPDATE_FIELDS,
)
from sinkgd.kernels.cpu.team import torch_team
from sinkgd.kernels.eager import no_movement

# Up to this many entries a matrix is given whole to one thread: its passes then cost less than the
# barriers between the threads that would share them.
WHOLE = 1 << 16
# Below this many entries in all, waking other threads takes longer than the work.
ALONE = 1 << 14

_local = threading.local()  # gradients may be read by several Python threads, as backward hooks do


class ScalesJob:
    """A table of gradients to find the scales of."""

    def __init__(self) -> None:
        self.table = array("q")
        self.longest = 0
        self.entries = 0

    def add(self, grad: int, form: Form, row: int, col: int, *, started: bool) -> None:
        """Add every matrix of the gradient at ``grad``.

        Its scales go to the addresses ``row`` and ``col``, float32, one matrix after the other.
        Where it is ``started``, ``col`` holds the first c².
        """
        P, Q, ld, dtype, turned, offsets, _ = form
        u, v = (col, row) if turned else (row, col)
        for offset in offsets:
            self.table.extend((grad + offset, P, Q, ld, dtype, turned, u, v, started, 0))
            u += 4 * P
            v += 4 * Q
        self.longest = max(self.longest, Q)
        self.entries += P * Q * len(offsets)

    def run(self, num_iters: int, tol: float | None = None) -> list[int]:
        """Find the scales; return the numbers of the matrices, as added, that failed."""
        # Two vectors, each behind what a worker found out; no two threads share a line.
        stride = 2 * 128 * (4 * self.longest // 128 + 2)
        scratch = _scratch(torch.get_num_threads() * stride)
        quotients = array("d", (0.0, 0.0) if tol is None else no_movement(tol))
        own = (quotients.buffer_info()[0], num_iters, scratch, stride, WHOLE)
        _run("find_scales", self.table, GRADIENT_FIELDS, self.entries, *own)
        failed = self.table[FAILED // 8 :: GRADIENT_FIELDS]
        return [i for i, status in enumerate(failed) if status] if any(failed) else []


class UpdateJob:
    """A table of parameters to update."""

    def __init__(self) -> None:
        self.table = array("q")
        self.entries = 0

    def add(
        self,
        addresses: tuple[int, int],
        forms: tuple[Form, Form],
        scales: tuple[int, int],
        *,
        flag: int,
        key: int | None,
    ) -> None:
        """Add every matrix of a parameter and its gradient, which is turned as it is.

        Args:
            addresses: Of parameter and gradient.
            forms: Of parameter and gradient.
            scales: The addresses of row and column scales.
            flag: The address of a bool that allows the update, or 0.
            key: Of stochastic rounding, or None.
        """
        P, Q, ld, dtype, turned, offsets, _ = forms[0]
        _, _, grad_ld, grad_dtype, _, grad_offsets, _ = forms[1]
        param, grad = addresses
        u, v = (scales[1], scales[0]) if turned else scales
        fields = (P, Q, ld, grad_ld, dtype, grad_dtype, turned)
        rounding = (0, 0) if key is None else (1, key)
        place = 0
        for offset, grad_offset in zip(offsets, grad_offsets, strict=True):
            self.table.extend(
                (param + offset, grad + grad_offset, *fields, u, v, flag, *rounding, place)
            )
            u += 4 * P
            v += 4 * Q
            place += P * Q
        self.entries += place

    def run(self, keep: float, step: float) -> None:
        """Set each parameter to ``keep * param + step * row * grad * col``."""
        factors = array("d", (keep, step))
        _run("take_steps", self.table, UPDATE_FIELDS, self.entries, factors.buffer_info()[0])


class LookJob:
    """A table of tensors to look for NaN and infinity in."""

    def __init__(self) -> None:
        self.table = array("q")
        self.entries = 0

    def add(self, address: int, entries: int, dtype: int) -> None:
        """Add a tensor without gaps."""
        self.table.extend((address, entries, dtype, 0))
        self.entries += entries

    def run(self) -> list[bool]:
        """Look; say of each tensor, as added, whether all its entries are finite."""
        _run("find_bad", self.table, LOOK_FIELDS, self.entries)
        return [not bad for bad in self.table[BAD // 8 :: LOOK_FIELDS]]


def _run(function: str, table: "array[int]", fields: int, entries: int, *own: int) -> None:
    """Run a compiled function on a table, whose rows have so many ``fields``.

    Args:
        function: Its name.
        table: What it works on; nothing is run where it is empty.
        fields: Of a row.
        entries: Numbers that are read in all.
        own: The fields of the header after those that all jobs have.
    """
    if not table:
        return
    workers = torch.get_num_threads()
    header = array("q", (table.buffer_info()[0], len(table) // fields, workers, 0, *own))
    header.extend([0] * (HEADER_FIELDS - len(header)))
    team = torch_team()
    assert team is not None, "the backend is missing here"
    team.run(_loops()[function], header.buffer_info()[0], workers if entries > ALONE else 1)


def _scratch(size: int) -> int:
    """Return the address of this thread's ``size`` bytes, kept from call to call."""
    held: Tensor | None = getattr(_local, "scratch", None)
    if held is None or held.numel() < size:
        held = _local.scratch = torch.empty(size + 128, dtype=torch.uint8)
    return (held.data_ptr() + 127) // 128 * 128


@cache
def _loops() -> dict[str, int]:
    """Return the addresses of the jobs' functions, compiled or read from the cache."""
    with kept_loops():
        solve = import_module("sinkgd.kernels.cpu.solve")
        step = import_module("sinkgd.kernels.cpu.step")
        look = import_module("sinkgd.kernels.cpu.look")
    functions = {
        "find_scales": solve.find_scales,
        "take_steps": step.take_steps,
        "find_bad": look.find_bad,
    }
    return {name: function.address for name, function in functions.items()}
