"""One pass over the rows of a gradient: their row sums, then their part of the column sums.

A block of rows is read twice: for its row sums, and again for the column sums once these are known.
The column sums of one block are taken beside the row sums of the next, so that memory is busy all
along and the second read hits the cache.

Letters: see `sinkgd.kernels.cpu.tables`. u = Q / (S v) and v = P / (Sᵀ u), with S = G∘G.
"""

from numba import float32, int16

from sinkgd.kernels.cpu import tables as t
from sinkgd.kernels.cpu.eight_rows import (
    PANEL,
    ROWS,
    add_one_row,
    both_sums,
    column_sums,
    one_row_sum,
    row_sums,
)
from sinkgd.kernels.cpu.instructions import compiled, get_int, put_int, splat
from sinkgd.kernels.cpu.invert import (
    FLOOR,
    ROWS_FAILED,
    ROWS_MOVED,
    SUMS,
    ZERO_ROWS,
    invert,
    settle_rows,
)
from sinkgd.kernels.cpu.vectors import fill, move, sum_of


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
        found = row_sums(dtype, size, g + row * ld, ld, Q, v)
    for block in range(blocks):
        at, scales = g + row * ld, u + 4 * row
        if rows:
            well, moved = invert(found, scales, ROWS, length, floor, tested, lo, hi)
            if not well:
                settle_rows(
                    dtype, size, at, ld, Q, scales, found, ROWS, mine, length, floor, known,
                    tested, lo, hi,
                )  # fmt: skip
            elif moved:
                put_int(mine + ROWS_MOVED, 1)
        ahead = at + 2 * step * ld
        if rows and block + 1 < blocks:
            if columns:
                found = both_sums(dtype, size, at, ld, Q, scales, panel, v, step * ld, ahead)
            else:
                found = row_sums(dtype, size, at + step * ld, ld, Q, v)
        elif columns:
            column_sums(dtype, size, at, ld, Q, scales, panel, ahead)
        if columns and panel != sums and (block + 1) % PANEL == 0:
            move(panel, sums, Q)
        row += step
    for last in range(first + blocks * ROWS, end):
        at, scale = g + last * ld, u + 4 * last
        if rows:
            found = one_row_sum(dtype, size, at, Q, v)
            settle_rows(
                dtype, size, at, ld, Q, scale, found, 1, mine, length, floor, known, tested, lo, hi
            )
        if columns:
            add_one_row(dtype, size, at, Q, scale, panel)
    if columns and panel != sums:
        move(panel, sums, Q)


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
