"""Sums over eight rows of a gradient at a time, and over the rows that are left.

A matrix is added up with weights: the sum of a row is that of its squares, each times the ``v`` of
its column; the sum of a column that of its squares, each times the ``u`` of its row. Letters: see
`sinkgd.kernels.cpu.tables`.
"""

from numba import float32

from sinkgd.kernels.cpu.instructions import (
    LANES,
    anew,
    get_float,
    inlined,
    load,
    plus,
    prefetch,
    splat,
    store,
    times,
    times_plus,
    total,
    totals,
)

ROWS = 8  # accumulators enough to hide latency, and as many registers again for the scales
TURN = 256  # columns that are added up along and down in turns
PANEL = 64  # blocks of rows added up before they join the column sums: a long sum loses precision


@inlined
def _weigh(dtype, g, ld, c, count, a0, a1, a2, a3, a4, a5, a6, a7):
    """Add ``c`` times the squares of 16 columns of 8 rows to the 8 row sums."""
    x = load(dtype, g, count)
    a0 = times_plus(times(x, x), c, a0)
    x = load(dtype, g + ld, count)
    a1 = times_plus(times(x, x), c, a1)
    x = load(dtype, g + 2 * ld, count)
    a2 = times_plus(times(x, x), c, a2)
    x = load(dtype, g + 3 * ld, count)
    a3 = times_plus(times(x, x), c, a3)
    x = load(dtype, g + 4 * ld, count)
    a4 = times_plus(times(x, x), c, a4)
    x = load(dtype, g + 5 * ld, count)
    a5 = times_plus(times(x, x), c, a5)
    x = load(dtype, g + 6 * ld, count)
    a6 = times_plus(times(x, x), c, a6)
    x = load(dtype, g + 7 * ld, count)
    a7 = times_plus(times(x, x), c, a7)
    return a0, a1, a2, a3, a4, a5, a6, a7


@inlined
def _gather(dtype, g, ld, sums, count, r0, r1, r2, r3, r4, r5, r6, r7):
    """Add 8 rows' squares, each times its ``u``, to 16 column sums, in two chains."""
    x = load(dtype, g, count)
    a = times_plus(times(x, x), r0, load(float32(0), sums, count))
    x = load(dtype, g + ld, count)
    b = times(times(x, x), r1)
    x = load(dtype, g + 2 * ld, count)
    a = times_plus(times(x, x), r2, a)
    x = load(dtype, g + 3 * ld, count)
    b = times_plus(times(x, x), r3, b)
    x = load(dtype, g + 4 * ld, count)
    a = times_plus(times(x, x), r4, a)
    x = load(dtype, g + 5 * ld, count)
    b = times_plus(times(x, x), r5, b)
    x = load(dtype, g + 6 * ld, count)
    a = times_plus(times(x, x), r6, a)
    x = load(dtype, g + 7 * ld, count)
    b = times_plus(times(x, x), r7, b)
    store(float32(0), sums, plus(a, b), count)


@inlined
def _fetch(g, ld):
    """Bring 16 columns of 8 rows into the cache; beyond a matrix it does no harm."""
    prefetch(g)
    prefetch(g + ld)
    prefetch(g + 2 * ld)
    prefetch(g + 3 * ld)
    prefetch(g + 4 * ld)
    prefetch(g + 5 * ld)
    prefetch(g + 6 * ld)
    prefetch(g + 7 * ld)


@inlined
def row_sums(dtype, size, g, ld, Q, v):
    """The sums of 8 rows, in the first 8 numbers of a vector."""
    full = Q - Q % LANES
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = splat(float32(0))
    for j in range(0, full, LANES):
        c = load(float32(0), v + 4 * j, None)
        a0, a1, a2, a3, a4, a5, a6, a7 = _weigh(
            dtype, g + j * size, ld, c, None, a0, a1, a2, a3, a4, a5, a6, a7
        )
    if full < Q:
        c = load(float32(0), v + 4 * full, Q - full)
        a0, a1, a2, a3, a4, a5, a6, a7 = _weigh(
            dtype, g + full * size, ld, c, Q - full, a0, a1, a2, a3, a4, a5, a6, a7
        )
    return totals(a0, a1, a2, a3, a4, a5, a6, a7)


@inlined
def _eight(u):
    """The scales of 8 rows, each in a vector of its own."""
    return (
        splat(get_float(u)),
        splat(get_float(u + 4)),
        splat(get_float(u + 8)),
        splat(get_float(u + 12)),
        splat(get_float(u + 16)),
        splat(get_float(u + 20)),
        splat(get_float(u + 24)),
        splat(get_float(u + 28)),
    )


@inlined
def column_sums(dtype, size, g, ld, Q, u, sums, ahead):
    """Add 8 rows to the column sums, fetching what is at ``ahead`` meanwhile."""
    full = Q - Q % LANES
    r0, r1, r2, r3, r4, r5, r6, r7 = _eight(u)
    for j in range(0, full, LANES):
        at = g + j * size
        _gather(dtype, at, ld, sums + 4 * j, None, r0, r1, r2, r3, r4, r5, r6, r7)
        _fetch(ahead + j * size, ld)
    if full < Q:
        at = g + full * size
        _gather(dtype, at, ld, sums + 4 * full, Q - full, r0, r1, r2, r3, r4, r5, r6, r7)


@inlined
def both_sums(dtype, size, g, ld, Q, u, sums, v, step, ahead):
    """Add 8 rows to the column sums, and return the row sums of the 8 rows ``step`` bytes on.

    The two take turns, some hundred columns each: sixteen rows at once, a power of two apart, do
    not go into the one set of a first cache with eight ways. What is at ``ahead`` is fetched.
    """
    full = Q - Q % LANES
    r0, r1, r2, r3, r4, r5, r6, r7 = _eight(u)
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = splat(float32(0))
    for first in range(0, full, TURN):
        end = min(full, first + TURN)
        for j in range(first, end, LANES):
            at, apart = g + j * size, anew(ld)
            _gather(dtype, at, apart, sums + 4 * j, None, r0, r1, r2, r3, r4, r5, r6, r7)
        for j in range(first, end, LANES):
            at, apart = g + step + j * size, anew(ld)
            c = load(float32(0), v + 4 * j, None)
            a0, a1, a2, a3, a4, a5, a6, a7 = _weigh(
                dtype, at, apart, c, None, a0, a1, a2, a3, a4, a5, a6, a7
            )
            _fetch(ahead + j * size, apart)
    if full < Q:
        at = g + full * size
        _gather(dtype, at, ld, sums + 4 * full, Q - full, r0, r1, r2, r3, r4, r5, r6, r7)
        c = load(float32(0), v + 4 * full, Q - full)
        a0, a1, a2, a3, a4, a5, a6, a7 = _weigh(
            dtype, at + step, ld, c, Q - full, a0, a1, a2, a3, a4, a5, a6, a7
        )
    return totals(a0, a1, a2, a3, a4, a5, a6, a7)


@inlined
def one_row_sum(dtype, size, g, Q, v):
    """The sum of one row, in all numbers of a vector."""
    full = Q - Q % LANES
    a = splat(float32(0))
    for j in range(0, full, LANES):
        x = load(dtype, g + j * size, None)
        a = times_plus(times(x, x), load(float32(0), v + 4 * j, None), a)
    if full < Q:
        x = load(dtype, g + full * size, Q - full)
        a = times_plus(times(x, x), load(float32(0), v + 4 * full, Q - full), a)
    return splat(total(a))


@inlined
def add_one_row(dtype, size, g, Q, u, sums):
    """Add one row to the column sums."""
    full = Q - Q % LANES
    r = splat(get_float(u))
    for j in range(0, full, LANES):
        x = load(dtype, g + j * size, None)
        a = times_plus(times(x, x), r, load(float32(0), sums + 4 * j, None))
        store(float32(0), sums + 4 * j, a, None)
    if full < Q:
        x = load(dtype, g + full * size, Q - full)
        a = times_plus(times(x, x), r, load(float32(0), sums + 4 * full, Q - full))
        store(float32(0), sums + 4 * full, a, Q - full)
