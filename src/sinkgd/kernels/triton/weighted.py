"""The kernel of the weighted sums of squares of pieces: a program adds up whole lines by itself.

Squares and sums are float64, which holds those of any float32: nothing is brought to one size, and
a gradient is read once a call. A line of a piece goes to one program, so its bits depend on it
alone. It needs 4 float64 instructions an entry, few for a data center's GPU, many for others; not
timed.

Letters, everywhere in this file:
    P, Q: the rows in memory of one matrix, and their length
    ld: elements from one row in memory to the next
"""

from typing import NamedTuple

import triton
import triton.language as tl

from sinkgd.kernels.triton.primitives import add_up, field, matrix_at, row_length


class Piece(NamedTuple):
    """A matrix: a row of a table."""

    grad: int  # the place of its gradient's address
    offset: int  # of its first entry, in elements
    ld: int
    P: int
    Q: int
    rows: int  # where its numbers of rows in memory begin, among those of all gradients
    cols: int


@triton.jit
def add_up_weighted(
    addresses,
    pieces,
    programs,
    weights,
    sums,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ALONG: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write the sums of squares times weights along rows in memory, or down columns.

    Args:
        addresses: Of the gradients.
        pieces: Rows of `Piece`.
        programs: Of each program, its piece and which of its blocks of lines it adds up.
        weights: float64, of the entries of a line.
        sums: float64, one a line.
        DTYPE: Of the gradients.
        BM: Rows of a tile.
        BN: Columns of a tile.
        ALONG: Whether lines are rows in memory.
        VECTOR: Entries in 16 bytes where loads are that wide, else 1.
    """
    place = tl.program_id(0) * 2
    piece = pieces + tl.load(programs + place) * FIELDS
    block = tl.load(programs + place + 1).to(tl.int32)
    P = tl.load(piece + _P).to(tl.int32)
    Q = row_length(piece + _Q, VECTOR)
    address = addresses + tl.load(piece + _GRAD)
    base, ld = matrix_at(address, piece + _OFFSET, piece + _LD, DTYPE, VECTOR)
    row_place, col_place = tl.load(piece + _ROWS), tl.load(piece + _COLS)
    total = tl.full((BM, BN), 0.0, tl.float64)
    if ALONG:
        rows = block * BM + tl.arange(0, BM)
        for first in range(0, Q, BN):
            cols = first + tl.arange(0, BN)
            squares = _squares(base, ld, rows, cols, P, Q)
            total += squares * tl.load(weights + col_place + cols, cols < Q, 0.0)[None, :]
        tl.store(sums + row_place + rows, add_up(total, 1), rows < P)
    else:
        cols = block * BN + tl.arange(0, BN)
        for first in range(0, P, BM):
            rows = first + tl.arange(0, BM)
            squares = _squares(base, ld, rows, cols, P, Q)
            total += squares * tl.load(weights + row_place + rows, rows < P, 0.0)[:, None]
        tl.store(sums + col_place + cols, add_up(total, 0), cols < Q)


@triton.jit
def _squares(base, ld, rows, cols, P, Q):
    lies = base + (rows.to(tl.int64) * ld)[:, None] + cols[None, :]
    inside = (rows < P)[:, None] & (cols < Q)[None, :]
    entries = tl.load(lies, mask=inside, other=0.0).to(tl.float64)
    return entries * entries


FIELDS = tl.constexpr(len(Piece._fields))
_GRAD, _OFFSET, _LD = (field(Piece, name) for name in ("grad", "offset", "ld"))
_P, _Q, _ROWS, _COLS = (field(Piece, name) for name in ("P", "Q", "rows", "cols"))
