"""Products of a few rows of an update X with eight vectors at a time, either way.

X = u∘G∘v, whose entries are made where they are used. A block is eight vectors: along the rows of X
they lie as eight rows of Q numbers, and what comes of them as eight numbers a row of X; down its
columns it is the other way round. Letters: see `sinkgd.kernels.cpu.tables`.
"""

from numba import float32

from sinkgd.kernels.cpu.instructions import (
    LANES,
    get_float,
    inlined,
    load,
    plus,
    put_float,
    splat,
    store,
    times,
    times_plus,
    total,
    totals,
)
from sinkgd.kernels.cpu.tables import VECTORS

ROWS = 8  # that are multiplied along before they are multiplied down, from the cache


@inlined
def _entries(dtype, g, r, c, count):
    """Sixteen entries of X, in the order in which the update multiplies."""
    return times(times(load(dtype, g, count), r), c)


@inlined
def _add_two(
    dtype, g, ld, r, s, c, w, apart, count,
    p, q, a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7,
):  # fmt: skip
    """Add 16 columns of two rows: their squares, and what eight vectors make of them."""
    x, y = _entries(dtype, g, r, c, count), _entries(dtype, g + ld, s, c, count)
    p, q = times_plus(x, x, p), times_plus(y, y, q)
    v = load(float32(0), w, count)
    a0, b0 = times_plus(x, v, a0), times_plus(y, v, b0)
    v = load(float32(0), w + apart, count)
    a1, b1 = times_plus(x, v, a1), times_plus(y, v, b1)
    v = load(float32(0), w + 2 * apart, count)
    a2, b2 = times_plus(x, v, a2), times_plus(y, v, b2)
    v = load(float32(0), w + 3 * apart, count)
    a3, b3 = times_plus(x, v, a3), times_plus(y, v, b3)
    v = load(float32(0), w + 4 * apart, count)
    a4, b4 = times_plus(x, v, a4), times_plus(y, v, b4)
    v = load(float32(0), w + 5 * apart, count)
    a5, b5 = times_plus(x, v, a5), times_plus(y, v, b5)
    v = load(float32(0), w + 6 * apart, count)
    a6, b6 = times_plus(x, v, a6), times_plus(y, v, b6)
    v = load(float32(0), w + 7 * apart, count)
    a7, b7 = times_plus(x, v, a7), times_plus(y, v, b7)
    return p, q, a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7


@inlined
def along(dtype, size, g, ld, Q, u, next_u, v, wide, apart, tall, next_tall, squares, next_squares):
    """Multiply two rows of X with eight vectors; add up their squares, too.

    Args:
        dtype: Of G, as `load` has it.
        size: Its bytes.
        g: The first row of G.
        ld: Bytes to the other one; 0 where there is none.
        Q: Columns.
        u: The scale of the first row.
        next_u: That of the other.
        v: The scales of the columns.
        wide: The vectors.
        apart: Bytes from one vector to the next.
        tall: Where eight numbers of the first row go.
        next_tall: Where those of the other go.
        squares: Where the sum of the first row's squares goes.
        next_squares: Where that of the other goes.
    """
    full = Q - Q % LANES
    r, s = splat(get_float(u)), splat(get_float(next_u))
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = splat(float32(0))
    b0 = b1 = b2 = b3 = b4 = b5 = b6 = b7 = splat(float32(0))
    p = q = splat(float32(0))
    for j in range(0, full, LANES):
        c = load(float32(0), v + 4 * j, None)
        p, q, a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7 = _add_two(
            dtype, g + j * size, ld, r, s, c, wide + 4 * j, apart, None,
            p, q, a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7,
        )  # fmt: skip
    if full < Q:
        c = load(float32(0), v + 4 * full, Q - full)
        p, q, a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7 = _add_two(
            dtype, g + full * size, ld, r, s, c, wide + 4 * full, apart, Q - full,
            p, q, a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7,
        )  # fmt: skip
    store(float32(0), tall, totals(a0, a1, a2, a3, a4, a5, a6, a7), VECTORS)
    store(float32(0), next_tall, totals(b0, b1, b2, b3, b4, b5, b6, b7), VECTORS)
    put_float(squares, total(p))
    put_float(next_squares, total(q))


@inlined
def _add_row(dtype, g, u, c, tall, count, a0, a1, a2, a3, a4, a5, a6, a7):
    """Add 16 columns of a row, times its numbers, to the eight sums of each column."""
    x = _entries(dtype, g, splat(get_float(u)), c, count)
    a0 = times_plus(x, splat(get_float(tall)), a0)
    a1 = times_plus(x, splat(get_float(tall + 4)), a1)
    a2 = times_plus(x, splat(get_float(tall + 8)), a2)
    a3 = times_plus(x, splat(get_float(tall + 12)), a3)
    a4 = times_plus(x, splat(get_float(tall + 16)), a4)
    a5 = times_plus(x, splat(get_float(tall + 20)), a5)
    a6 = times_plus(x, splat(get_float(tall + 24)), a6)
    a7 = times_plus(x, splat(get_float(tall + 28)), a7)
    return a0, a1, a2, a3, a4, a5, a6, a7


@inlined
def _add_rows(dtype, g, ld, rows, u, v, tall, across, sums, apart, count):
    """Add 16 columns of some rows to their sums."""
    c = load(float32(0), v, count)
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = splat(float32(0))
    for i in range(rows):
        a0, a1, a2, a3, a4, a5, a6, a7 = _add_row(
            dtype, g + i * ld, u + 4 * i, c, tall + i * across, count,
            a0, a1, a2, a3, a4, a5, a6, a7,
        )  # fmt: skip
    _join(sums, a0, count)
    _join(sums + apart, a1, count)
    _join(sums + 2 * apart, a2, count)
    _join(sums + 3 * apart, a3, count)
    _join(sums + 4 * apart, a4, count)
    _join(sums + 5 * apart, a5, count)
    _join(sums + 6 * apart, a6, count)
    _join(sums + 7 * apart, a7, count)


@inlined
def _join(sums, a, count):
    store(float32(0), sums, plus(a, load(float32(0), sums, count)), count)


@inlined
def down(dtype, size, g, ld, rows, Q, u, v, tall, across, sums, apart):
    """Add some rows of X, each times its eight numbers, to the eight sums of every column.

    Args:
        dtype: Of G, as `load` has it.
        size: Its bytes.
        g: The first row of G.
        ld: Bytes from one row to the next.
        rows: How many.
        Q: Columns.
        u: The scales of the rows.
        v: The scales of the columns.
        tall: The numbers of the first row.
        across: Bytes from the numbers of one row to those of the next.
        sums: Eight rows of Q sums.
        apart: Bytes from one of these to the next.
    """
    full = Q - Q % LANES
    for j in range(0, full, LANES):
        _add_rows(
            dtype, g + j * size, ld, rows, u, v + 4 * j, tall, across, sums + 4 * j, apart, None
        )
    if full < Q:
        _add_rows(
            dtype, g + full * size, ld, rows, u, v + 4 * full, tall, across, sums + 4 * full, apart,
            Q - full,
        )  # fmt: skip
