"""The job ``take_steps``: update a table of parameters from gradients and scales, in one pass.

Letters: see `sinkgd.kernels.cpu.tables`; here u and v are the scales themselves.
"""

from numba import cfunc, float32, int16, int64, void

from sinkgd.kernels.cpu import tables as t
from sinkgd.kernels.cpu.instructions import (
    LANES,
    claim,
    compiled,
    dither,
    get_byte,
    get_double,
    get_float,
    get_int,
    inlined,
    load,
    prefetch,
    splat,
    store,
    times,
    times_plus,
)

BLOCK = 32768  # entries that a thread claims at a time
AHEAD = 8192  # bytes that are fetched early: processors stop fetching ahead at each page of 4096

_ENTRY = 8 * t.UPDATE_FIELDS


@inlined
def _moved(w_dtype, g_dtype, w, g, v, r, keep, step, count):
    """Sixteen entries after the update, in float32."""
    x = times(times(load(g_dtype, g, count), r), load(float32(0), v, count))
    kept = times(keep, load(w_dtype, w, count))
    return times_plus(step, x, kept)


@compiled
def _step_rows(w_dtype, w_size, g_dtype, g_size, entry, low, high, keep, step):
    """Update the rows from ``low`` to ``high``, rounding to the nearest."""
    Q, u, v = get_int(entry + t.WQ), get_int(entry + t.WU), get_int(entry + t.WV)
    full = Q - Q % LANES
    for row in range(low, high):
        w = get_int(entry + t.W) + row * get_int(entry + t.WLD)
        g = get_int(entry + t.WG) + row * get_int(entry + t.GLD)
        r = splat(get_float(u + 4 * row))
        for j in range(0, full, LANES):
            if w_size == 2 or g_size == 2:
                prefetch(w + j * w_size + AHEAD)
                prefetch(g + j * g_size + AHEAD)
            x = _moved(
                w_dtype, g_dtype, w + j * w_size, g + j * g_size, v + 4 * j, r, keep, step, None
            )
            store(w_dtype, w + j * w_size, x, None)
        if full < Q:
            w += full * w_size
            g += full * g_size
            x = _moved(w_dtype, g_dtype, w, g, v + 4 * full, r, keep, step, Q - full)
            store(w_dtype, w, x, Q - full)


@compiled
def _step_rows_at_random(g_dtype, g_size, entry, low, high, keep, step):
    """Update the rows from ``low`` to ``high`` of a bfloat16 parameter, rounding at random."""
    P, Q = get_int(entry + t.WP), get_int(entry + t.WQ)
    u, v = get_int(entry + t.WU), get_int(entry + t.WV)
    turned, key = get_int(entry + t.WTURNED) != 0, get_int(entry + t.KEY)
    down, along = (1, P) if turned else (Q, 1)  # places from one row in memory to the next, and on
    for row in range(low, high):
        w = get_int(entry + t.W) + row * get_int(entry + t.WLD)
        g = get_int(entry + t.WG) + row * get_int(entry + t.GLD)
        place = get_int(entry + t.PLACE) + row * down
        r = splat(get_float(u + 4 * row))
        for j in range(0, Q, LANES):
            count = min(LANES, Q - j)
            x = _moved(
                int16(0), g_dtype, w + 2 * j, g + j * g_size, v + 4 * j, r, keep, step, count
            )
            store(int16(0), w + 2 * j, dither(x, place + j * along, along, key), count)


@inlined
def _step(entry, low, high, keep, step):
    """Update the rows from ``low`` to ``high`` for the types of parameter and gradient."""
    wide, g_wide = get_int(entry + t.WDTYPE) == t.F32, get_int(entry + t.GDTYPE) == t.F32
    if not wide and get_int(entry + t.KEYED) != 0:
        if g_wide:
            _step_rows_at_random(float32(0), 4, entry, low, high, keep, step)
        else:
            _step_rows_at_random(int16(0), 2, entry, low, high, keep, step)
    elif wide and g_wide:
        _step_rows(float32(0), 4, float32(0), 4, entry, low, high, keep, step)
    elif wide:
        _step_rows(float32(0), 4, int16(0), 2, entry, low, high, keep, step)
    elif g_wide:
        _step_rows(int16(0), 2, float32(0), 4, entry, low, high, keep, step)
    else:
        _step_rows(int16(0), 2, int16(0), 2, entry, low, high, keep, step)


@cfunc(void(int64), cache=True, error_model="numpy")
def take_steps(job):
    """Update a table of parameters, as one thread of a team that claims blocks of rows.

    The table is walked from its end: the gradients that `find_scales` read last are in the cache.
    """
    table, count = get_int(job + t.TABLE), get_int(job + t.COUNT)
    factors = get_int(job + t.NUMBERS)
    keep, step = splat(float32(get_double(factors))), splat(float32(get_double(factors + 8)))
    begin = 0
    mine = claim(job + t.NEXT)
    for i in range(count - 1, -1, -1):
        entry = table + i * _ENTRY
        P = get_int(entry + t.WP)
        rows = max(1, BLOCK // max(1, get_int(entry + t.WQ)))
        blocks = (P + rows - 1) // rows
        allowed = get_int(entry + t.ALLOWED)
        skip = allowed != 0 and get_byte(allowed) == 0
        while mine < begin + blocks:
            low = (mine - begin) * rows
            if not skip:
                _step(entry, low, min(P, low + rows), keep, step)
            mine = claim(job + t.NEXT)
        begin += blocks
