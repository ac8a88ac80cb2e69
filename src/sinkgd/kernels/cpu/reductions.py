"""Reductions over gradients: weighted sums of squares, and whether all entries are finite.

Here the sum of a row is the sum of the squares of its entries, each times the weight ``v`` of its
column. The sum of a column is the same with the weight ``u`` of each row. The functions sum eight
rows at a time, and the remaining rows one by one. `sinkgd.kernels.cpu.solve` finds the scales with
these functions; the jobs here are `weighted_sums` and `isfinite`. Letters: see
`sinkgd.kernels.cpu.tables`.
"""

from numba import cfunc, float32, int16, int64, void

from sinkgd.kernels.cpu import tables as t
from sinkgd.kernels.cpu.layout import BF16, F32
from sinkgd.kernels.cpu.simd import (
    LANES,
    add,
    compiled,
    fetch_add,
    fill,
    inlined,
    load,
    load_float,
    load_int,
    mul,
    muladd,
    opaque,
    prefetch,
    splat,
    store,
    store_int,
    sum_lanes,
    sum_lanes_of_eight,
    thread_num,
)

# Rows that are summed at a time. Sums of rows need as many accumulators, which is enough to hide
# latency. Sums of columns need as many registers for the weights of the rows.
ROWS = 8
INTERLEAVED = 256  # columns after which row sums and column sums alternate
# Blocks of rows that form one partial column sum: a longer sum in float32 would lose precision.
PARTIAL_BLOCKS = 64
FINITE_BLOCK = 65536  # entries that a thread claims at a time
AHEAD = 8192  # bytes from an entry that is read to the entry that is prefetched

_SUMS_ROW = 8 * t.SUMS_FIELDS
_FINITE_ROW = 8 * t.FINITE_FIELDS


@inlined
def _add_to_row_sums(dtype, g, ld, c, count, a0, a1, a2, a3, a4, a5, a6, a7):
    """Add the squares of 8 rows and 16 columns, weighted with ``c``, to the 8 row sums."""
    x = load(dtype, g, count)
    a0 = muladd(mul(x, x), c, a0)
    x = load(dtype, g + ld, count)
    a1 = muladd(mul(x, x), c, a1)
    x = load(dtype, g + 2 * ld, count)
    a2 = muladd(mul(x, x), c, a2)
    x = load(dtype, g + 3 * ld, count)
    a3 = muladd(mul(x, x), c, a3)
    x = load(dtype, g + 4 * ld, count)
    a4 = muladd(mul(x, x), c, a4)
    x = load(dtype, g + 5 * ld, count)
    a5 = muladd(mul(x, x), c, a5)
    x = load(dtype, g + 6 * ld, count)
    a6 = muladd(mul(x, x), c, a6)
    x = load(dtype, g + 7 * ld, count)
    a7 = muladd(mul(x, x), c, a7)
    return a0, a1, a2, a3, a4, a5, a6, a7


@inlined
def _add_to_col_sums(dtype, g, ld, sums, count, r0, r1, r2, r3, r4, r5, r6, r7):
    """Add the squares of 8 rows and 16 columns, weighted with r0 to r7, to the 16 column sums.

    Two chains of sums run in parallel.
    """
    x = load(dtype, g, count)
    a = muladd(mul(x, x), r0, load(float32(0), sums, count))
    x = load(dtype, g + ld, count)
    b = mul(mul(x, x), r1)
    x = load(dtype, g + 2 * ld, count)
    a = muladd(mul(x, x), r2, a)
    x = load(dtype, g + 3 * ld, count)
    b = muladd(mul(x, x), r3, b)
    x = load(dtype, g + 4 * ld, count)
    a = muladd(mul(x, x), r4, a)
    x = load(dtype, g + 5 * ld, count)
    b = muladd(mul(x, x), r5, b)
    x = load(dtype, g + 6 * ld, count)
    a = muladd(mul(x, x), r6, a)
    x = load(dtype, g + 7 * ld, count)
    b = muladd(mul(x, x), r7, b)
    store(float32(0), sums, add(a, b), count)


@inlined
def _prefetch_eight(g, ld):
    """Prefetch 16 columns of 8 rows, which may lie beyond the matrix."""
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
    """Return the sums of 8 rows, in the first 8 lanes."""
    full = Q - Q % LANES
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = splat(float32(0))
    for j in range(0, full, LANES):
        c = load(float32(0), v + 4 * j, None)
        a0, a1, a2, a3, a4, a5, a6, a7 = _add_to_row_sums(
            dtype, g + j * size, ld, c, None, a0, a1, a2, a3, a4, a5, a6, a7
        )
    if full < Q:
        c = load(float32(0), v + 4 * full, Q - full)
        a0, a1, a2, a3, a4, a5, a6, a7 = _add_to_row_sums(
            dtype, g + full * size, ld, c, Q - full, a0, a1, a2, a3, a4, a5, a6, a7
        )
    return sum_lanes_of_eight(a0, a1, a2, a3, a4, a5, a6, a7)


@inlined
def _splat_eight(u):
    """Broadcast the weights of 8 rows to a vector each."""
    return (
        splat(load_float(u)),
        splat(load_float(u + 4)),
        splat(load_float(u + 8)),
        splat(load_float(u + 12)),
        splat(load_float(u + 16)),
        splat(load_float(u + 20)),
        splat(load_float(u + 24)),
        splat(load_float(u + 28)),
    )


@inlined
def column_sums(dtype, size, g, ld, Q, u, sums, ahead):
    """Add 8 rows to the column sums, and prefetch 8 rows at ``ahead``."""
    full = Q - Q % LANES
    r0, r1, r2, r3, r4, r5, r6, r7 = _splat_eight(u)
    for j in range(0, full, LANES):
        at = g + j * size
        _add_to_col_sums(dtype, at, ld, sums + 4 * j, None, r0, r1, r2, r3, r4, r5, r6, r7)
        _prefetch_eight(ahead + j * size, ld)
    if full < Q:
        at = g + full * size
        _add_to_col_sums(dtype, at, ld, sums + 4 * full, Q - full, r0, r1, r2, r3, r4, r5, r6, r7)


@inlined
def both_sums(dtype, size, g, ld, Q, u, sums, v, step, ahead):
    """Add 8 rows to the column sums, and return the row sums of the 8 rows ``step`` bytes away.

    The two sums alternate after a few hundred columns. If the two sums were computed together,
    sixteen rows would be in use at once. Rows whose addresses are a large power of two apart share
    one set of the L1 cache, which has only eight ways. 8 rows at ``ahead`` are prefetched.
    """
    full = Q - Q % LANES
    r0, r1, r2, r3, r4, r5, r6, r7 = _splat_eight(u)
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = splat(float32(0))
    for first in range(0, full, INTERLEAVED):
        end = min(full, first + INTERLEAVED)
        for j in range(first, end, LANES):
            at, apart = g + j * size, opaque(ld)
            _add_to_col_sums(dtype, at, apart, sums + 4 * j, None, r0, r1, r2, r3, r4, r5, r6, r7)
        for j in range(first, end, LANES):
            at, apart = g + step + j * size, opaque(ld)
            c = load(float32(0), v + 4 * j, None)
            a0, a1, a2, a3, a4, a5, a6, a7 = _add_to_row_sums(
                dtype, at, apart, c, None, a0, a1, a2, a3, a4, a5, a6, a7
            )
            _prefetch_eight(ahead + j * size, apart)
    if full < Q:
        at = g + full * size
        _add_to_col_sums(dtype, at, ld, sums + 4 * full, Q - full, r0, r1, r2, r3, r4, r5, r6, r7)
        c = load(float32(0), v + 4 * full, Q - full)
        a0, a1, a2, a3, a4, a5, a6, a7 = _add_to_row_sums(
            dtype, at + step, ld, c, Q - full, a0, a1, a2, a3, a4, a5, a6, a7
        )
    return sum_lanes_of_eight(a0, a1, a2, a3, a4, a5, a6, a7)


@inlined
def sum_of_row(dtype, size, g, Q, v):
    """Return the sum of one row, in all lanes."""
    full = Q - Q % LANES
    a = splat(float32(0))
    for j in range(0, full, LANES):
        x = load(dtype, g + j * size, None)
        a = muladd(mul(x, x), load(float32(0), v + 4 * j, None), a)
    if full < Q:
        x = load(dtype, g + full * size, Q - full)
        a = muladd(mul(x, x), load(float32(0), v + 4 * full, Q - full), a)
    return splat(sum_lanes(a))


@inlined
def add_row(dtype, size, g, Q, u, sums):
    """Add one row to the column sums."""
    full = Q - Q % LANES
    r = splat(load_float(u))
    for j in range(0, full, LANES):
        x = load(dtype, g + j * size, None)
        a = muladd(mul(x, x), r, load(float32(0), sums + 4 * j, None))
        store(float32(0), sums + 4 * j, a, None)
    if full < Q:
        x = load(dtype, g + full * size, Q - full)
        a = muladd(mul(x, x), r, load(float32(0), sums + 4 * full, Q - full))
        store(float32(0), sums + 4 * full, a, Q - full)


@compiled
def flush(partial, sums, Q):
    """Add partial column sums to the worker's column sums, and set the partial ones to zero."""
    for j in range(0, Q, LANES):
        count = min(LANES, Q - j)
        x = load(float32(0), partial + 4 * j, count)
        store(float32(0), sums + 4 * j, add(x, load(float32(0), sums + 4 * j, count)), count)
        store(float32(0), partial + 4 * j, splat(float32(0)), count)


@compiled
def _sum_rows(dtype, size, g, ld, P, Q, v, sums):
    """Write the weighted sum of each row."""
    full = P - P % ROWS
    for row in range(0, full, ROWS):
        found = row_sums(dtype, size, g + row * ld, ld, Q, v)
        store(float32(0), sums + 4 * row, found, ROWS)
    for row in range(full, P):
        found = sum_of_row(dtype, size, g + row * ld, Q, v)
        store(float32(0), sums + 4 * row, found, 1)


@compiled
def _sum_columns(dtype, size, g, ld, P, Q, u, sums, partial):
    """Write the weighted sum of each column."""
    fill(sums, Q, float32(0))
    fill(partial, Q, float32(0))
    full = P - P % ROWS
    for row in range(0, full, ROWS):
        at = g + row * ld
        column_sums(dtype, size, at, ld, Q, u + 4 * row, partial, at + ROWS * ld)
        if (row // ROWS + 1) % PARTIAL_BLOCKS == 0:
            flush(partial, sums, Q)
    for row in range(full, P):
        add_row(dtype, size, g + row * ld, Q, u + 4 * row, partial)
    flush(partial, sums, Q)


@compiled
def _sum_matrix(dtype, size, entry, partial):
    g, ld = load_int(entry + t.SG), load_int(entry + t.SLD)
    P, Q = load_int(entry + t.SP), load_int(entry + t.SQ)
    weights, sums = load_int(entry + t.WEIGHTS), load_int(entry + t.SUMS)
    if load_int(entry + t.ALONG) != 0:
        _sum_rows(dtype, size, g, ld, P, Q, weights, sums)
    else:
        _sum_columns(dtype, size, g, ld, P, Q, weights, sums, partial)


@cfunc(void(int64), cache=True, error_model="numpy")
def weighted_sums(job):
    """Sum the squares of a table of gradients, as one thread of a team.

    A matrix is summed by the one thread that claims it, so the bits of its sums depend only on this
    matrix and its weights.
    """
    table, count = load_int(job + t.TABLE), load_int(job + t.COUNT)
    partial = load_int(job + t.SCRATCH) + int64(thread_num()) * load_int(job + t.STRIDE)
    i = fetch_add(job + t.NEXT)
    while i < count:
        entry = table + i * _SUMS_ROW
        if load_int(entry + t.SDTYPE) == BF16:
            _sum_matrix(int16(0), 2, entry, partial)
        else:
            _sum_matrix(float32(0), 4, entry, partial)
        i = fetch_add(job + t.NEXT)


@inlined
def _zero_or_nan(dtype, size, x, count):
    """Return zero, or NaN if one of ``count`` entries at ``x`` is not finite.

    A finite number times zero is zero. NaN and infinity times zero are NaN.
    """
    zero = splat(float32(0))
    a = b = c = d = zero
    step = 4 * LANES
    full = count - count % step
    for j in range(0, full, step):
        at = x + j * size
        prefetch(at + AHEAD)
        prefetch(at + AHEAD + 64)
        if size == 4:
            prefetch(at + AHEAD + 128)
            prefetch(at + AHEAD + 192)
        a = muladd(load(dtype, at, None), zero, a)
        b = muladd(load(dtype, at + LANES * size, None), zero, b)
        c = muladd(load(dtype, at + 2 * LANES * size, None), zero, c)
        d = muladd(load(dtype, at + 3 * LANES * size, None), zero, d)
    for j in range(full, count, LANES):
        a = muladd(load(dtype, x + j * size, min(LANES, count - j)), zero, a)
    return sum_lanes(add(add(a, b), add(c, d)))


@compiled
def _has_nonfinite(entry, low, high):
    x = load_int(entry + t.X)
    if load_int(entry + t.XDTYPE) == F32:
        return _zero_or_nan(float32(0), 4, x + 4 * low, high - low) != 0
    return _zero_or_nan(int16(0), 2, x + 2 * low, high - low) != 0


@cfunc(void(int64), cache=True, error_model="numpy")
def isfinite(job):
    """Mark the tensors of a table that contain NaN or infinity, as one thread of a team.

    A thread claims blocks of entries.
    """
    table, count = load_int(job + t.TABLE), load_int(job + t.COUNT)
    begin = 0
    mine = fetch_add(job + t.NEXT)
    for i in range(count):
        entry = table + i * _FINITE_ROW
        entries = load_int(entry + t.ENTRIES)
        blocks = (entries + FINITE_BLOCK - 1) // FINITE_BLOCK
        while mine < begin + blocks:
            low = (mine - begin) * FINITE_BLOCK
            if _has_nonfinite(entry, low, min(entries, low + FINITE_BLOCK)):
                store_int(entry + t.NONFINITE, 1)
            mine = fetch_add(job + t.NEXT)
        begin += blocks
