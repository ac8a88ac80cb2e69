"""Vectors of float32 in memory: filled, added up, moved."""

from numba import float32, int64

from sinkgd.kernels.cpu.instructions import LANES, compiled, load, plus, splat, store, total


@compiled
def move(panel, sums, Q):
    """Add a panel's column sums to the worker's, and clear them."""
    for j in range(0, Q, LANES):
        count = min(LANES, Q - j)
        x = load(float32(0), panel + 4 * j, count)
        store(float32(0), sums + 4 * j, plus(x, load(float32(0), sums + 4 * j, count)), count)
        store(float32(0), panel + 4 * j, splat(float32(0)), count)


@compiled
def sum_of(address, count):
    """The sum of ``count`` numbers."""
    full = count - count % LANES
    a = splat(float32(0))
    for j in range(0, full, LANES):
        a = plus(a, load(float32(0), address + 4 * j, None))
    if full < count:
        a = plus(a, load(float32(0), address + 4 * full, count - full))
    return total(a)


@compiled
def fill(address, count, value):
    """Write ``count`` times one number."""
    x = splat(value)
    full = count - count % LANES
    for j in range(0, full, LANES):
        store(float32(0), address + 4 * j, x, None)
    if full < count:
        store(float32(0), address + 4 * full, x, int64(count - full))
