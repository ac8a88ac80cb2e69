"""The arithmetic of deflation: entries of an update X, each times sixteen numbers at once.

X = u∘G∘v is made panel by panel, sixteen rows by 128 columns of float32, in scratch that stays in
the first cache, wherever the rows of G lie. A panel is then multiplied by one loop, whether along
its rows, down its columns, or where something of low rank is added to it: eight sums of sixteen
numbers each are in registers, and each number that is read joins all eight of them.

Letters: see `sinkgd.kernels.cpu.tables`.
"""

from numba import float32

from sinkgd.kernels.cpu.instructions import (
    LANES,
    compiled,
    get_float,
    inlined,
    load,
    plus,
    prefetch,
    splat,
    store,
    times,
    times_plus,
)
from sinkgd.kernels.cpu.tables import COLUMNS

ROW = 4 * COLUMNS  # bytes from one row of a panel to the next
EIGHT = 8  # sums at a time
WIDTH = 4 * LANES  # bytes of one sum


# `make_panel` and the three `add_...` are not inlined: in a loop over panels, LLVM 22 turned the
# innermost loop of `add_low_rank` into an endless one.
@compiled
def make_panel(dtype, size, g, ld, rows, columns, u, v, panel, squares, ahead):
    """Write up to 16 rows and 128 columns of X; zeros follow up to a whole vector.

    Args:
        dtype: Of G, as `load` has it.
        size: Its bytes.
        g: The first entry of G.
        ld: Bytes from one row of G to the next.
        rows: How many.
        columns: How many.
        u: The scales of the rows.
        v: The scales of the columns.
        panel: Where X goes.
        squares: Sixteen numbers a row, to which the squares of its entries are added; or None.
        ahead: Bytes from the first entry to what is fetched meanwhile.
    """
    full = columns - columns % LANES
    for i in range(rows):
        at, to, r = g + i * ld, panel + ROW * i, splat(get_float(u + 4 * i))
        total = splat(float32(0))
        for j in range(0, full, LANES):
            prefetch(at + ahead + j * size)
            x = times(times(load(dtype, at + j * size, None), r), load(float32(0), v + 4 * j, None))
            store(float32(0), to + 4 * j, x, None)
            if squares is not None:
                total = times_plus(x, x, total)
        if full < columns:
            count = columns - full
            c = load(float32(0), v + 4 * full, count)
            x = times(times(load(dtype, at + full * size, count), r), c)
            store(float32(0), to + 4 * full, x, None)
            if squares is not None:
                total = times_plus(x, x, total)
        if squares is not None:
            _join(squares + WIDTH * i, total)


@inlined
def _join(result, a):
    store(float32(0), result, plus(load(float32(0), result, None), a), None)


@inlined
def _add_eight(numbers, between, along, vectors, apart, count, result, to):
    """Add to eight results the sums of ``count`` vectors, each times a number.

    Args:
        numbers: The first number of the first result.
        between: Bytes to the first number of the next result.
        along: Bytes to the next number of the same result.
        vectors: The first vector.
        apart: Bytes from one vector to the next.
        count: How many.
        result: The first result.
        to: Bytes from one result to the next.
    """
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = splat(float32(0))
    for k in range(count):
        at, x = numbers + k * along, load(float32(0), vectors + k * apart, None)
        a0 = times_plus(splat(get_float(at)), x, a0)
        a1 = times_plus(splat(get_float(at + between)), x, a1)
        a2 = times_plus(splat(get_float(at + 2 * between)), x, a2)
        a3 = times_plus(splat(get_float(at + 3 * between)), x, a3)
        a4 = times_plus(splat(get_float(at + 4 * between)), x, a4)
        a5 = times_plus(splat(get_float(at + 5 * between)), x, a5)
        a6 = times_plus(splat(get_float(at + 6 * between)), x, a6)
        a7 = times_plus(splat(get_float(at + 7 * between)), x, a7)
    _join(result, a0)
    _join(result + to, a1)
    _join(result + 2 * to, a2)
    _join(result + 3 * to, a3)
    _join(result + 4 * to, a4)
    _join(result + 5 * to, a5)
    _join(result + 6 * to, a6)
    _join(result + 7 * to, a7)


@inlined
def _add_products(numbers, between, along, vectors, apart, count, result, to, results):
    """Do what `_add_eight` does for any number of ``results``."""
    full = results - results % EIGHT
    for i in range(0, full, EIGHT):
        _add_eight(
            numbers + i * between, between, along, vectors, apart, count, result + i * to, to
        )
    for i in range(full, results):
        a, at = splat(float32(0)), numbers + i * between
        for k in range(count):
            x = load(float32(0), vectors + k * apart, None)
            a = times_plus(splat(get_float(at + k * along)), x, a)
        _join(result + i * to, a)


@compiled
def add_along(panel, rows, columns, wide, apart, tall, to):
    """Add to ``tall``, sixteen numbers a row, a panel times ``wide``, sixteen numbers a column."""
    _add_products(panel, ROW, 4, wide, apart, columns, tall, to, rows)


@compiled
def add_down(panel, rows, columns, tall, apart, sums, to):
    """Add to ``sums``, sixteen numbers a column, the panel's transpose times ``tall``."""
    _add_products(panel, 4, ROW, tall, apart, rows, sums, to, columns)


@compiled
def add_low_rank(panel, rows, columns, tall, wide, rank):
    """Add to a panel ``tall``, ``rank`` numbers a row, times ``wide``.

    ``wide`` has ``rank`` vectors for every sixteen columns, those of the first sixteen first.
    """
    for j in range(0, columns, LANES):
        vectors = wide + 4 * rank * j
        _add_products(tall, 4 * rank, 4, vectors, WIDTH, rank, panel + 4 * j, ROW, rows)
