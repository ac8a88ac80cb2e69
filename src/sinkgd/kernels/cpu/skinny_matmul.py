"""Multiply updates by a few vectors: the job ``multiply``, and tiles for low-rank updates.

An update X = U∘G∘V is computed tile by tile, 16 rows by 128 columns of float32, in scratch that
stays in the L1 cache. One loop multiplies a tile or its transpose by vectors, or adds a matrix of
low rank to a tile. The loop keeps eight sums of sixteen numbers in registers, and each vector of
sixteen numbers that it reads goes into all eight sums.

The job reads G from memory once, whether it computes X V, or Xᵀ Y, or both in sequence: X V and
Xᵀ X V. Vectors come in blocks of sixteen. Letters: see `sinkgd.kernels.cpu.tables`.
"""

from numba import cfunc, float32, int16, int64, void

from sinkgd.kernels.cpu import tables as t
from sinkgd.kernels.cpu.layout import BF16
from sinkgd.kernels.cpu.simd import (
    LANES,
    add,
    barrier,
    compiled,
    fetch_add,
    fill,
    inlined,
    load,
    load_float,
    load_int,
    mul,
    muladd,
    num_threads,
    prefetch,
    share_begin,
    splat,
    store,
    store_float,
    sum_lanes,
    thread_num,
)
from sinkgd.kernels.cpu.tables import TILE_BYTES, TILE_COLUMNS, TILE_ROWS

TILE_STRIDE = 4 * TILE_COLUMNS  # bytes from one row of a tile to the next
VECTOR_BYTES = 4 * LANES
SUMS = 8  # sums that are computed at a time

_ROW = 8 * t.PRODUCTS_FIELDS


# `make_tile` and the functions that multiply a tile are not inlined: when they were inlined in a
# loop over tiles, LLVM 22 made the innermost loop of `add_low_rank` endless.
@compiled
def make_tile(dtype, size, g, ld, rows, columns, u, v, tile, squares, ahead):
    """Write a tile of X, padded with zeros to whole vectors.

    Args:
        dtype: Dummy number that says the type of G, as for `load`.
        size: Bytes of an entry of G.
        g: Address of the first entry of G.
        ld: Bytes from one row of G to the next.
        rows: Number of rows, up to 16.
        columns: Number of columns, up to 128.
        u: Scales of the rows.
        v: Scales of the columns.
        tile: Address of the tile.
        squares: Sixteen sums per row, to which the squares of its entries are added; or None.
        ahead: Bytes from the first entry to the first entry that is prefetched.
    """
    full = columns - columns % LANES
    for i in range(rows):
        at, to, r = g + i * ld, tile + TILE_STRIDE * i, splat(load_float(u + 4 * i))
        total = splat(float32(0))
        for j in range(0, full, LANES):
            prefetch(at + ahead + j * size)
            x = mul(mul(load(dtype, at + j * size, None), r), load(float32(0), v + 4 * j, None))
            store(float32(0), to + 4 * j, x, None)
            if squares is not None:
                total = muladd(x, x, total)
        if full < columns:
            count = columns - full
            c = load(float32(0), v + 4 * full, count)
            x = mul(mul(load(dtype, at + full * size, count), r), c)
            store(float32(0), to + 4 * full, x, None)
            if squares is not None:
                total = muladd(x, x, total)
        if squares is not None:
            _accumulate(squares + VECTOR_BYTES * i, total)


@inlined
def _accumulate(result, a):
    """Add a vector to the one at ``result``."""
    store(float32(0), result, add(load(float32(0), result, None), a), None)


@inlined
def _matmul_eight(weights, next_result, next_weight, vectors, stride, count, result, result_stride):
    """Add to each of eight result vectors a weighted sum of ``count`` vectors.

    Args:
        weights: Address of the first weight for the first result.
        next_result: Bytes to the first weight for the next result.
        next_weight: Bytes to the next weight for the same result.
        vectors: Address of the first vector.
        stride: Bytes from one vector to the next.
        count: Number of vectors.
        result: Address of the first result.
        result_stride: Bytes from one result to the next.
    """
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = splat(float32(0))
    for k in range(count):
        at, x = weights + k * next_weight, load(float32(0), vectors + k * stride, None)
        a0 = muladd(splat(load_float(at)), x, a0)
        a1 = muladd(splat(load_float(at + next_result)), x, a1)
        a2 = muladd(splat(load_float(at + 2 * next_result)), x, a2)
        a3 = muladd(splat(load_float(at + 3 * next_result)), x, a3)
        a4 = muladd(splat(load_float(at + 4 * next_result)), x, a4)
        a5 = muladd(splat(load_float(at + 5 * next_result)), x, a5)
        a6 = muladd(splat(load_float(at + 6 * next_result)), x, a6)
        a7 = muladd(splat(load_float(at + 7 * next_result)), x, a7)
    _accumulate(result, a0)
    _accumulate(result + result_stride, a1)
    _accumulate(result + 2 * result_stride, a2)
    _accumulate(result + 3 * result_stride, a3)
    _accumulate(result + 4 * result_stride, a4)
    _accumulate(result + 5 * result_stride, a5)
    _accumulate(result + 6 * result_stride, a6)
    _accumulate(result + 7 * result_stride, a7)


@inlined
def _matmul(
    weights, next_result, next_weight, vectors, stride, count, result, result_stride, results
):
    """Do what `_matmul_eight` does, for any number of ``results``."""
    full = results - results % SUMS
    for i in range(0, full, SUMS):
        at, to = weights + i * next_result, result + i * result_stride
        _matmul_eight(at, next_result, next_weight, vectors, stride, count, to, result_stride)
    for i in range(full, results):
        a, at = splat(float32(0)), weights + i * next_result
        for k in range(count):
            x = load(float32(0), vectors + k * stride, None)
            a = muladd(splat(load_float(at + k * next_weight)), x, a)
        _accumulate(result + i * result_stride, a)


@compiled
def _matmul_rows(tile, rows, columns, right, stride, product):
    """Add a tile times ``right`` to ``product``.

    ``right`` has sixteen numbers per column of the tile, ``product`` sixteen per row.
    """
    _matmul(tile, TILE_STRIDE, 4, right, stride, columns, product, stride, rows)


@compiled
def _matmul_columns(tile, rows, columns, left, stride, product):
    """Add the tile's transpose times ``left`` to ``product``."""
    _matmul(tile, 4, TILE_STRIDE, left, stride, rows, product, stride, columns)


@compiled
def add_low_rank(tile, rows, columns, left, right, rank):
    """Add ``left @ right`` to a tile: ``left`` is (P, rank), ``right`` (Q/16, rank, 16)."""
    for j in range(0, columns, LANES):
        vectors = right + 4 * rank * j
        _matmul(left, 4 * rank, 4, vectors, VECTOR_BYTES, rank, tile + 4 * j, TILE_STRIDE, rows)


@compiled
def _multiply_rows(dtype, size, entry, low, high, sums, tile):
    """Multiply the rows from ``low`` to ``high``, and add products by columns to ``sums``."""
    ld, Q, blocks = load_int(entry + t.MLD), load_int(entry + t.MQ), load_int(entry + t.BLOCKS)
    v, right = load_int(entry + t.MV), load_int(entry + t.COL_VECTORS)
    squares = load_int(entry + t.SQUARES)
    stride, lanes = VECTOR_BYTES * blocks, tile + TILE_ROWS * TILE_STRIDE
    for row in range(low, high, TILE_ROWS):
        rows = min(TILE_ROWS, high - row)
        g, u = load_int(entry + t.MG) + row * ld, load_int(entry + t.MU) + 4 * row
        left = load_int(entry + t.ROW_VECTORS) + row * stride
        if right != 0:
            fill(left, rows * blocks * LANES, float32(0))
            fill(lanes, rows * LANES, float32(0))
            for j in range(0, Q, TILE_COLUMNS):
                columns = min(TILE_COLUMNS, Q - j)
                ahead = TILE_COLUMNS * size if j + TILE_COLUMNS < Q else TILE_ROWS * ld - j * size
                make_tile(
                    dtype, size, g + j * size, ld, rows, columns, u, v + 4 * j, tile, lanes, ahead
                )
                for block in range(blocks):
                    at = VECTOR_BYTES * block
                    _matmul_rows(tile, rows, columns, right + j * stride + at, stride, left + at)
            for i in range(rows):
                found = sum_lanes(load(float32(0), lanes + VECTOR_BYTES * i, None))
                store_float(squares + 4 * (row + i), found)
        if sums != 0:
            for j in range(0, Q, TILE_COLUMNS):
                columns = min(TILE_COLUMNS, Q - j)
                ahead = TILE_COLUMNS * size if j + TILE_COLUMNS < Q else TILE_ROWS * ld - j * size
                make_tile(
                    dtype, size, g + j * size, ld, rows, columns, u, v + 4 * j, tile, None, ahead
                )
                for block in range(blocks):
                    at = VECTOR_BYTES * block
                    _matmul_columns(tile, rows, columns, left + at, stride, sums + j * stride + at)


@compiled
def _multiply(entry, low, high, sums, tile):
    """Run `_multiply_rows` for the gradient's type."""
    if load_int(entry + t.MDTYPE) == BF16:
        _multiply_rows(int16(0), 2, entry, low, high, sums, tile)
    else:
        _multiply_rows(float32(0), 4, entry, low, high, sums, tile)


@compiled
def _reduce(sums, stride, workers, result, low, high):
    """Add the workers' sums from ``low`` to ``high``, in order."""
    for j in range(low, high, LANES):
        count = min(LANES, high - j)
        x = load(float32(0), sums + 4 * j, count)
        for worker in range(1, workers):
            x = add(x, load(float32(0), sums + worker * stride + 4 * j, count))
        store(float32(0), result + 4 * j, x, count)


@compiled
def _multiply_shared(job, entry, first, team, scratch, tile):
    """Multiply as worker ``first``, ``first + team``, …, each with its own sums in the scratch.

    Returns whether the scratch was used. If so, other threads may still read it.
    """
    P, workers, stride = load_int(entry + t.MP), load_int(job + t.WORKERS), load_int(job + t.STRIDE)
    result = load_int(entry + t.COL_PRODUCTS)
    count = t.VECTORS * load_int(entry + t.BLOCKS) * load_int(entry + t.MQ)
    for worker in range(first, workers, team):
        sums = scratch + worker * stride if result != 0 else 0
        if result != 0:
            fill(sums, count, float32(0))
        low = share_begin(P, worker, workers, TILE_ROWS)
        high = share_begin(P, worker + 1, workers, TILE_ROWS)
        _multiply(entry, low, high, sums, tile)
    if result == 0:
        return False
    barrier(job, team)
    for worker in range(first, workers, team):
        low = share_begin(count, worker, workers, LANES)
        high = share_begin(count, worker + 1, workers, LANES)
        _reduce(scratch, stride, workers, result, low, high)
    return True


@cfunc(void(int64), cache=True, error_model="numpy")
def multiply(job):
    """Multiply a table of updates, as one thread of a team.

    As in `sinkgd.kernels.cpu.solve.find_scales`, threads share large matrices and claim small ones.
    Two buffers of sums alternate, so that no thread waits for others that still read the previous
    buffer.
    """
    table, count = load_int(job + t.TABLE), load_int(job + t.COUNT)
    first, team = int64(thread_num()), int64(num_threads())
    tile = load_int(job + t.TILES) + first * TILE_BYTES
    half = 0
    for i in range(count):
        entry = table + i * _ROW
        if load_int(entry + t.MP) * load_int(entry + t.MQ) > load_int(job + t.SHARED_ABOVE):
            scratch = load_int(job + t.SCRATCH) + half * load_int(job + t.STRIDE) // 2
            if _multiply_shared(job, entry, first, team, scratch, tile):
                half = 1 - half
    i = fetch_add(job + t.NEXT)
    while i < count:
        entry = table + i * _ROW
        P, Q = load_int(entry + t.MP), load_int(entry + t.MQ)
        if load_int(job + t.SHARED_ABOVE) >= P * Q:
            result = load_int(entry + t.COL_PRODUCTS)
            if result != 0:
                fill(result, t.VECTORS * load_int(entry + t.BLOCKS) * Q, float32(0))
            _multiply(entry, 0, P, result, tile)
        i = fetch_add(job + t.NEXT)
