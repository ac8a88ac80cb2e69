"""The job ``add_up``: weighted sums of the squares of a table of gradients, by a team of threads.

Each gradient goes whole to the thread that claims it, so its bits depend on it alone. Letters: see
`sinkgd.kernels.cpu.tables`.
"""

from numba import cfunc, float32, int16, int64, void

from sinkgd.kernels.cpu import tables as t
from sinkgd.kernels.cpu.eight_rows import (
    PANEL,
    ROWS,
    add_one_row,
    column_sums,
    one_row_sum,
    row_sums,
)
from sinkgd.kernels.cpu.instructions import compiled, get_int, store
from sinkgd.kernels.cpu.threads import claim, thread_num
from sinkgd.kernels.cpu.vectors import fill, move

_ENTRY = 8 * t.SUMS_FIELDS


@compiled
def _add_along(dtype, size, g, ld, P, Q, v, sums):
    """Write the sum of every row's squares, each times its ``v``."""
    full = P - P % ROWS
    for row in range(0, full, ROWS):
        found = row_sums(dtype, size, g + row * ld, ld, Q, v)
        store(float32(0), sums + 4 * row, found, ROWS)
    for row in range(full, P):
        found = one_row_sum(dtype, size, g + row * ld, Q, v)
        store(float32(0), sums + 4 * row, found, 1)


@compiled
def _add_down(dtype, size, g, ld, P, Q, u, sums, panel):
    """Write the sum of every column's squares, each times its ``u``."""
    fill(sums, Q, float32(0))
    fill(panel, Q, float32(0))
    full = P - P % ROWS
    for row in range(0, full, ROWS):
        at = g + row * ld
        column_sums(dtype, size, at, ld, Q, u + 4 * row, panel, at + ROWS * ld)
        if (row // ROWS + 1) % PANEL == 0:
            move(panel, sums, Q)
    for row in range(full, P):
        add_one_row(dtype, size, g + row * ld, Q, u + 4 * row, panel)
    move(panel, sums, Q)


@compiled
def _add_up(dtype, size, entry, panel):
    g, ld = get_int(entry + t.SG), get_int(entry + t.SLD)
    P, Q = get_int(entry + t.SP), get_int(entry + t.SQ)
    weights, sums = get_int(entry + t.FROM), get_int(entry + t.TO)
    if get_int(entry + t.ALONG) != 0:
        _add_along(dtype, size, g, ld, P, Q, weights, sums)
    else:
        _add_down(dtype, size, g, ld, P, Q, weights, sums, panel)


@cfunc(void(int64), cache=True, error_model="numpy")
def add_up(job):
    """Add up a table of gradients, as one thread of a team."""
    table, count = get_int(job + t.TABLE), get_int(job + t.COUNT)
    panel = get_int(job + t.SCRATCH) + int64(thread_num()) * get_int(job + t.STRIDE)
    i = claim(job + t.NEXT)
    while i < count:
        entry = table + i * _ENTRY
        if get_int(entry + t.SDTYPE) == t.BF16:
            _add_up(int16(0), 2, entry, panel)
        else:
            _add_up(float32(0), 4, entry, panel)
        i = claim(job + t.NEXT)
