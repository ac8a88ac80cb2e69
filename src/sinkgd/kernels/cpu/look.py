"""The job ``find_bad``: which of a table of tensors hold NaN or infinity, in one pass.

A finite number times zero is zero, and adds nothing; NaN and infinity times zero are NaN.
"""

from numba import cfunc, float32, int16, int64, void

from sinkgd.kernels.cpu import tables as t
from sinkgd.kernels.cpu.instructions import (
    LANES,
    compiled,
    get_int,
    inlined,
    load,
    plus,
    prefetch,
    put_int,
    splat,
    times_plus,
    total,
)
from sinkgd.kernels.cpu.threads import claim

BLOCK = 65536  # entries that a thread claims at a time
AHEAD = 8192  # bytes that are fetched early

_ENTRY = 8 * t.LOOK_FIELDS


@inlined
def _zeros(dtype, size, x, count):
    """Return zero, or NaN where one of ``count`` entries at ``x`` is not finite."""
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
        a = times_plus(load(dtype, at, None), zero, a)
        b = times_plus(load(dtype, at + LANES * size, None), zero, b)
        c = times_plus(load(dtype, at + 2 * LANES * size, None), zero, c)
        d = times_plus(load(dtype, at + 3 * LANES * size, None), zero, d)
    for j in range(full, count, LANES):
        a = times_plus(load(dtype, x + j * size, min(LANES, count - j)), zero, a)
    return total(plus(plus(a, b), plus(c, d)))


@compiled
def _is_bad(entry, low, high):
    x = get_int(entry + t.X)
    if get_int(entry + t.XDTYPE) == t.F32:
        return _zeros(float32(0), 4, x + 4 * low, high - low) != 0
    return _zeros(int16(0), 2, x + 2 * low, high - low) != 0


@cfunc(void(int64), cache=True, error_model="numpy")
def find_bad(job):
    """Look through a table of tensors, as one thread of a team that claims blocks of entries."""
    table, count = get_int(job + t.TABLE), get_int(job + t.COUNT)
    begin = 0
    mine = claim(job + t.NEXT)
    for i in range(count):
        entry = table + i * _ENTRY
        entries = get_int(entry + t.ENTRIES)
        blocks = (entries + BLOCK - 1) // BLOCK
        while mine < begin + blocks:
            low = (mine - begin) * BLOCK
            if _is_bad(entry, low, min(entries, low + BLOCK)):
                put_int(entry + t.BAD, 1)
            mine = claim(job + t.NEXT)
        begin += blocks
