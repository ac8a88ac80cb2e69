"""The job ``update``: update a table of parameters from gradients and scales, in one pass.

A parameter W becomes ``keep * W + step * (U∘G∘V + LEFT @ RIGHT)``, rounded once. Letters: see
`sinkgd.kernels.cpu.tables`.

A function with an argument ``away`` is compiled twice: once for None, and once for the factor that
replaces ``keep`` in entries that do not move toward zero.
"""

from numba import cfunc, float32, int16, int64, void

from sinkgd.kernels.cpu import tables as t
from sinkgd.kernels.cpu.layout import F32
from sinkgd.kernels.cpu.simd import (
    LANES,
    compiled,
    fetch_add,
    inlined,
    load,
    load_byte,
    load_double,
    load_float,
    load_int,
    mul,
    muladd,
    prefetch,
    round_stochastically,
    select_toward_zero,
    splat,
    store,
    thread_num,
)
from sinkgd.kernels.cpu.skinny_matmul import TILE_STRIDE, add_low_rank, make_tile
from sinkgd.kernels.cpu.tables import TILE_BYTES, TILE_COLUMNS, TILE_ROWS

BLOCK = 32768  # entries that are updated at a time
# Bytes from an entry that is read to the entry that is prefetched. Hardware prefetchers stop at
# each page of 4096 bytes.
AHEAD = 8192

_ROW = 8 * t.GRADIENT_FIELDS


@inlined
def _load_update(g_dtype, g_size, g, v, r, j, count):
    """Return sixteen entries of the update from column ``j`` on.

    Without ``v``, the address ``g`` is that of the update itself.
    """
    x = load(g_dtype, g + j * g_size, count)
    if v is None:
        return x
    return mul(mul(x, r), load(float32(0), v + 4 * j, count))


@inlined
def _updated(w, x, keep, step, away):
    """Return sixteen updated entries."""
    if away is not None:
        keep = select_toward_zero(w, mul(step, x), keep, away)
    return muladd(step, x, mul(keep, w))


@inlined
def _write_nearest(w_dtype, w_size, g_dtype, g_size, w, g, v, r, keep, step, away, count):
    """Update ``count`` adjacent entries, rounding to nearest."""
    full = count - count % LANES
    for j in range(0, full, LANES):
        prefetch(w + j * w_size + AHEAD)
        prefetch(g + j * g_size + AHEAD)
        x = _load_update(g_dtype, g_size, g, v, r, j, None)
        at = w + j * w_size
        store(w_dtype, at, _updated(load(w_dtype, at, None), x, keep, step, away), None)
    if full < count:
        rest, at = count - full, w + full * w_size
        x = _load_update(g_dtype, g_size, g, v, r, full, rest)
        store(w_dtype, at, _updated(load(w_dtype, at, rest), x, keep, step, away), rest)


@inlined
def _write_stochastically(g_dtype, g_size, w, g, v, r, keep, step, away, count, index, along, key):
    """Update ``count`` adjacent bfloat16 entries, rounding stochastically."""
    for j in range(0, count, LANES):
        some, at = min(LANES, count - j), w + 2 * j
        x = _load_update(g_dtype, g_size, g, v, r, j, some)
        x = _updated(load(int16(0), at, some), x, keep, step, away)
        store(int16(0), at, round_stochastically(x, index + j * along, along, key), some)


@inlined
def _write_typed(g_dtype, g_size, entry, row, first, count, g, v, r, keep, step, away):
    """Update ``count`` entries of a row from column ``first`` on, for the parameter's type."""
    w = load_int(entry + t.W) + row * load_int(entry + t.WLD)
    if load_int(entry + t.WDTYPE) == F32:
        at = w + 4 * first
        _write_nearest(float32(0), 4, g_dtype, g_size, at, g, v, r, keep, step, away, count)
    elif load_int(entry + t.KEYED) != 0:
        # The index of an entry in the parameter grows by `down` from one row in memory to the next,
        # and by `along` from one entry of a row to the next.
        transposed = load_int(entry + t.TRANSPOSED) != 0
        down, along = (1, load_int(entry + t.P)) if transposed else (load_int(entry + t.Q), 1)
        index, key = load_int(entry + t.INDEX) + row * down + first * along, load_int(entry + t.KEY)
        at = w + 2 * first
        _write_stochastically(
            g_dtype, g_size, at, g, v, r, keep, step, away, count, index, along, key
        )
    else:
        at = w + 2 * first
        _write_nearest(int16(0), 2, g_dtype, g_size, at, g, v, r, keep, step, away, count)


@compiled
def _write_row(g_dtype, g_size, entry, row, first, count, g, v, r, keep, step):
    """Update ``count`` entries of a row from column ``first`` on."""
    if load_int(entry + t.CAUTIOUS) != 0:
        one = splat(float32(1))
        _write_typed(g_dtype, g_size, entry, row, first, count, g, v, r, keep, step, one)
    else:
        _write_typed(g_dtype, g_size, entry, row, first, count, g, v, r, keep, step, None)


@compiled
def _update_by_scales(g_dtype, g_size, entry, low, high, keep, step):
    """Update the rows from ``low`` to ``high`` by gradient and scales."""
    Q, u, v = load_int(entry + t.Q), load_int(entry + t.U), load_int(entry + t.V)
    for row in range(low, high):
        g = load_int(entry + t.G) + row * load_int(entry + t.LD)
        r = splat(load_float(u + 4 * row))
        _write_row(g_dtype, g_size, entry, row, 0, Q, g, v, r, keep, step)


@compiled
def _update_by_tiles(g_dtype, g_size, entry, low, high, keep, step, tile):
    """Update the rows from ``low`` to ``high``, with a matrix of low rank added to the update."""
    Q, ld, rank = load_int(entry + t.Q), load_int(entry + t.LD), load_int(entry + t.RANK)
    for row in range(low, high, TILE_ROWS):
        rows = min(TILE_ROWS, high - row)
        u, left = load_int(entry + t.U) + 4 * row, load_int(entry + t.LEFT) + 4 * rank * row
        for first in range(0, Q, TILE_COLUMNS):
            columns = min(TILE_COLUMNS, Q - first)
            g = load_int(entry + t.G) + row * ld + first * g_size
            v = load_int(entry + t.V) + 4 * first
            right = load_int(entry + t.RIGHT) + 4 * rank * first
            at_end = first + TILE_COLUMNS >= Q
            ahead = TILE_ROWS * ld - first * g_size if at_end else TILE_COLUMNS * g_size
            make_tile(g_dtype, g_size, g, ld, rows, columns, u, v, tile, None, ahead)
            add_low_rank(tile, rows, columns, left, right, rank)
            for i in range(rows):
                x = tile + TILE_STRIDE * i
                _write_row(float32(0), 4, entry, row + i, first, columns, x, None, None, keep, step)


@compiled
def _update_block(entry, low, high, factors, tile):
    """Update the rows from ``low`` to ``high``."""
    keep, step = splat(float32(load_double(factors))), splat(float32(load_double(factors + 8)))
    wide, plain = load_int(entry + t.DTYPE) == F32, load_int(entry + t.RANK) == 0
    if wide and plain:
        _update_by_scales(float32(0), 4, entry, low, high, keep, step)
    elif plain:
        _update_by_scales(int16(0), 2, entry, low, high, keep, step)
    elif wide:
        _update_by_tiles(float32(0), 4, entry, low, high, keep, step, tile)
    else:
        _update_by_tiles(int16(0), 2, entry, low, high, keep, step, tile)


@inlined
def _rows_of_block(entry):
    least = 1 if load_int(entry + t.RANK) == 0 else TILE_ROWS
    return max(least, BLOCK // max(1, load_int(entry + t.Q)))


@compiled
def update_rows(entry, low, high, forward, factors, tile):
    """Update the rows from ``low`` to ``high``, block by block, forward or backward."""
    rows = _rows_of_block(entry)
    if forward:
        for begin in range(low, high, rows):
            _update_block(entry, begin, min(high, begin + rows), factors, tile)
    else:
        for end in range(high, low, -rows):
            _update_block(entry, max(low, end - rows), end, factors, tile)


@cfunc(void(int64), cache=True, error_model="numpy")
def update(job):
    """Update a table of parameters, as one thread of a team.

    A thread claims blocks of rows, the last parameters of the table first, because the gradients
    that `find_scales` read last are still in the cache.
    """
    table, count = load_int(job + t.TABLE), load_int(job + t.COUNT)
    tile = load_int(job + t.TILES) + int64(thread_num()) * TILE_BYTES
    begin = 0
    mine = fetch_add(job + t.NEXT)
    for i in range(count - 1, -1, -1):
        entry = table + i * _ROW
        P, rows = load_int(entry + t.P), _rows_of_block(entry)
        blocks = (P + rows - 1) // rows
        allowed = load_int(entry + t.ALLOWED)
        skip = allowed != 0 and load_byte(allowed) == 0
        while mine < begin + blocks:
            low = (mine - begin) * rows
            if not skip:
                _update_block(entry, low, min(P, low + rows), load_int(job + t.FLOATS), tile)
            mine = fetch_add(job + t.NEXT)
        begin += blocks
