"""The job ``multiply``: products of a table of updates with a few vectors, by a team of threads.

A reading of X takes X V, or Xᵀ Y, or both one after the other, Xᵀ X V, for blocks of sixteen
vectors. Letters: see `sinkgd.kernels.cpu.tables`.
"""

from numba import cfunc, float32, int16, int64, void

from sinkgd.kernels.cpu import tables as t
from sinkgd.kernels.cpu.few_vectors import ROW, WIDTH, add_along, add_down, make_panel
from sinkgd.kernels.cpu.instructions import (
    LANES,
    compiled,
    get_int,
    load,
    plus,
    put_float,
    store,
    total,
)
from sinkgd.kernels.cpu.tables import COLUMNS, PANEL, ROWS
from sinkgd.kernels.cpu.threads import barrier, claim, num_threads, share, thread_num
from sinkgd.kernels.cpu.vectors import fill

_ENTRY = 8 * t.PRODUCT_FIELDS


@compiled
def _multiply_rows(dtype, size, entry, low, high, sums, panel):
    """Take the products of the rows from ``low`` to ``high``; those down go to ``sums``."""
    ld, Q, blocks = get_int(entry + t.MLD), get_int(entry + t.MQ), get_int(entry + t.BLOCKS)
    v, wide, squares = get_int(entry + t.MV), get_int(entry + t.WIDE), get_int(entry + t.SQUARES)
    apart, lanes = WIDTH * blocks, panel + ROWS * ROW
    for row in range(low, high, ROWS):
        rows = min(ROWS, high - row)
        g, u = get_int(entry + t.MG) + row * ld, get_int(entry + t.MU) + 4 * row
        tall = get_int(entry + t.TALL) + row * apart
        if wide != 0:
            fill(tall, rows * blocks * LANES, float32(0))
            fill(lanes, rows * LANES, float32(0))
            for j in range(0, Q, COLUMNS):
                columns = min(COLUMNS, Q - j)
                ahead = COLUMNS * size if j + COLUMNS < Q else ROWS * ld - j * size
                make_panel(
                    dtype, size, g + j * size, ld, rows, columns, u, v + 4 * j, panel, lanes, ahead
                )
                for block in range(blocks):
                    at = WIDTH * block
                    add_along(panel, rows, columns, wide + j * apart + at, apart, tall + at, apart)
            for i in range(rows):
                found = total(load(float32(0), lanes + WIDTH * i, None))
                put_float(squares + 4 * (row + i), found)
        if sums != 0:
            for j in range(0, Q, COLUMNS):
                columns = min(COLUMNS, Q - j)
                ahead = COLUMNS * size if j + COLUMNS < Q else ROWS * ld - j * size
                make_panel(
                    dtype, size, g + j * size, ld, rows, columns, u, v + 4 * j, panel, None, ahead
                )
                for block in range(blocks):
                    at = WIDTH * block
                    add_down(panel, rows, columns, tall + at, apart, sums + j * apart + at, apart)


@compiled
def _multiply(entry, low, high, sums, panel):
    if get_int(entry + t.MDTYPE) == t.BF16:
        _multiply_rows(int16(0), 2, entry, low, high, sums, panel)
    else:
        _multiply_rows(float32(0), 4, entry, low, high, sums, panel)


@compiled
def _gather(sums, stride, workers, result, low, high):
    """Add up what the workers have from ``low`` to ``high``, in their order."""
    for j in range(low, high, LANES):
        count = min(LANES, high - j)
        x = load(float32(0), sums + 4 * j, count)
        for worker in range(1, workers):
            x = plus(x, load(float32(0), sums + worker * stride + 4 * j, count))
        store(float32(0), result + 4 * j, x, count)


@compiled
def _multiply_together(job, entry, first, team, scratch, panel):
    """Multiply as worker ``first``, ``first + team``, …, each with sums of its own in the scratch.

    Return whether these were used: others may still read them.
    """
    P, workers, stride = get_int(entry + t.MP), get_int(job + t.WORKERS), get_int(job + t.STRIDE)
    result = get_int(entry + t.DOWN)
    count = t.VECTORS * get_int(entry + t.BLOCKS) * get_int(entry + t.MQ)
    for worker in range(first, workers, team):
        sums = scratch + worker * stride if result != 0 else 0
        if result != 0:
            fill(sums, count, float32(0))
        low, high = share(P, worker, workers, ROWS), share(P, worker + 1, workers, ROWS)
        _multiply(entry, low, high, sums, panel)
    if result == 0:
        return False
    barrier(job, team)
    for worker in range(first, workers, team):
        low, high = share(count, worker, workers, LANES), share(count, worker + 1, workers, LANES)
        _gather(scratch, stride, workers, result, low, high)
    return True


@cfunc(void(int64), cache=True, error_model="numpy")
def multiply(job):
    """Multiply a table of updates, as one thread of a team.

    As in `sinkgd.kernels.cpu.solve.find_scales`, large ones are shared, and small ones claimed. Two
    pieces of scratch take turns, so that nobody waits for those who still read the last one.
    """
    table, count = get_int(job + t.TABLE), get_int(job + t.COUNT)
    first, team = int64(thread_num()), int64(num_threads())
    panel = get_int(job + t.PANELS) + first * PANEL
    turn = 0
    for i in range(count):
        entry = table + i * _ENTRY
        if get_int(entry + t.MP) * get_int(entry + t.MQ) > get_int(job + t.WHOLE):
            scratch = get_int(job + t.SCRATCH) + turn * get_int(job + t.STRIDE) // 2
            if _multiply_together(job, entry, first, team, scratch, panel):
                turn = 1 - turn
    i = claim(job + t.NEXT)
    while i < count:
        entry = table + i * _ENTRY
        P, Q = get_int(entry + t.MP), get_int(entry + t.MQ)
        if get_int(job + t.WHOLE) >= P * Q:
            result = get_int(entry + t.DOWN)
            if result != 0:
                fill(result, t.VECTORS * get_int(entry + t.BLOCKS) * Q, float32(0))
            _multiply(entry, 0, P, result, panel)
        i = claim(job + t.NEXT)
