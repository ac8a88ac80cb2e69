"""From sums to scales, and what a worker finds out on the way: zeros, moves, numbers out of range.

Letters: see `sinkgd.kernels.cpu.tables`. u = Q / (S v) and v = P / (Sᵀ u), with S = G∘G.
"""

from numba import float32

from sinkgd.kernels.cpu.instructions import (
    any_below,
    compiled,
    get_float,
    get_int,
    inlined,
    load,
    put_float,
    put_int,
    quotient,
    splat,
    store,
    times,
    total,
)

# A sum may have lost n terms of up to 2^-126 (the smallest normal number, where torch flushes
# denormals), each times its weight. Above this multiple of the weights that is below 2^-26 of it.
FLOOR = 2.0**-100
SMALLEST = float32(2.0**-126)

# What a worker finds out, at these bytes of its scratch; its column sums and their panel follow.
(ZERO_ROWS, ROWS_MOVED, ROWS_FAILED, ZERO_COLUMNS, COLUMNS_MOVED, COLUMNS_FAILED) = range(0, 48, 8)
_MOVED, _FAILED = ROWS_MOVED - ZERO_ROWS, ROWS_FAILED - ZERO_ROWS  # of columns, too
_EIGHT = 64
SUMS = 128


@inlined
def invert(sums, address, count, length, floor, tested, low, high):
    """Write ``length / sums``; say whether all is well, and whether a scale moved.

    Not well is a sum below ``floor`` or a scale below the normal numbers; nothing is written then.
    """
    scales = quotient(splat(length), sums)
    if any_below(sums, splat(floor), count) or any_below(scales, splat(SMALLEST), count):
        return False, True
    moved = True
    if tested:
        last = load(float32(0), address, count)
        moved = any_below(scales, times(splat(low), last), count)
        moved = moved or any_below(times(splat(high), last), scales, count)
    store(float32(0), address, scales, count)
    return True, moved


@compiled
def settle(found, address, value, length, floor, tested, low, high, empty):
    """Do what `invert` does for one sum; a sum of zero is well where the row is known ``empty``.

    ``found``: where zeros are counted; whether one moved, and whether one failed, stand behind it.
    """
    if value == 0 and empty:
        put_float(address, float32(0))
        put_int(found, get_int(found) + 1)
        return
    last, scale = get_float(address), length / value
    put_float(address, scale)
    if not (tested and low * last <= scale <= high * last):
        put_int(found + _MOVED, 1)
    if not (value >= floor and scale >= SMALLEST):  # a NaN is not
        put_int(found + _FAILED, 1)


@compiled
def is_empty(dtype, size, g, step, count):
    """Whether ``count`` numbers, ``step`` bytes apart, are all zero."""
    for i in range(count):
        x = total(load(dtype, g + i * step, 1))
        if x != 0:  # a NaN is not zero
            return False
    return True


@compiled
def settle_rows(dtype, size, g, ld, Q, u, sums, count, mine, length, floor, known, tested, lo, hi):
    """Set ``u`` of up to 8 rows, one by one: there is a zero row, or a number out of range.

    ``known``: ``u`` holds the scales of the last iteration, so that a zero there tells of a row
    that is empty.
    """
    store(float32(0), mine + _EIGHT, sums, None)
    for row in range(count):
        value, at = get_float(mine + _EIGHT + 4 * row), u + 4 * row
        empty = value == 0 and (
            get_float(at) == 0 if known else is_empty(dtype, size, g + row * ld, size, Q)
        )
        settle(mine + ZERO_ROWS, at, value, length, floor, tested, lo, hi, empty)
