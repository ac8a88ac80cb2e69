"""One pass over the rows of a gradient: their row sums, then their part of the column sums.

A block of rows is read twice: for its row sums, and again for the column sums once these are known.
The column sums of one block are taken beside the row sums of the next, so that memory is busy all
along and the second read hits the cache.

Letters: see `sinkgd.kernels.cpu.tables`. u = Q / (S v) and v = P / (Sᵀ u), with S = G∘G.
"""

from numba import float32, int16, int64

from sinkgd.kernels.cpu import tables as t
from sinkgd.kernels.cpu.instructions import (
    LANES,
    anew,
    any_below,
    compiled,
    get_float,
    get_int,
    inlined,
    load,
    plus,
    prefetch,
    put_float,
    put_int,
    quotient,
    splat,
    store,
    times,
    times_plus,
    total,
    totals,
)

ROWS = 8  # accumulators enough to hide latency, and as many registers again for the scales
PANEL = 64  # blocks of rows added up before they join the column sums: a long sum loses precision

# A sum may have lost n terms of up to 2^-126 (the smallest normal number, where torch flushes
# denormals), each times its weight. Above this multiple of the weights that is below 2^-26 of it.
FLOOR = 2.0**-100
SMALLEST = float32(2.0**-126)

# What a worker finds out, at these bytes of its scratch; its column sums and their panel follow.
(ZERO_ROWS, ROWS_MOVED, ROWS_FAILED, ZERO_COLUMNS, COLUMNS_MOVED, COLUMNS_FAILED) = range(0, 48, 8)
_EIGHT = 64
SUMS = 128


# Eight rows ---------------------------------------------------------------------------------------


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
def _row_sums(dtype, size, g, ld, Q, v):
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
def _column_sums(dtype, size, g, ld, Q, u, sums, ahead):
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
def _both_sums(dtype, size, g, ld, Q, u, sums, v, step, ahead):
    """Add 8 rows to the column sums, and return the row sums of the 8 rows ``step`` bytes on.

    What is at ``ahead`` is fetched meanwhile.
    """
    full = Q - Q % LANES
    r0, r1, r2, r3, r4, r5, r6, r7 = _eight(u)
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = splat(float32(0))
    for j in range(0, full, LANES):
        at, apart = g + j * size, anew(ld)
        _gather(dtype, at, apart, sums + 4 * j, None, r0, r1, r2, r3, r4, r5, r6, r7)
        at += step
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


# From sums to scales ------------------------------------------------------------------------------


@inlined
def invert(sums, address, count, length, floor, tested, low, high):
    """Write ``length / sums``; say whether all is well, and whether a scale moved.

    Not well is a sum below ``floor`` or a scale below the normal numbers; nothing is written then.
    """
    scales = quotient(splat(length), sums)
    if any_below(sums, splat(floor), count) or any_below(scales, splat(SMALLEST), count):
        return False, True
    moved = True
    if tested:
        last = load(float32(0), address, count)
        moved = any_below(scales, times(splat(low), last), count)
        moved = moved or any_below(times(splat(high), last), scales, count)
    store(float32(0), address, scales, count)
    return True, moved


@compiled
def invert_one(address, value, length, floor, tested, low, high, empty):
    """What `invert` does for one sum; a sum of zero is well where the row is known ``empty``.

    Returns whether it failed, whether it moved, and whether the sum is a zero.
    """
    if value == 0 and empty:
        put_float(address, float32(0))
        return False, False, True
    last, scale = get_float(address), length / value
    put_float(address, scale)
    well = value >= floor and scale >= SMALLEST  # a NaN is not
    moved = not (tested and low * last <= scale <= high * last)
    return not well, moved, False


@compiled
def is_empty(dtype, size, g, step, count):
    """Whether ``count`` numbers, ``step`` bytes apart, are all zero."""
    for i in range(count):
        x = total(load(dtype, g + i * step, 1))
        if x != 0:  # a NaN is not zero
            return False
    return True


@compiled
def _settle_rows(dtype, size, g, ld, Q, u, sums, count, mine, length, floor, known, tested, lo, hi):
    """Set ``u`` of up to 8 rows, one by one: there is a zero row, or a number out of range.

    ``known``: ``u`` holds the scales of the last iteration, so that a zero there tells of a row
    that is empty.
    """
    store(float32(0), mine + _EIGHT, sums, None)
    for row in range(count):
        value, at = get_float(mine + _EIGHT + 4 * row), u + 4 * row
        empty = value == 0 and (
            get_float(at) == 0 if known else is_empty(dtype, size, g + row * ld, size, Q)
        )
        failed, moved, zero = invert_one(at, value, length, floor, tested, lo, hi, empty)
        if failed:
            put_int(mine + ROWS_FAILED, 1)
        if moved:
            put_int(mine + ROWS_MOVED, 1)
        if zero:
            put_int(mine + ZERO_ROWS, get_int(mine + ZERO_ROWS) + 1)


# All rows of a worker -----------------------------------------------------------------------------


@compiled
def _sweep(
    dtype, size, entry, mine, panel, first, end, rows, columns, forward, length, known, lo, hi
):
    """Pass once over the rows from ``first`` to ``end``: their ``u``, then their share of the sums.

    Rows are walked in alternate directions, so that a pass starts on what the last one left in the
    cache.
    """
    g, ld, Q = get_int(entry + t.G), get_int(entry + t.LD), get_int(entry + t.Q)
    u, v, sums = get_int(entry + t.U), get_int(entry + t.V), mine + SUMS
    floor = float32(FLOOR) * (float32(Q) + sum_of(v, Q))
    tested = known and hi > 0
    blocks = (end - first) // ROWS
    row, step = first, ROWS
    if not forward:
        row, step = first + (blocks - 1) * ROWS, -ROWS
    found = splat(float32(0))
    if rows and blocks > 0:
        found = _row_sums(dtype, size, g + row * ld, ld, Q, v)
    for block in range(blocks):
        at, scales = g + row * ld, u + 4 * row
        if rows:
            well, moved = invert(found, scales, ROWS, length, floor, tested, lo, hi)
            if not well:
                _settle_rows(
                    dtype, size, at, ld, Q, scales, found, ROWS, mine, length, floor, known,
                    tested, lo, hi,
                )  # fmt: skip
            elif moved:
                put_int(mine + ROWS_MOVED, 1)
        ahead = at + 2 * step * ld
        if rows and block + 1 < blocks:
            if columns:
                found = _both_sums(dtype, size, at, ld, Q, scales, panel, v, step * ld, ahead)
            else:
                found = _row_sums(dtype, size, at + step * ld, ld, Q, v)
        elif columns:
            _column_sums(dtype, size, at, ld, Q, scales, panel, ahead)
        if columns and panel != sums and (block + 1) % PANEL == 0:
            move(panel, sums, Q)
        row += step
    for last in range(first + blocks * ROWS, end):
        at, scale = g + last * ld, u + 4 * last
        if rows:
            found = _one_row_sum(dtype, size, at, Q, v)
            _settle_rows(
                dtype, size, at, ld, Q, scale, found, 1, mine, length, floor, known, tested, lo, hi
            )
        if columns:
            _add_one_row(dtype, size, at, Q, scale, panel)
    if columns and panel != sums:
        move(panel, sums, Q)


@inlined
def _one_row_sum(dtype, size, g, Q, v):
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
def _add_one_row(dtype, size, g, Q, u, sums):
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


@compiled
def sweep(entry, mine, panel, first, end, rows, columns, forward, length, known, lo, hi):
    """Run `_sweep` for the gradient's type, from sums of zero.

    Few rows are added up without a panel.
    """
    put_int(mine + ZERO_ROWS, 0)
    put_int(mine + ROWS_MOVED, 0)
    put_int(mine + ROWS_FAILED, 0)
    if columns:
        Q = get_int(entry + t.Q)
        fill(mine + SUMS, Q, float32(0))
        if end - first <= PANEL * ROWS:
            panel = mine + SUMS
        else:
            fill(panel, Q, float32(0))
    if get_int(entry + t.DTYPE) == t.BF16:
        _sweep(
            int16(0), 2, entry, mine, panel, first, end, rows, columns, forward, length, known,
            lo, hi,
        )  # fmt: skip
    else:
        _sweep(
            float32(0), 4, entry, mine, panel, first, end, rows, columns, forward, length, known,
            lo, hi,
        )  # fmt: skip


# All rows, with weights that are given ------------------------------------------------------------


@compiled
def add_along(dtype, size, g, ld, P, Q, v, sums):
    """Write the sum of every row's squares, each times its ``v``."""
    full = P - P % ROWS
    for row in range(0, full, ROWS):
        found = _row_sums(dtype, size, g + row * ld, ld, Q, v)
        store(float32(0), sums + 4 * row, found, ROWS)
    for row in range(full, P):
        found = _one_row_sum(dtype, size, g + row * ld, Q, v)
        store(float32(0), sums + 4 * row, found, 1)


@compiled
def add_down(dtype, size, g, ld, P, Q, u, sums, panel):
    """Write the sum of every column's squares, each times its ``u``."""
    fill(sums, Q, float32(0))
    fill(panel, Q, float32(0))
    full = P - P % ROWS
    for row in range(0, full, ROWS):
        at = g + row * ld
        _column_sums(dtype, size, at, ld, Q, u + 4 * row, panel, at + ROWS * ld)
        if (row // ROWS + 1) % PANEL == 0:
            move(panel, sums, Q)
    for row in range(full, P):
        _add_one_row(dtype, size, g + row * ld, Q, u + 4 * row, panel)
    move(panel, sums, Q)


# Vectors ------------------------------------------------------------------------------------------


@compiled
def move(panel, sums, Q):
    """Add a panel's column sums to the worker's, and clear them."""
    for j in range(0, Q, LANES):
        count = min(LANES, Q - j)
        x = load(float32(0), panel + 4 * j, count)
        store(float32(0), sums + 4 * j, plus(x, load(float32(0), sums + 4 * j, count)), count)
        store(float32(0), panel + 4 * j, splat(float32(0)), count)


@compiled
def sum_of(address, count):
    """The sum of ``count`` numbers."""
    full = count - count % LANES
    a = splat(float32(0))
    for j in range(0, full, LANES):
        a = plus(a, load(float32(0), address + 4 * j, None))
    if full < count:
        a = plus(a, load(float32(0), address + 4 * full, count - full))
    return total(a)


@compiled
def fill(address, count, value):
    """Write ``count`` times one number."""
    x = splat(value)
    full = count - count % LANES
    for j in range(0, full, LANES):
        store(float32(0), address + 4 * j, x, None)
    if full < count:
        store(float32(0), address + 4 * full, x, int64(count - full))
