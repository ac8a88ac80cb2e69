"""The function ``find_scales``: SR-Sinkhorn on a table of gradients, by a team of threads.

With S = G∘G, an iteration is u = Q / (S v) and v = P / (Sᵀ u). Here u and v are the squares of the
scales. A parameter is updated as soon as its scales are known, while the gradient is in the cache.
Letters: see `sinkgd.kernels.cpu.tables`.

If the columns of a matrix are rows in memory, an iteration finds v first, and after the iterations
a last half pass finds u.

Zero rows and columns have scales of zero. If the numerators P and Q counted them, each iteration
would multiply u by a factor and v by its inverse. So these numerators are the numbers of nonzero
rows and columns. Two half iterations count all rows or columns: the first, since zero ones are not
known yet, and the last, which sets the norm of the result.
"""

import math

from numba import cfunc, float32, int16, int64, void

from sinkgd.kernels.cpu import tables as t
from sinkgd.kernels.cpu.layout import BF16
from sinkgd.kernels.cpu.reductions import (
    PARTIAL_BLOCKS,
    ROWS,
    add_row,
    both_sums,
    column_sums,
    flush,
    row_sums,
    sum_of_row,
)
from sinkgd.kernels.cpu.simd import (
    LANES,
    add,
    any_below,
    barrier,
    compiled,
    div,
    fetch_add,
    fill,
    inlined,
    load,
    load_double,
    load_float,
    load_int,
    mul,
    num_threads,
    share_begin,
    splat,
    store,
    store_float,
    store_int,
    sum_lanes,
    sum_of,
    thread_num,
)
from sinkgd.kernels.cpu.update import update_rows

# A sum may have lost n terms of up to 2^-126 (the smallest normal number, as torch may flush
# denormals to zero), each times its weight. If the sum is above FLOOR * (n + the sum of all
# weights), the lost terms are below 2^-26 of it.
FLOOR = 2.0**-100
SMALLEST = float32(2.0**-126)

# The fields of a worker's scratch (`mine`), in bytes: its flags, the sums of eight rows, and its
# column sums. Partial column sums follow in the second half.
(ZERO_ROWS, ROWS_MOVED, ROWS_FAILED, ZERO_COLUMNS, COLUMNS_MOVED, COLUMNS_FAILED) = range(0, 48, 8)
# Distances in bytes from a count of zeros to its two flags: the same for rows and for columns.
_MOVED, _FAILED = ROWS_MOVED - ZERO_ROWS, ROWS_FAILED - ZERO_ROWS
EIGHT_SUMS = 64
SUMS = 128

_ROW = 8 * t.GRADIENT_FIELDS


@inlined
def _invert(sums, address, count, length, floor, tested, low, high):
    """Write the scales ``length / sums``. Return whether they are valid, and whether one changed.

    If a sum is below ``floor``, or a scale is subnormal or NaN, nothing is written. Without
    ``tested``, scales count as changed.
    """
    scales = div(splat(length), sums)
    if any_below(sums, splat(floor), count) or any_below(scales, splat(SMALLEST), count):
        return False, True
    moved = True
    if tested:
        last = load(float32(0), address, count)
        moved = any_below(scales, mul(splat(low), last), count)
        moved = moved or any_below(mul(splat(high), last), scales, count)
    store(float32(0), address, scales, count)
    return True, moved


@compiled
def _invert_one(flags, address, value, length, floor, tested, low, high, zero):
    """Write one scale. A sum of zero is valid if the row or column is ``zero``.

    ``flags`` is the address of the count of zero rows or columns. Two flags follow: whether a scale
    changed, and whether one is out of range.
    """
    if value == 0 and zero:
        store_float(address, float32(0))
        store_int(flags, load_int(flags) + 1)
        return
    last, scale = load_float(address), length / value
    store_float(address, scale)
    if not (tested and low * last <= scale <= high * last):
        store_int(flags + _MOVED, 1)
    if not (value >= floor and scale >= SMALLEST):  # also if one of them is NaN
        store_int(flags + _FAILED, 1)


@compiled
def _is_zero(dtype, size, g, step, count):
    """Whether ``count`` entries, ``step`` bytes apart, are all zero."""
    for i in range(count):
        x = sum_lanes(load(dtype, g + i * step, 1))
        if x != 0:  # a NaN is not zero
            return False
    return True


@compiled
def _invert_rows(
    dtype, size, g, ld, Q, u, sums, count, mine, length, floor, iterated, tested, lo, hi
):
    """Write ``u`` of up to 8 rows one by one; rows may be zero, and numbers out of range.

    If ``iterated``, ``u`` holds the scales of the previous iteration, which are zero for zero rows.
    """
    store(float32(0), mine + EIGHT_SUMS, sums, None)
    for row in range(count):
        value, at = load_float(mine + EIGHT_SUMS + 4 * row), u + 4 * row
        zero = value == 0 and (
            load_float(at) == 0 if iterated else _is_zero(dtype, size, g + row * ld, size, Q)
        )
        _invert_one(mine + ZERO_ROWS, at, value, length, floor, tested, lo, hi, zero)


@compiled
def _sweep_rows(
    dtype, size, entry, mine, partial, first, end, rows, columns, forward, length, iterated, lo, hi
):
    """Pass over the rows from ``first`` to ``end``: find their ``u``, then add to the column sums.

    The pass reads a block of rows twice: for its row sums, and for the column sums once its ``u``
    is known. The column sums of one block are computed together with the row sums of the next, so
    that memory is always busy and the second read hits the cache. Passes alternate in direction, so
    that each starts with the rows that the previous one left in the cache.
    """
    g, ld, Q = load_int(entry + t.G), load_int(entry + t.LD), load_int(entry + t.Q)
    u, v, sums = load_int(entry + t.U), load_int(entry + t.V), mine + SUMS
    floor = float32(FLOOR) * (float32(Q) + sum_of(v, Q))
    tested = iterated and hi > 0
    blocks = (end - first) // ROWS
    row, step = first, ROWS
    if not forward:
        row, step = first + (blocks - 1) * ROWS, -ROWS
    found = splat(float32(0))
    if rows and blocks > 0:
        found = row_sums(dtype, size, g + row * ld, ld, Q, v)
    for block in range(blocks):
        at, scales = g + row * ld, u + 4 * row
        if rows:
            valid, moved = _invert(found, scales, ROWS, length, floor, tested, lo, hi)
            if not valid:
                _invert_rows(
                    dtype, size, at, ld, Q, scales, found, ROWS, mine, length, floor, iterated,
                    tested, lo, hi,
                )  # fmt: skip
            elif moved:
                store_int(mine + ROWS_MOVED, 1)
        ahead = at + 2 * step * ld
        if rows and block + 1 < blocks:
            if columns:
                found = both_sums(dtype, size, at, ld, Q, scales, partial, v, step * ld, ahead)
            else:
                found = row_sums(dtype, size, at + step * ld, ld, Q, v)
        elif columns:
            column_sums(dtype, size, at, ld, Q, scales, partial, ahead)
        if columns and partial != sums and (block + 1) % PARTIAL_BLOCKS == 0:
            flush(partial, sums, Q)
        row += step
    for last in range(first + blocks * ROWS, end):
        at, scale = g + last * ld, u + 4 * last
        if rows:
            found = sum_of_row(dtype, size, at, Q, v)
            _invert_rows(
                dtype, size, at, ld, Q, scale, found, 1, mine, length, floor, iterated, tested,
                lo, hi,
            )  # fmt: skip
        if columns:
            add_row(dtype, size, at, Q, scale, partial)
    if columns and partial != sums:
        flush(partial, sums, Q)


@compiled
def _sweep(entry, mine, partial, first, end, rows, columns, forward, length, iterated, lo, hi):
    """Set the sums to zero, and run `_sweep_rows` for the gradient's type.

    If there are only a few rows, they are added without partial sums.
    """
    store_int(mine + ZERO_ROWS, 0)
    store_int(mine + ROWS_MOVED, 0)
    store_int(mine + ROWS_FAILED, 0)
    if columns:
        Q = load_int(entry + t.Q)
        fill(mine + SUMS, Q, float32(0))
        if end - first <= PARTIAL_BLOCKS * ROWS:
            partial = mine + SUMS
        else:
            fill(partial, Q, float32(0))
    if load_int(entry + t.DTYPE) == BF16:
        _sweep_rows(
            int16(0), 2, entry, mine, partial, first, end, rows, columns, forward, length,
            iterated, lo, hi,
        )  # fmt: skip
    else:
        _sweep_rows(
            float32(0), 4, entry, mine, partial, first, end, rows, columns, forward, length,
            iterated, lo, hi,
        )  # fmt: skip


@compiled
def _total(field, scratch, stride, workers):
    """Return the sum of a field over the workers."""
    found = 0
    for worker in range(workers):
        found += load_int(scratch + worker * stride + field)
    return found


@compiled
def _sqrt(address, count):
    """Replace numbers by their square roots."""
    for j in range(count):
        store_float(address + 4 * j, math.sqrt(load_float(address + 4 * j)))


@compiled
def _invert_columns(entry, mine, j, count, column, length, floor, iterated, tested, lo, hi):
    """Write ``v`` of up to 16 columns one by one, as `_invert_rows` does for rows."""
    g, ld, P = load_int(entry + t.G), load_int(entry + t.LD), load_int(entry + t.P)
    for i in range(count):
        value, at = load_float(column + 4 * i), load_int(entry + t.V) + 4 * (j + i)
        zero = False
        if value == 0 and iterated:
            zero = load_float(at) == 0
        elif value == 0 and load_int(entry + t.DTYPE) == BF16:
            zero = _is_zero(int16(0), 2, g + 2 * (j + i), ld, P)
        elif value == 0:
            zero = _is_zero(float32(0), 4, g + 4 * (j + i), ld, P)
        _invert_one(mine + ZERO_COLUMNS, at, value, length, floor, tested, lo, hi, zero)


@compiled
def _reduce(entry, worker, workers, scratch, stride, length, iterated, lo, hi):
    """Add the workers' column sums in order, and write ``v`` of this worker's share of columns."""
    mine, Q, P = scratch + worker * stride, load_int(entry + t.Q), load_int(entry + t.P)
    store_int(mine + ZERO_COLUMNS, 0)
    store_int(mine + COLUMNS_MOVED, 0)
    store_int(mine + COLUMNS_FAILED, 0)
    floor = float32(FLOOR) * (float32(P) + sum_of(load_int(entry + t.U), P))
    tested = iterated and hi > 0
    sums = scratch + SUMS
    low, high = share_begin(Q, worker, workers, LANES), share_begin(Q, worker + 1, workers, LANES)
    for j in range(low, high, LANES):
        count = min(LANES, high - j)
        column = load(float32(0), sums + 4 * j, count)
        for other in range(1, workers):
            column = add(column, load(float32(0), sums + other * stride + 4 * j, count))
        v = load_int(entry + t.V) + 4 * j
        valid, moved = _invert(column, v, count, length, floor, tested, lo, hi)
        if not valid:
            store(float32(0), sums + 4 * j, column, count)  # no other worker reads these again
            _invert_columns(
                entry, mine, j, count, sums + 4 * j, length, floor, iterated, tested, lo, hi
            )
        elif moved:
            store_int(mine + COLUMNS_MOVED, 1)


@inlined
def _wait(job, team, alone):
    """Wait for the other threads, unless only this thread works on the matrix."""
    if not alone:
        barrier(job, team)


@compiled
def _begin(entry, first, team, workers):
    """Set the column scales of the matrix to one, unless they are given."""
    if load_int(entry + t.STARTED) == 0:
        transposed = load_int(entry + t.TRANSPOSED) != 0
        start = load_int(entry + (t.U if transposed else t.V))
        count = load_int(entry + (t.P if transposed else t.Q))
        for worker in range(first, workers, team):
            low = share_begin(count, worker, workers, 1)
            fill(start + 4 * low, share_begin(count, worker + 1, workers, 1) - low, float32(1))


@compiled
def _iterate(job, entry, first, team, workers, scratch, alone):
    """Iterate as worker ``first``, ``first + team``, … of ``workers``.

    Returns the number of passes over the matrix, or 0 if a number was out of range.

    All threads read the workers' flags between two barriers, when no worker writes them, so that
    all threads take the same branch.
    """
    P, Q, iters = load_int(entry + t.P), load_int(entry + t.Q), load_int(job + t.ITERS)
    stride, transposed = load_int(job + t.STRIDE), load_int(entry + t.TRANSPOSED) != 0
    quotients = load_int(job + t.FLOATS) + 16
    lo, hi = float32(load_double(quotients)), float32(load_double(quotients + 8))
    converged, live_columns = False, Q
    for iteration in range(iters + transposed):
        last_rows = transposed and (iteration == iters or converged)
        length = float32(Q if last_rows else live_columns)
        for worker in range(first, workers, team):
            mine = scratch + worker * stride
            begin = share_begin(P, worker, workers, ROWS)
            end = share_begin(P, worker + 1, workers, ROWS)
            _sweep(
                entry, mine, mine + stride // 2 + SUMS, begin, end, not transposed or iteration > 0,
                not last_rows, iteration % 2 == 0, length, iteration > transposed, lo,
                float32(0) if transposed else hi,
            )  # fmt: skip
        _wait(job, team, alone)
        if _total(ROWS_FAILED, scratch, stride, workers) > 0:
            return 0
        if last_rows:
            return iteration + 1
        live_rows = P
        if iteration >= transposed:
            live_rows -= _total(ZERO_ROWS, scratch, stride, workers)
        if not transposed:
            converged = iteration > 0 and hi > 0
            converged = converged and _total(ROWS_MOVED, scratch, stride, workers) == 0
        last_columns = not transposed and (iteration == iters - 1 or converged)
        length = float32(P if last_columns else live_rows)
        for worker in range(first, workers, team):
            _reduce(
                entry, worker, workers, scratch, stride, length, iteration > 0, lo,
                hi if transposed else float32(0),
            )  # fmt: skip
        _wait(job, team, alone)
        if _total(COLUMNS_FAILED, scratch, stride, workers) > 0:
            return 0
        if last_columns:
            return iteration + 1
        live_columns = Q - _total(ZERO_COLUMNS, scratch, stride, workers)
        if transposed:
            converged = iteration > 0 and hi > 0
            converged = converged and _total(COLUMNS_MOVED, scratch, stride, workers) == 0
    return 0


@compiled
def _solve(job, entry, first, team, workers, scratch, alone):
    """Find the scales of one matrix, and update its parameter if it has one."""
    _begin(entry, first, team, workers)
    _wait(job, team, alone)
    passes = _iterate(job, entry, first, team, workers, scratch, alone)
    if passes == 0:
        store_int(entry + t.FAILED, 1)
        return
    P, Q = load_int(entry + t.P), load_int(entry + t.Q)
    u, v = load_int(entry + t.U), load_int(entry + t.V)
    for worker in range(first, workers, team):
        low = share_begin(P, worker, workers, 1)
        _sqrt(u + 4 * low, share_begin(P, worker + 1, workers, 1) - low)
        low = share_begin(Q, worker, workers, 1)
        _sqrt(v + 4 * low, share_begin(Q, worker + 1, workers, 1) - low)
    if load_int(entry + t.W) == 0:
        return
    _wait(job, team, alone)
    for worker in range(first, workers, team):
        # A worker updates the rows that it has read, beginning with those that it read last.
        low, high = share_begin(P, worker, workers, ROWS), share_begin(P, worker + 1, workers, ROWS)
        update_rows(entry, low, high, passes % 2 == 0, load_int(job + t.FLOATS), 0)


@cfunc(void(int64), cache=True, error_model="numpy")
def find_scales(job):
    """Find the scales of a table of gradients, and update parameters, as one thread of a team.

    Large matrices come first: their rows are divided among all workers. Then each thread claims
    small matrices and solves them alone, without barriers. Only a matrix's own size decides whether
    it is divided, so the bits of its scales do not depend on other matrices.
    """
    table, count = load_int(job + t.TABLE), load_int(job + t.COUNT)
    workers = load_int(job + t.WORKERS)
    scratch, stride = load_int(job + t.SCRATCH), load_int(job + t.STRIDE)
    first, team = int64(thread_num()), int64(num_threads())
    shared = False
    for i in range(count):
        entry = table + i * _ROW
        if load_int(entry + t.P) * load_int(entry + t.Q) > load_int(job + t.SHARED_ABOVE):
            shared = True
            _solve(job, entry, first, team, workers, scratch, False)
    if shared:
        barrier(job, team)  # all threads have read the flags of the last large matrix
    i = fetch_add(job + t.NEXT)
    while i < count:
        entry = table + i * _ROW
        if load_int(entry + t.P) * load_int(entry + t.Q) <= load_int(job + t.SHARED_ABOVE):
            _solve(job, entry, 0, 1, 1, scratch + first * stride, True)
        i = fetch_add(job + t.NEXT)
