"""Update parameters from gradients and scales, in one pass; the job ``take_steps`` does a table.

Letters: see `sinkgd.kernels.cpu.tables`.
"""

from numba import cfunc, float32, int16, int64, void

from sinkgd.kernels.cpu import tables as t
from sinkgd.kernels.cpu.few_vectors import ROW, add_low_rank, make_panel
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
from sinkgd.kernels.cpu.threads import claim, thread_num

BLOCK = 32768  # entries that are updated at a time
AHEAD = 8192  # bytes that are fetched early: processors stop fetching ahead at each page of 4096

_ENTRY = 8 * t.MATRIX_FIELDS


@inlined
def _update(g_dtype, g_size, g, v, r, j, count):
    """Sixteen entries of the update from column ``j`` on; without ``v``, what is at ``g``."""
    x = load(g_dtype, g + j * g_size, count)
    if v is None:
        return x
    return times(times(x, r), load(float32(0), v + 4 * j, count))


@inlined
def _step_near(w_dtype, w_size, g_dtype, g_size, w, g, v, r, keep, step, count):
    """Update ``count`` entries in a row, rounding to the nearest."""
    full = count - count % LANES
    for j in range(0, full, LANES):
        prefetch(w + j * w_size + AHEAD)
        prefetch(g + j * g_size + AHEAD)
        x = _update(g_dtype, g_size, g, v, r, j, None)
        at = w + j * w_size
        store(w_dtype, at, times_plus(step, x, times(keep, load(w_dtype, at, None))), None)
    if full < count:
        rest, at = count - full, w + full * w_size
        x = _update(g_dtype, g_size, g, v, r, full, rest)
        store(w_dtype, at, times_plus(step, x, times(keep, load(w_dtype, at, rest))), rest)


@inlined
def _step_at_random(g_dtype, g_size, w, g, v, r, keep, step, count, place, along, key):
    """Update ``count`` bfloat16 entries in a row, rounding at random."""
    for j in range(0, count, LANES):
        some, at = min(LANES, count - j), w + 2 * j
        x = _update(g_dtype, g_size, g, v, r, j, some)
        x = times_plus(step, x, times(keep, load(int16(0), at, some)))
        store(int16(0), at, dither(x, place + j * along, along, key), some)


@compiled
def _step_row(g_dtype, g_size, entry, row, first, count, g, v, r, keep, step):
    """Update ``count`` entries of a row from column ``first`` on, by the parameter's type."""
    w = get_int(entry + t.W) + row * get_int(entry + t.WLD)
    if get_int(entry + t.WDTYPE) == t.F32:
        at = w + 4 * first
        _step_near(float32(0), 4, g_dtype, g_size, at, g, v, r, keep, step, count)
    elif get_int(entry + t.KEYED) != 0:
        # Places from one row in memory to the next, and along it.
        turned = get_int(entry + t.TURNED) != 0
        down, along = (1, get_int(entry + t.P)) if turned else (get_int(entry + t.Q), 1)
        place, key = get_int(entry + t.PLACE) + row * down + first * along, get_int(entry + t.KEY)
        at = w + 2 * first
        _step_at_random(g_dtype, g_size, at, g, v, r, keep, step, count, place, along, key)
    else:
        at = w + 2 * first
        _step_near(int16(0), 2, g_dtype, g_size, at, g, v, r, keep, step, count)


@compiled
def _step_by_scales(g_dtype, g_size, entry, low, high, keep, step):
    """Update the rows from ``low`` to ``high`` by gradients and scales."""
    Q, u, v = get_int(entry + t.Q), get_int(entry + t.U), get_int(entry + t.V)
    for row in range(low, high):
        g = get_int(entry + t.G) + row * get_int(entry + t.LD)
        r = splat(get_float(u + 4 * row))
        _step_row(g_dtype, g_size, entry, row, 0, Q, g, v, r, keep, step)


@compiled
def _step_by_panels(g_dtype, g_size, entry, low, high, keep, step, panel):
    """Update the rows from ``low`` to ``high`` where something of low rank is added."""
    Q, ld, rank = get_int(entry + t.Q), get_int(entry + t.LD), get_int(entry + t.ADDED)
    for row in range(low, high, t.ROWS):
        rows = min(t.ROWS, high - row)
        u, tall = get_int(entry + t.U) + 4 * row, get_int(entry + t.LEFT) + 4 * rank * row
        for first in range(0, Q, t.COLUMNS):
            columns = min(t.COLUMNS, Q - first)
            g = get_int(entry + t.G) + row * ld + first * g_size
            v, wide = get_int(entry + t.V) + 4 * first, get_int(entry + t.RIGHT) + 4 * rank * first
            ahead = t.COLUMNS * g_size if first + t.COLUMNS < Q else t.ROWS * ld - first * g_size
            make_panel(g_dtype, g_size, g, ld, rows, columns, u, v, panel, None, ahead)
            add_low_rank(panel, rows, columns, tall, wide, rank)
            for i in range(rows):
                x = panel + ROW * i
                _step_row(float32(0), 4, entry, row + i, first, columns, x, None, None, keep, step)


@compiled
def _step(entry, low, high, factors, panel):
    """Update the rows from ``low`` to ``high``."""
    keep, step = splat(float32(get_double(factors))), splat(float32(get_double(factors + 8)))
    wide, plain = get_int(entry + t.DTYPE) == t.F32, get_int(entry + t.ADDED) == 0
    if wide and plain:
        _step_by_scales(float32(0), 4, entry, low, high, keep, step)
    elif plain:
        _step_by_scales(int16(0), 2, entry, low, high, keep, step)
    elif wide:
        _step_by_panels(float32(0), 4, entry, low, high, keep, step, panel)
    else:
        _step_by_panels(int16(0), 2, entry, low, high, keep, step, panel)


@inlined
def _rows_of_a_block(entry):
    least = 1 if get_int(entry + t.ADDED) == 0 else t.ROWS
    return max(least, BLOCK // max(1, get_int(entry + t.Q)))


@compiled
def step_rows(entry, low, high, forward, factors, panel):
    """Update the rows from ``low`` to ``high``, block by block in either direction."""
    rows = _rows_of_a_block(entry)
    if forward:
        for begin in range(low, high, rows):
            _step(entry, begin, min(high, begin + rows), factors, panel)
    else:
        for end in range(high, low, -rows):
            _step(entry, max(low, end - rows), end, factors, panel)


@cfunc(void(int64), cache=True, error_model="numpy")
def take_steps(job):
    """Update a table of parameters, as one thread of a team that claims blocks of rows.

    The table is walked from its end: the gradients that `find_scales` read last are in the cache.
    """
    table, count = get_int(job + t.TABLE), get_int(job + t.COUNT)
    panel = get_int(job + t.PANELS) + int64(thread_num()) * t.PANEL
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
                _step(entry, low, min(P, low + rows), get_int(job + t.NUMBERS), panel)
            mine = claim(job + t.NEXT)
        begin += blocks
