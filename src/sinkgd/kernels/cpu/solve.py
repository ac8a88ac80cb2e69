"""The job ``find_scales``: the scales of a table of gradients, by a team of threads.

Where a parameter lies beside one, it is updated as soon as the scales are known, while the gradient
is in the cache.

Letters: see `sinkgd.kernels.cpu.tables`. A transposed gradient differs in one thing: its columns
are rows in memory, so v comes first.

Zero rows or columns take no part, and the others would then drift: u by a factor an iteration, v by
its inverse. So the lengths are counted without them, and the true length is taken in the last half
of the last iteration alone, which is where it shows.
"""

import math

from numba import cfunc, float32, int16, int64, void

from sinkgd.kernels.cpu import tables as t
from sinkgd.kernels.cpu.eight_rows import ROWS
from sinkgd.kernels.cpu.instructions import (
    LANES,
    compiled,
    get_double,
    get_float,
    get_int,
    inlined,
    load,
    plus,
    put_float,
    put_int,
    store,
)
from sinkgd.kernels.cpu.invert import (
    COLUMNS_FAILED,
    COLUMNS_MOVED,
    FLOOR,
    ROWS_FAILED,
    ROWS_MOVED,
    SUMS,
    ZERO_COLUMNS,
    ZERO_ROWS,
    invert,
    is_empty,
    settle,
)
from sinkgd.kernels.cpu.step import step_rows
from sinkgd.kernels.cpu.sweep import sweep
from sinkgd.kernels.cpu.threads import barrier, claim, num_threads, share, thread_num
from sinkgd.kernels.cpu.vectors import fill, sum_of

_ENTRY = 8 * t.MATRIX_FIELDS


@compiled
def _total_of(field, scratch, stride, workers):
    """What the workers have found out, added up."""
    found = 0
    for worker in range(workers):
        found += get_int(scratch + worker * stride + field)
    return found


@compiled
def _root(address, count):
    for j in range(count):
        put_float(address + 4 * j, math.sqrt(get_float(address + 4 * j)))


@compiled
def _settle_columns(entry, mine, j, count, column, length, floor, known, tested, lo, hi):
    """Set ``v`` of up to 16 columns, one by one: a zero column, or a number out of range."""
    g, ld, P = get_int(entry + t.G), get_int(entry + t.LD), get_int(entry + t.P)
    for i in range(count):
        value, at = get_float(column + 4 * i), get_int(entry + t.V) + 4 * (j + i)
        empty = False
        if value == 0 and known:
            empty = get_float(at) == 0
        elif value == 0 and get_int(entry + t.DTYPE) == t.BF16:
            empty = is_empty(int16(0), 2, g + 2 * (j + i), ld, P)
        elif value == 0:
            empty = is_empty(float32(0), 4, g + 4 * (j + i), ld, P)
        settle(mine + ZERO_COLUMNS, at, value, length, floor, tested, lo, hi, empty)


@compiled
def _reduce(entry, worker, workers, scratch, stride, length, known, lo, hi):
    """Add the workers' column sums in their order, and set ``v`` of a worker's share of columns."""
    mine, Q, P = scratch + worker * stride, get_int(entry + t.Q), get_int(entry + t.P)
    put_int(mine + ZERO_COLUMNS, 0)
    put_int(mine + COLUMNS_MOVED, 0)
    put_int(mine + COLUMNS_FAILED, 0)
    floor = float32(FLOOR) * (float32(P) + sum_of(get_int(entry + t.U), P))
    tested = known and hi > 0
    sums = scratch + SUMS
    low, high = share(Q, worker, workers, LANES), share(Q, worker + 1, workers, LANES)
    for j in range(low, high, LANES):
        count = min(LANES, high - j)
        column = load(float32(0), sums + 4 * j, count)
        for other in range(1, workers):
            column = plus(column, load(float32(0), sums + other * stride + 4 * j, count))
        v = get_int(entry + t.V) + 4 * j
        well, moved = invert(column, v, count, length, floor, tested, lo, hi)
        if not well:
            store(float32(0), sums + 4 * j, column, count)  # nobody else reads these any more
            _settle_columns(
                entry, mine, j, count, sums + 4 * j, length, floor, known, tested, lo, hi
            )
        elif moved:
            put_int(mine + COLUMNS_MOVED, 1)


@inlined
def _wait(job, team, alone):
    if not alone:
        barrier(job, team)


@compiled
def _begin(entry, first, team, workers):
    """Fill the scales from which the iterations start with ones, unless they are given."""
    if get_int(entry + t.STARTED) == 0:
        turned = get_int(entry + t.TURNED) != 0
        start = get_int(entry + (t.U if turned else t.V))
        count = get_int(entry + (t.P if turned else t.Q))
        for worker in range(first, workers, team):
            low = share(count, worker, workers, 1)
            fill(start + 4 * low, share(count, worker + 1, workers, 1) - low, float32(1))


@compiled
def _iterate(job, entry, first, team, workers, scratch, alone):
    """Iterate as worker ``first``, ``first + team``, … of ``workers``.

    Returns how many passes were made; 0 where it failed.

    What the workers found is read between two barriers at which none of them writes it, so that all
    threads go the same way.
    """
    P, Q, iters = get_int(entry + t.P), get_int(entry + t.Q), get_int(job + t.ITERS)
    stride, turned = get_int(job + t.STRIDE), get_int(entry + t.TURNED) != 0
    quotients = get_int(job + t.NUMBERS) + 16
    lo, hi = float32(get_double(quotients)), float32(get_double(quotients + 8))
    settled, live_columns = False, Q
    for number in range(iters + turned):
        last_rows = turned and (number == iters or settled)
        length = float32(Q if last_rows else live_columns)
        for worker in range(first, workers, team):
            mine = scratch + worker * stride
            begin, end = share(P, worker, workers, ROWS), share(P, worker + 1, workers, ROWS)
            sweep(
                entry, mine, mine + stride // 2 + SUMS, begin, end, not turned or number > 0,
                not last_rows, number % 2 == 0, length, number > turned, lo,
                float32(0) if turned else hi,
            )  # fmt: skip
        _wait(job, team, alone)
        if _total_of(ROWS_FAILED, scratch, stride, workers) > 0:
            return 0
        if last_rows:
            return number + 1
        live_rows = P
        if number >= turned:
            live_rows -= _total_of(ZERO_ROWS, scratch, stride, workers)
        if not turned:
            settled = number > 0 and hi > 0
            settled = settled and _total_of(ROWS_MOVED, scratch, stride, workers) == 0
        last_columns = not turned and (number == iters - 1 or settled)
        length = float32(P if last_columns else live_rows)
        for worker in range(first, workers, team):
            _reduce(
                entry, worker, workers, scratch, stride, length, number > 0, lo,
                hi if turned else float32(0),
            )  # fmt: skip
        _wait(job, team, alone)
        if _total_of(COLUMNS_FAILED, scratch, stride, workers) > 0:
            return 0
        if last_columns:
            return number + 1
        live_columns = Q - _total_of(ZERO_COLUMNS, scratch, stride, workers)
        if turned:
            settled = number > 0 and hi > 0
            settled = settled and _total_of(COLUMNS_MOVED, scratch, stride, workers) == 0
    return 0


@compiled
def _solve(job, entry, first, team, workers, scratch, alone):
    """Find the scales of one matrix, and take its step."""
    _begin(entry, first, team, workers)
    _wait(job, team, alone)
    passes = _iterate(job, entry, first, team, workers, scratch, alone)
    if passes == 0:
        put_int(entry + t.FAILED, 1)
        return
    P, Q = get_int(entry + t.P), get_int(entry + t.Q)
    u, v = get_int(entry + t.U), get_int(entry + t.V)
    for worker in range(first, workers, team):
        low = share(P, worker, workers, 1)
        _root(u + 4 * low, share(P, worker + 1, workers, 1) - low)
        low = share(Q, worker, workers, 1)
        _root(v + 4 * low, share(Q, worker + 1, workers, 1) - low)
    if get_int(entry + t.W) == 0:
        return
    _wait(job, team, alone)
    for worker in range(first, workers, team):
        # A worker steps along the rows that it has read, those of the last pass's end first.
        low, high = share(P, worker, workers, ROWS), share(P, worker + 1, workers, ROWS)
        step_rows(entry, low, high, passes % 2 == 0, get_int(job + t.NUMBERS), 0)


@cfunc(void(int64), cache=True, error_model="numpy")
def find_scales(job):
    """Find the scales of a table of gradients, and take their steps, as one thread of a team.

    Large matrices come first, their rows split over all workers; then each small one goes whole to
    the thread that claims it, without barriers. Which is which depends on the matrix alone, so its
    bits do not depend on the others.
    """
    table, count, workers = get_int(job + t.TABLE), get_int(job + t.COUNT), get_int(job + t.WORKERS)
    scratch, stride = get_int(job + t.SCRATCH), get_int(job + t.STRIDE)
    first, team = int64(thread_num()), int64(num_threads())
    shared = False
    for i in range(count):
        entry = table + i * _ENTRY
        if get_int(entry + t.P) * get_int(entry + t.Q) > get_int(job + t.WHOLE):
            shared = True
            _solve(job, entry, first, team, workers, scratch, False)
    if shared:
        barrier(job, team)  # what a worker found about the last one has been read by all
    i = claim(job + t.NEXT)
    while i < count:
        entry = table + i * _ENTRY
        if get_int(entry + t.P) * get_int(entry + t.Q) <= get_int(job + t.WHOLE):
            _solve(job, entry, 0, 1, 1, scratch + first * stride, True)
        i = claim(job + t.NEXT)
