"""Tables of addresses for the compiled loops, which run them on torch's threads.

The layout of the tables is in `sinkgd.kernels.cpu.tables`.
"""

import threading
from array import array
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.kernels.cpu.cache import kept_loops
from sinkgd.kernels.cpu.form import Form
from sinkgd.kernels.cpu.tables import (
    BAD,
    FAILED,
    HEADER_FIELDS,
    LOOK_FIELDS,
    MATRIX_FIELDS,
    PANEL,
    PRODUCT_FIELDS,
    SUMS_FIELDS,
    VECTORS,
)
from sinkgd.kernels.cpu.team import torch_team
from sinkgd.kernels.eager import no_movement

# Up to this many entries a matrix is given whole to one thread: its passes then cost less than the
# barriers between the threads that would share them.
WHOLE = 1 << 16
# Below this many entries in all, waking other threads takes longer than the work.
ALONE = 1 << 14

_local = threading.local()  # gradients may be read by several Python threads, as backward hooks do


class Write(NamedTuple):
    """A parameter, by its address, that lies beside a gradient and is turned as it is."""

    param: int
    form: Form
    flag: int = 0  # the address of a bool that allows the update, or 0
    key: int | None = None  # of stochastic rounding
    rank: int = 0  # of what is added
    left: int = 0  # the addresses of what `beside_rows` returns
    right: int = 0


class Vectors(NamedTuple):
    """What a matrix is multiplied with and what comes of it, by addresses; 0 where it is absent."""

    blocks: int  # of sixteen vectors each
    wide: int  # the vectors, all numbers of a column in memory beside each other
    tall: int  # all numbers of a row in memory beside each other: the product with these, or given
    down: int  # the product of the transpose with what is in ``tall``; lies as ``wide``
    squares: int  # the sum of squares of every row in memory; where there is ``wide``


class MatricesJob:
    """A table of gradients, to find their scales or to update parameters by them, or both.

    Args:
        keep: The factor of the parameters.
        step: The factor of ``row * grad * col``, which is added.
    """

    def __init__(self, keep: float = 1.0, step: float = 0.0) -> None:
        self.factors = keep, step
        self.fields: list[int] = []
        self.longest = 0
        self.entries = 0

    def add(
        self,
        grad: int,
        form: Form,
        scales: tuple[int, int],
        write: Write | None = None,
        *,
        started: bool = False,
    ) -> None:
        """Add every matrix of the gradient at ``grad``.

        Args:
            grad: Its address.
            form: Its form.
            scales: The addresses of its row and column scales, float32, those of one matrix after
                those of the other.
            write: What is updated by it.
            started: Whether the column scales hold the first c².
        """
        P, Q, ld, dtype, turned, offsets = form[:6]
        u, v = (scales[1], scales[0]) if turned else scales
        if write is None:
            params, how = (0,) * len(offsets), (0, 0, 0, 0, 0)
            rank = left = right = 0
        else:
            param, beside, flag, key, rank, left, right = write
            params = tuple(param + offset for offset in beside.offsets)
            how = (beside.ld, beside.dtype, flag, key is not None, key or 0)
        place = 0
        for offset, param in zip(offsets, params, strict=True):
            self.fields += (
                grad + offset, P, Q, ld, dtype, turned, u, v, started, 0, param, *how, place,
                rank, left, right,
            )  # fmt: skip
            u += 4 * P
            v += 4 * Q
            left += 4 * P * rank
            right += 4 * rank * -(-Q // VECTORS) * VECTORS
            place += P * Q
        self.longest = max(self.longest, Q)
        self.entries += place

    def find_scales(self, num_iters: int, tol: float | None = None) -> list[int]:
        """Find the scales, then update the parameters, but where no scales were found.

        Returns:
            The numbers of those matrices, as added.
        """
        # Two vectors, each behind what a worker found out; no two threads share a line.
        stride = 2 * 128 * (4 * self.longest // 128 + 2)
        scratch = _scratch(torch.get_num_threads() * stride)
        quotients = (0.0, 0.0) if tol is None else no_movement(tol)
        table = self._run("find_scales", quotients, num_iters, scratch, stride, WHOLE)
        failed = table[FAILED // 8 :: MATRIX_FIELDS]
        return [i for i, status in enumerate(failed) if status] if any(failed) else []

    def take_steps(self) -> None:
        """Update the parameters by scales that are known."""
        self._run("take_steps", (0.0, 0.0), panels=_scratch(torch.get_num_threads() * PANEL))

    def _run(
        self, function: str, quotients: tuple[float, float], *own: int, panels: int = 0
    ) -> "array[int]":
        numbers = array("d", (*self.factors, *quotients))
        table = array("q", self.fields)
        _run(function, table, MATRIX_FIELDS, self.entries, _address(numbers), panels, *own)
        return table


class SumsJob:
    """A table of gradients to add up the squares of, that is kept and run again and again."""

    def __init__(self) -> None:
        self.fields: list[int] = []
        self.longest = 0
        self.entries = 0
        self._table: array[int] | None = None

    def add(self, grad: int, form: Form, weights: int, sums: int, *, rows: bool) -> None:
        """Add every matrix of the gradient at ``grad``.

        Args:
            grad: Its address.
            form: Its form.
            weights: The address of float32 weights, those of one matrix after those of the other:
                of columns for sums of ``rows``, else of rows.
            sums: The address that the sums go to, alike.
            rows: Whether rows are added up.
        """
        P, Q, ld, dtype, turned, offsets = form[:6]
        along = rows != turned
        for offset in offsets:
            self.fields += (grad + offset, P, Q, ld, dtype, along, weights, sums)
            weights += 4 * (Q if along else P)
            sums += 4 * (P if along else Q)
        self.longest = max(self.longest, Q)
        self.entries += P * Q * len(offsets)

    def run(self) -> None:
        """Add up."""
        if self._table is None:
            self._table = array("q", self.fields)
        stride = 128 * (4 * self.longest // 128 + 2)
        scratch = _scratch(torch.get_num_threads() * stride)
        _run("add_up", self._table, SUMS_FIELDS, self.entries, 0, 0, 0, scratch, stride)


class ProductsJob:
    """A table of updates X = row * grad * col to multiply with a few vectors, in one reading."""

    def __init__(self) -> None:
        self.fields: list[int] = []
        self.longest = 0
        self.entries = 0

    def add(
        self, grad: int, form: Form, scales: tuple[int, int], vectors: Vectors, *, place: int
    ) -> None:
        """Add one matrix of the gradient at ``grad``.

        Args:
            grad: The address of the gradient.
            form: Its form.
            scales: The addresses of the row and column scales of this matrix, float32.
            vectors: What it is multiplied with, and where the products go.
            place: Which matrix of the gradient it is.
        """
        P, Q, ld, dtype, turned, offsets = form[:6]
        u, v = (scales[1], scales[0]) if turned else scales
        self.fields += (grad + offsets[place], P, Q, ld, dtype, u, v, *vectors)
        self.longest = max(self.longest, VECTORS * vectors.blocks * Q if vectors.down else 0)
        self.entries += P * Q

    def run(self) -> None:
        """Multiply."""
        # Two pieces for sums that take turns; no two threads share a line.
        stride, threads = 2 * 128 * (4 * self.longest // 128 + 2), torch.get_num_threads()
        scratch = _scratch(threads * (stride + PANEL))
        own = 0, scratch + threads * stride, 0, scratch, stride, WHOLE
        _run("multiply", array("q", self.fields), PRODUCT_FIELDS, self.entries, *own)


class LookJob:
    """A table of tensors to look for NaN and infinity in."""

    def __init__(self) -> None:
        self.fields: list[int] = []
        self.entries = 0

    def add(self, address: int, entries: int, dtype: int) -> None:
        """Add a tensor without gaps."""
        self.fields += (address, entries, dtype, 0)
        self.entries += entries

    def run(self) -> list[bool]:
        """Look; say of each tensor, as added, whether all its entries are finite."""
        table = array("q", self.fields)
        _run("find_bad", table, LOOK_FIELDS, self.entries)
        return [not bad for bad in table[BAD // 8 :: LOOK_FIELDS]]


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
    header = array("q", (_address(table), len(table) // fields, workers, 0, *own))
    header.extend([0] * (HEADER_FIELDS - len(header)))
    team = torch_team()
    assert team is not None, "the backend is missing here"
    team.run(_loops()[function], _address(header), workers if entries > ALONE else 1)


def float32_address(x: Tensor) -> int:
    """Return where the numbers of ``x`` begin, after a check that the loops may use them as theirs.

    The loops read and write float32 without gaps, by address, and would overrun any other buffer.

    Raises:
        TypeError: If ``x`` is not contiguous float32 on a CPU.
    """
    if x.dtype != torch.float32 or not x.is_cpu or not x.is_contiguous():
        raise TypeError(
            f"the compiled loops need contiguous float32 on a CPU; got {x.dtype} on {x.device} "
            f"of shape {tuple(x.shape)} and strides {x.stride()}"
        )
    return x.data_ptr()


def _address(numbers: "array[int] | array[float]") -> int:
    return numbers.buffer_info()[0]


def _scratch(size: int) -> int:
    """Return the address of this thread's ``size`` bytes, kept from call to call."""
    held: Tensor | None = getattr(_local, "scratch", None)
    if held is None or held.numel() < size:
        held = _local.scratch = torch.empty(size + 128, dtype=torch.uint8, device="cpu")
    return (held.data_ptr() + 127) // 128 * 128


def compile_loops() -> None:
    """Compile the loops, or read them from the cache, as the first job does otherwise.

    It takes a minute where they were not compiled before.
    """
    _loops()


@cache
def _loops() -> dict[str, int]:
    """Return the addresses of the jobs' functions, compiled or read from the cache."""
    with kept_loops():
        solve = import_module("sinkgd.kernels.cpu.solve")
        step = import_module("sinkgd.kernels.cpu.step")
        look = import_module("sinkgd.kernels.cpu.look")
        sums = import_module("sinkgd.kernels.cpu.sums")
        products = import_module("sinkgd.kernels.cpu.multiply")
    functions = {
        "find_scales": solve.find_scales,
        "take_steps": step.take_steps,
        "find_bad": look.find_bad,
        "add_up": sums.add_up,
        "multiply": products.multiply,
    }
    return {name: function.address for name, function in functions.items()}
