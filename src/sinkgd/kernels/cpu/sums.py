"""The job ``add_up``: weighted sums of the squares of a table of gradients, by a team of threads.

Each gradient goes whole to the thread that claims it, so its bits depend on it alone. Letters: see
`sinkgd.kernels.cpu.tables`.
"""

from numba import cfunc, float32, int16, int64, void

from sinkgd.kernels.cpu import tables as t
from sinkgd.kernels.cpu.instructions import claim, compiled, get_int, thread_num
from sinkgd.kernels.cpu.sweep import add_along, add_down

_ENTRY = 8 * t.SUMS_FIELDS


@compiled
def _add_up(dtype, size, entry, panel):
    g, ld = get_int(entry + t.SG), get_int(entry + t.SLD)
    P, Q = get_int(entry + t.SP), get_int(entry + t.SQ)
    weights, sums = get_int(entry + t.FROM), get_int(entry + t.TO)
    if get_int(entry + t.ALONG) != 0:
        add_along(dtype, size, g, ld, P, Q, weights, sums)
    else:
        add_down(dtype, size, g, ld, P, Q, weights, sums, panel)


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
