"""Update parameters from gradients and scales, in one pass; the job ``take_steps`` does a table.

Letters: see `sinkgd.kernels.cpu.tables`.
"""

from numba import cfunc, float32, int16, int64, void

from sinkgd.kernels.cpu import tables as t
from sinkgd.kernels.cpu.instructions import (
    LANES,
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
from sinkgd.kernels.cpu.threads import claim

BLOCK = 32768  # entries that are updated at a time
AHEAD = 8192  # bytes that are fetched early: processors stop fetching ahead at each page of 4096

_ENTRY = 8 * t.MATRIX_FIELDS


@inlined
def _one_less(x, left, right, count):
    number = splat(-get_float(left))
    return times_plus(number, load(float32(0), right, count), x)


@inlined
def _less(x, left, right, apart, blocks, count):
    """Sixteen entries less what is taken away: eight numbers a block, times as many vectors."""
    for block in range(blocks):
        number, vector = left + 4 * t.VECTORS * block, right + t.VECTORS * apart * block
        x = _one_less(x, number, vector, count)
        x = _one_less(x, number + 4, vector + apart, count)
        x = _one_less(x, number + 8, vector + 2 * apart, count)
        x = _one_less(x, number + 12, vector + 3 * apart, count)
        x = _one_less(x, number + 16, vector + 4 * apart, count)
        x = _one_less(x, number + 20, vector + 5 * apart, count)
        x = _one_less(x, number + 24, vector + 6 * apart, count)
        x = _one_less(x, number + 28, vector + 7 * apart, count)
    return x


@inlined
def _moved(w_dtype, g_dtype, w, g, v, r, keep, step, left, right, apart, blocks, count):
    """Sixteen entries after the update, in float32."""
    x = times(times(load(g_dtype, g, count), r), load(float32(0), v, count))
    if blocks is not None:
        x = _less(x, left, right, apart, blocks, count)
    kept = times(keep, load(w_dtype, w, count))
    return times_plus(step, x, kept)


@compiled
def _step_near(w_dtype, w_size, g_dtype, g_size, entry, low, high, keep, step, blocks):
    """Update the rows from ``low`` to ``high``, rounding to the nearest."""
    Q, u, v = get_int(entry + t.Q), get_int(entry + t.U), get_int(entry + t.V)
    left, right, apart = get_int(entry + t.LEFT), get_int(entry + t.RIGHT), 4 * Q
    full = Q - Q % LANES
    for row in range(low, high):
        w = get_int(entry + t.W) + row * get_int(entry + t.WLD)
        g = get_int(entry + t.G) + row * get_int(entry + t.LD)
        r = splat(get_float(u + 4 * row))
        numbers = left + _numbers(row, blocks)
        for j in range(0, full, LANES):
            prefetch(w + j * w_size + AHEAD)
            prefetch(g + j * g_size + AHEAD)
            x = _moved(
                w_dtype, g_dtype, w + j * w_size, g + j * g_size, v + 4 * j, r, keep, step,
                numbers, right + 4 * j, apart, blocks, None,
            )  # fmt: skip
            store(w_dtype, w + j * w_size, x, None)
        if full < Q:
            w += full * w_size
            g += full * g_size
            x = _moved(
                w_dtype, g_dtype, w, g, v + 4 * full, r, keep, step,
                numbers, right + 4 * full, apart, blocks, Q - full,
            )  # fmt: skip
            store(w_dtype, w, x, Q - full)


@compiled
def _step_at_random(g_dtype, g_size, entry, low, high, keep, step, blocks):
    """Update the rows from ``low`` to ``high`` of a bfloat16 parameter, rounding at random."""
    P, Q = get_int(entry + t.P), get_int(entry + t.Q)
    u, v = get_int(entry + t.U), get_int(entry + t.V)
    left, right, apart = get_int(entry + t.LEFT), get_int(entry + t.RIGHT), 4 * Q
    turned, key = get_int(entry + t.TURNED) != 0, get_int(entry + t.KEY)
    down, along = (1, P) if turned else (Q, 1)  # places from one row in memory to the next, and on
    for row in range(low, high):
        w = get_int(entry + t.W) + row * get_int(entry + t.WLD)
        g = get_int(entry + t.G) + row * get_int(entry + t.LD)
        place = get_int(entry + t.PLACE) + row * down
        r = splat(get_float(u + 4 * row))
        numbers = left + _numbers(row, blocks)
        for j in range(0, Q, LANES):
            count = min(LANES, Q - j)
            x = _moved(
                int16(0), g_dtype, w + 2 * j, g + j * g_size, v + 4 * j, r, keep, step,
                numbers, right + 4 * j, apart, blocks, count,
            )  # fmt: skip
            store(int16(0), w + 2 * j, dither(x, place + j * along, along, key), count)


@inlined
def _numbers(row, blocks):
    """Where the numbers of a row begin, in bytes, of which something is taken away."""
    return 0 if blocks is None else 4 * t.VECTORS * blocks * row


@compiled
def _step_by(entry, low, high, factors, blocks):
    """Update the rows from ``low`` to ``high`` for the types of parameter and gradient."""
    keep, step = splat(float32(get_double(factors))), splat(float32(get_double(factors + 8)))
    wide, g_wide = get_int(entry + t.WDTYPE) == t.F32, get_int(entry + t.DTYPE) == t.F32
    if not wide and get_int(entry + t.KEYED) != 0:
        if g_wide:
            _step_at_random(float32(0), 4, entry, low, high, keep, step, blocks)
        else:
            _step_at_random(int16(0), 2, entry, low, high, keep, step, blocks)
    elif wide and g_wide:
        _step_near(float32(0), 4, float32(0), 4, entry, low, high, keep, step, blocks)
    elif wide:
        _step_near(float32(0), 4, int16(0), 2, entry, low, high, keep, step, blocks)
    elif g_wide:
        _step_near(int16(0), 2, float32(0), 4, entry, low, high, keep, step, blocks)
    else:
        _step_near(int16(0), 2, int16(0), 2, entry, low, high, keep, step, blocks)


@compiled
def _step(entry, low, high, factors):
    """Update the rows from ``low`` to ``high``, with what is taken away or without."""
    blocks = get_int(entry + t.TAKEN)
    if blocks == 0:
        _step_by(entry, low, high, factors, None)  # a function of its own, without the loop
    else:
        _step_by(entry, low, high, factors, blocks)


@inlined
def _rows_of_a_block(entry):
    return max(1, BLOCK // max(1, get_int(entry + t.Q)))


@compiled
def step_rows(entry, low, high, forward, factors):
    """Update the rows from ``low`` to ``high``, block by block in either direction."""
    rows = _rows_of_a_block(entry)
    if forward:
        for begin in range(low, high, rows):
            _step(entry, begin, min(high, begin + rows), factors)
    else:
        for end in range(high, low, -rows):
            _step(entry, max(low, end - rows), end, factors)


@cfunc(void(int64), cache=True, error_model="numpy")
def take_steps(job):
    """Update a table of parameters, as one thread of a team that claims blocks of rows.

    The table is walked from its end: the gradients that `find_scales` read last are in the cache.
    """
    table, count = get_int(job + t.TABLE), get_int(job + t.COUNT)
    begin = 0
    mine = claim(job + t.NEXT)
    for i in range(count - 1, -1, -1):
        entry = table + i * _ENTRY
        P, rows = get_int(entry + t.P), _rows_of_a_block(entry)
        blocks = (P + rows - 1) // rows
        allowed = get_int(entry + t.ALLOWED)
        skip = allowed != 0 and get_byte(allowed) == 0
        while mine < begin + blocks:
            low = (mine - begin) * rows
            if not skip:
                _step(entry, low, min(P, low + rows), get_int(job + t.NUMBERS))
            mine = claim(job + t.NEXT)
        begin += blocks
