"""The tables that kernels read: what a row means, how a table is built, its copies on a device.

All entries are int64. Offsets and strides count elements, unless stated otherwise.

Letters, everywhere in this package:
    P, Q: the number of rows in memory of one matrix, and their length
    ld: elements from one row in memory to the next
    u, v: the scales of the P rows and of the Q columns in memory: r and c, or c and r for a matrix
        that is transposed in memory
    BM, BN: rows and columns in memory of a tile
"""

import threading
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.kernels.layout import Layout, dense_layout

ALIGNED_FLOATS = 4  # floats in 16 bytes; vectors of scales and sums begin at multiples of this

# Where the scales of one side come from: they are given, or found from the unscaled gradient, or
# found from the gradient with its previous scales.
GIVEN, UNSCALED, SCALED = 0, 1, 2


class HalfMatrix(NamedTuple):
    """A matrix of a gradient whose scales are found by half iterations."""

    tensor: int  # index of the gradient's address
    offset: int  # from the first entry of the tensor to that of the matrix
    P: int
    Q: int
    ld: int
    u: int  # offset of its scales among the scales of all matrices
    v: int
    start: int  # offset of its initial column scales in the tensor that gives them
    row_sums: int = 0  # offset of the partial sums of its rows: a vector for each column of tiles
    col_sums: int = 0  # offset of the partial sums of its columns: a vector for each row of tiles
    number: int = 0  # index of the matrix, from 0
    unused: int = 0


class TileProgram(NamedTuple):
    """The tiles of one program: some of a row of tiles, or of a column of tiles."""

    matrix: int  # row of the table of matrices
    line: int  # index of the column of tiles if rows are summed, else of the row of tiles
    first: int  # the first tile in that line
    end: int


class UpdateMatrix(NamedTuple):
    """A matrix of a parameter to update."""

    tensor: int  # row of `UpdateAddresses`
    offset: int  # from the first entry of the parameter to that of the matrix
    grad_offset: int
    P: int
    Q: int
    ld: int
    grad_ld: int
    u: int  # offset of its scales in their tensors
    v: int
    entry: int  # index of its first entry, counted row by row over the parameter
    entry_row_step: int  # what one row in memory adds to the index
    entry_col_step: int
    rank: int = 0  # rank of the matrix that is subtracted, tall @ wide.T
    factor: int = 0  # offset, among the factors, of the one that multiplies the scaled gradient
    tall: int = 0  # offset of the P by ``rank`` numbers in their tensor
    tall_ld: int = 0  # from one of its rows to the next
    tall_col_step: int = 0  # from one of its columns to the next
    wide: int = 0  # this and the next two: the same for the Q by ``rank`` numbers
    wide_ld: int = 0
    wide_col_step: int = 0


class UpdateAddresses(NamedTuple):
    """The addresses of the tensors of one parameter's update; 0 for an absent tensor."""

    param: int
    grad: int
    u: int
    v: int
    allowed: int
    key: int
    factor: int = 0
    tall: int = 0
    wide: int = 0


class DescentMatrix(NamedTuple):
    """A matrix of a gradient, and of its parameter, to descend on."""

    tensor: int  # index of the addresses of the gradient and of the parameter
    offset: int  # from the first entry of the gradient to that of the matrix
    P: int
    Q: int
    ld: int
    u: int  # offset of its scales among the scales of all matrices
    v: int
    start: int  # offset of its initial column scales in the tensor that gives them
    state: int  # offset of its `DescentState` among the counters
    # Offset, among the counters, of the flag of the user's parameter: whether some entry of its
    # gradient is not finite.
    nonfinite: int
    param_offset: int
    param_ld: int
    entry: int  # index of its first entry, counted row by row over the parameter
    entry_row_step: int  # what one row in memory adds to the index
    entry_col_step: int
    partial_sums: int = 0  # offset of the partial sums of its programs, a vector for each program
    arrivals: int = 0  # offset of the counters of finished programs, one for each group
    programs: int = 0


class DescentState(NamedTuple):
    """What a launch of a descent stores about a matrix for later launches: int32, initially 0."""

    nonzero_u: int  # how many scales are not zero
    nonzero_v: int
    moved: int  # whether a row scale moved in this iteration
    converged: int  # whether there was an iteration in which no row scale moved


class RowProgram(NamedTuple):
    """The rows in memory of one program."""

    matrix: int  # row of the table of matrices
    number: int  # index of the program among the matrix's programs
    first: int  # the first row
    end: int


class ProductMatrix(NamedTuple):
    """A matrix of an update that is multiplied by vectors.

    Vectors are the columns of a buffer. Their offsets count rows of this buffer.
    """

    tensor: int  # index of the gradient's address
    offset: int  # from the first entry of the tensor to that of the matrix
    P: int
    Q: int
    ld: int
    u: int  # index of the address of its P scales
    v: int
    u_offset: int  # from there to its first scale
    v_offset: int
    tall: int  # offset of its vectors with an entry for each row in memory
    wide: int  # offset of its vectors with an entry for each column
    u_power: int  # index of a power of two that multiplies u, so that u and v are of similar size
    v_power: int
    tall_shared: int  # offset of its vectors among the vectors that matrices share
    wide_shared: int


class ShardMatrix(NamedTuple):
    """A matrix of a gradient's shard whose squares are summed."""

    tensor: int  # index of the gradient's address
    offset: int  # from the first entry of the tensor to that of the matrix
    ld: int
    P: int
    Q: int
    # Where its P entries begin in the sums and weights of rows, or in those of columns if the
    # matrix is transposed in memory
    rows: int
    cols: int


class Operand(NamedTuple):
    """A tensor as the kernels read or write it."""

    dtype: torch.dtype
    layout: Layout
    aligned: bool  # whether its first entry is aligned to 16 bytes


def operand_of(x: Tensor) -> Operand:
    """Return how kernels read a tensor whose rows or columns are dense."""
    return Operand(x.dtype, dense_layout(x), x.data_ptr() % 16 == 0)


def vector_width(widest: int, *matrices: tuple[Operand, int]) -> int:
    """Return ``widest`` if loads of that many entries are aligned in every matrix, else 1.

    The row stride of a matrix with one row does not matter.

    Args:
        widest: The number of entries in 16 bytes.
        matrices: Operands, with the offset of a matrix in each.
    """
    aligned = all(
        operand.aligned
        and offset % widest == 0
        and operand.layout.Q % widest == 0
        and (operand.layout.ld % widest == 0 or operand.layout.P == 1)
        for operand, offset in matrices
    )
    return widest if aligned else 1


def padded(length: int) -> int:
    """Return ``length``, a number of floats, rounded up to a multiple of 16 bytes."""
    return -(-length // ALIGNED_FLOATS) * ALIGNED_FLOATS


def scale_offsets(shapes: Iterable[torch.Size]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return the offsets of each tensor's row scales, of its column scales, and the total size."""
    rows, cols, end = [], [], 0
    for *batch, m, n in shapes:
        rows.append(end)
        cols.append(end + padded(prod(batch) * m))
        end = cols[-1] + padded(prod(batch) * n)
    return tuple(rows), tuple(cols), end


class TableRows(NamedTuple):
    """Consecutive rows of a plan's table."""

    offset: int  # entries of the table before the first row
    rows: int  # number of rows


class TableBuilder:
    """Concatenates rows of int64, of any lengths, into one table."""

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []
        self.size = 0

    def add(self, *rows: Tensor) -> TableRows:
        """Append rows, and return where they are."""
        added = TableRows(self.size, sum(map(len, rows)))
        self._pieces.extend(some.flatten() for some in rows)
        self.size += sum(some.numel() for some in rows)
        return added

    def build(self) -> Tensor:
        """Return all rows as one vector, on the host."""
        if not self._pieces:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        return torch.cat(self._pieces)


# The most copies that are kept, except those that graphs read. If gradients are freed after each
# step, their addresses change, and few tables of addresses recur.
MAX_COPIES = 1024


class _Copy(NamedTuple):
    on_device: Tensor
    host: Tensor  # a graph that has captured the copy reads this at every replay


# Bytes of pinned memory that wait for captures. A capture takes 72 bytes for the `UpdateAddresses`
# of each matrix, and less for its other tables, unless an earlier step had the same addresses.
RESERVED = 1 << 22


class DeviceTables:
    """Copies of tables on devices: copied without waiting, and kept for later calls.

    A copy is found again by its values or its host tensor, and by the stream that reads it. The
    device must be the current one. Several threads may ask at once.
    """

    def __init__(self) -> None:
        self._recent: OrderedDict[tuple[Hashable, ...], _Copy] = OrderedDict()
        # A graph reads its tables at every replay. Nothing tells when the graph is deleted, so its
        # copies are kept for good.
        self._captured: list[_Copy] = []
        self._reserved: Tensor | None = None
        self._taken = 0  # bytes of `_reserved` that graphs read
        self._lock = threading.Lock()

    def addresses(self, values: tuple[int, ...], device: torch.device) -> Tensor:
        """Return ``values`` on ``device``.

        Raises:
            RuntimeError: As in `table`.
        """
        key = values, *_stream(device)
        with self._lock:
            found = self._find(key, device)
            if found is not None:
                return found
            return self._copy(key, torch.frombuffer(array("q", values), dtype=torch.int64), device)

    def table(self, host: Tensor, device: torch.device) -> Tensor:
        """Return a copy on ``device`` of ``host``, a tensor that must never change.

        Raises:
            RuntimeError: If a graph is captured, ``host`` was not copied before, and no pinned
                memory is left for it.
        """
        key = id(host), *_stream(device)  # the copy keeps ``host``, so no other tensor has its id
        with self._lock:
            found = self._find(key, device)
            return self._copy(key, host, device) if found is None else found

    def _find(self, key: tuple[Hashable, ...], device: torch.device) -> Tensor | None:
        # A copy made during a capture is filled only when the graph is replayed, so `_recent` does
        # not have it: other launches must not read it.
        copy = self._recent.get(key)
        if copy is None:
            return self._copied_before_capture(key) if capturing(device) else None
        self._recent.move_to_end(key)
        if capturing(device):
            self._captured.append(copy)
        return copy.on_device

    def _copied_before_capture(self, key: tuple[Hashable, ...]) -> Tensor | None:
        """Return a copy from another stream, or None; the capture has waited for that stream."""
        for (*content, _), copy in self._recent.items():
            if content == [*key[:-1]]:
                self._captured.append(copy)
                return copy.on_device
        return None

    def _copy(self, key: tuple[Hashable, ...], host: Tensor, device: torch.device) -> Tensor:
        if capturing(device):
            source = self._pinned_before(host)
            copy = _Copy(source.to(device, non_blocking=True), source)
            self._captured.append(copy)
            return copy.on_device
        source = host
        if device.type != "cpu":
            self._reserve()
            source = torch.empty_like(host, pin_memory=True).copy_(host)
        copy = _Copy(source.to(device, non_blocking=True), host)
        self._recent[key] = copy
        if len(self._recent) > MAX_COPIES:
            self._recent.popitem(last=False)
        return copy.on_device

    def _reserve(self) -> None:
        """Allocate pinned memory for captures, during which none may be allocated."""
        if self._reserved is None or 2 * self._taken > self._reserved.numel():
            self._reserved = torch.empty(RESERVED, dtype=torch.uint8, device="cpu", pin_memory=True)
            self._taken = 0  # graphs keep the older memory

    def _pinned_before(self, host: Tensor) -> Tensor:
        """Copy ``host`` to pinned memory that was allocated before the capture.

        torch refuses to capture a copy from other memory:
        https://github.com/pytorch/pytorch/pull/172156
        """
        if self._reserved is None:
            raise RuntimeError(
                "a CUDA graph captures the first step; take at least one step before the capture"
            )
        begin = self._taken
        end = begin + host.nbytes
        if end > self._reserved.numel():
            raise RuntimeError(
                f"a CUDA graph needs {host.nbytes} bytes of pinned memory, and "
                f"{self._reserved.numel() - begin} are left; take a step with new gradients "
                "between two captures, or capture a step whose gradients are where they were in an "
                "earlier one"
            )
        self._taken = -(-end // 16) * 16
        return self._reserved[begin:end].view(host.dtype).copy_(host)


def capturing(device: torch.device) -> bool:
    """Whether work on ``device`` is being captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> tuple[torch.device, int]:
    # Another stream does not wait for the copy.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return device, stream
