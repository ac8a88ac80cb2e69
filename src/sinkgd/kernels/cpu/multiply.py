"""The job ``multiply``: products of a table of updates with a few vectors, by a team of threads.

A reading of X takes X V, or Xᵀ Y, or both one after the other, Xᵀ X V, for blocks of eight vectors.
Letters: see `sinkgd.kernels.cpu.tables`.
"""

from numba import cfunc, float32, int16, int64, void

from sinkgd.kernels.cpu import tables as t
from sinkgd.kernels.cpu.few_vectors import ROWS, along, down
from sinkgd.kernels.cpu.instructions import LANES, compiled, get_int, load, plus, store
from sinkgd.kernels.cpu.threads import barrier, claim, num_threads, share, thread_num
from sinkgd.kernels.cpu.vectors import fill

_ENTRY = 8 * t.PRODUCT_FIELDS


@compiled
def _multiply_rows(dtype, size, entry, low, high, sums):
    """Take the products of the rows from ``low`` to ``high``; those down go to ``sums``."""
    ld, Q, blocks = get_int(entry + t.MLD), get_int(entry + t.MQ), get_int(entry + t.BLOCKS)
    u, v, wide = get_int(entry + t.MU), get_int(entry + t.MV), get_int(entry + t.WIDE)
    squares = get_int(entry + t.SQUARES)
    apart, across = 4 * Q, 4 * t.VECTORS * blocks
    for row in range(low, high, ROWS):
        end = min(high, row + ROWS)
        for block in range(blocks):
            if wide != 0:
                for i in range(row, end, 2):
                    k = min(i + 1, end - 1)
                    g = get_int(entry + t.MG) + i * ld
                    tall = get_int(entry + t.TALL) + i * across + 4 * t.VECTORS * block
                    along(
                        dtype, size, g, (k - i) * ld, Q, u + 4 * i, u + 4 * k, v,
                        wide + t.VECTORS * block * apart, apart, tall, tall + (k - i) * across,
                        squares + 4 * i, squares + 4 * k,
                    )  # fmt: skip
            if sums != 0:
                g = get_int(entry + t.MG) + row * ld
                tall = get_int(entry + t.TALL) + row * across + 4 * t.VECTORS * block
                down(
                    dtype, size, g, ld, end - row, Q, u + 4 * row, v, tall, across,
                    sums + t.VECTORS * block * apart, apart,
                )  # fmt: skip


@compiled
def _multiply(entry, low, high, sums):
    if get_int(entry + t.MDTYPE) == t.BF16:
        _multiply_rows(int16(0), 2, entry, low, high, sums)
    else:
        _multiply_rows(float32(0), 4, entry, low, high, sums)


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
def _multiply_together(job, entry, first, team, scratch):
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
        _multiply(entry, low, high, sums)
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
    turn = 0
    for i in range(count):
        entry = table + i * _ENTRY
        if get_int(entry + t.MP) * get_int(entry + t.MQ) > get_int(job + t.WHOLE):
            scratch = get_int(job + t.SCRATCH) + turn * get_int(job + t.STRIDE) // 2
            if _multiply_together(job, entry, first, team, scratch):
                turn = 1 - turn
    i = claim(job + t.NEXT)
    while i < count:
        entry = table + i * _ENTRY
        P, Q = get_int(entry + t.MP), get_int(entry + t.MQ)
        if get_int(job + t.WHOLE) >= P * Q:
            result = get_int(entry + t.DOWN)
            if result != 0:
                fill(result, t.VECTORS * get_int(entry + t.BLOCKS) * Q, float32(0))
            _multiply(entry, 0, P, result)
        i = claim(job + t.NEXT)
