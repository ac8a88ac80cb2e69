"""The compiled loops: one pass over a gradient an iteration, one over a parameter for the update.

The vectors of this file are explicit (16 floats, whatever the machine's width), so the order of
every sum is written here and not chosen by the optimizer: float32 and bfloat16 gradients that hold
the same numbers give the same bits, and NaN and infinity stay what they are.

One file, because numba's cache is renewed by the time stamp of the file that holds the cached
function, not by those of the functions it calls.

Letters, everywhere in this file. A matrix is seen as it lies in memory:
    P, Q: its rows in memory and their length; the last stride is 1
    ld: bytes from one row to the next
    u, v: squared scales of rows and columns in memory, float32; u = Q / (S v), v = P / (Sᵀ u)
A transposed gradient differs in one thing: its columns are rows in memory, so v comes first.
Addresses are plain integers, and so is everything that a thread is told.
"""

import math
from typing import Any

from llvmlite import ir
from llvmlite.binding import add_symbol
from numba import cfunc, float32, float64, int16, int64, njit, types, void
from numba.extending import intrinsic, models, register_model

from sinkgd.kernels.cpu.team import torch_team

LANES = 16
ROWS = 8  # rows whose second read still hits the cache, and accumulators enough to hide latency
PANEL = 64  # blocks of rows added up before they join the column sums: a long sum loses precision
F32 = 0
BF16 = 1

# A sum may have lost n terms of up to 2^-126 (the smallest normal number, where torch flushes
# denormals), each times its weight. Above this multiple of the weights that is below 2^-26 of it.
FLOOR = 2.0**-100
SMALLEST_NORMAL = 2.0**-126

# Tables of int64: a gradient, then an update, at these bytes from the start of their entry.
(_G, _P, _Q, _LD, _DTYPE, _TURNED, _U, _V, _GIVEN, _FAILED) = range(0, 80, 8)
(_W, _WG, _WP, _WQ, _WLD, _GLD, _WDTYPE, _GDTYPE, _WU, _WV, _ALLOWED) = range(0, 88, 8)
GRADIENT_BYTES = 80
UPDATE_BYTES = 88
# The header of a job: table, entries, workers, next entry to claim, then what differs.
(_TABLE, _COUNT, _WORKERS, _NEXT, _ITERS, _SCRATCH, _STRIDE, _WHOLE) = range(0, 64, 8)
_FACTORS = 32

_I64, _I32, _I16, _I8 = (ir.IntType(bits) for bits in (64, 32, 16, 8))
_F32 = ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)

# Before the loops that call them are linked: a name that is not known then ends the process.
_team = torch_team()
if _team is None:
    raise ImportError("torch's OpenMP runtime has no GOMP_parallel")
for _name, _address in _team.symbols.items():
    add_symbol(_name, _address)

thread_num = types.ExternalFunction("sinkgd_thread_num", types.int32())
num_threads = types.ExternalFunction("sinkgd_num_threads", types.int32())
barrier = types.ExternalFunction("sinkgd_barrier", void())


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Vector16f32")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _VECTOR)


# Instructions -------------------------------------------------------------------------------------


def _bits(value: int, like: ir.VectorType) -> ir.Constant:
    return ir.Constant(like, [value] * LANES)


def _mask(builder: Any, count: Any) -> Any:
    indices = ir.Constant(ir.VectorType(_I64, LANES), list(range(LANES)))
    return builder.icmp_signed("<", indices, _spread(builder, count, ir.VectorType(_I64, LANES)))


def _spread(builder: Any, value: Any, like: ir.VectorType) -> Any:
    undefined = ir.Constant(like, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, _bits(0, ir.VectorType(_I32, LANES)))


def _masked(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    function_type = ir.FunctionType(result, [a.type for a in arguments])
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, function_type, name)
    return builder.call(function, arguments)


@intrinsic
def load(typing: Any, dtype: Any, address: Any, count: Any) -> Any:
    """Read 16 numbers as float32; ``count`` of them, then zeros, where it is not None.

    ``dtype`` is a float32 for float32 and an int16 for bfloat16.
    """
    narrow = dtype == int16
    element, name, align = (_I16, "v16i16", 2) if narrow else (_F32, "v16f32", 4)
    memory = ir.VectorType(element, LANES)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[1], memory.as_pointer())
        if count == types.none:
            x = builder.load(pointer, align=align)
        else:
            zeros = ir.Constant(memory, None)
            arguments = [pointer, ir.Constant(_I32, align), _mask(builder, args[2]), zeros]
            x = _masked(builder, f"llvm.masked.load.{name}.p0", memory, arguments)
        if not narrow:
            return x
        wide = ir.VectorType(_I32, LANES)
        return builder.bitcast(builder.shl(builder.zext(x, wide), _bits(16, wide)), _VECTOR)

    return vector(dtype, address, count), generate


@intrinsic
def store(typing: Any, dtype: Any, address: Any, x: Any, count: Any) -> Any:
    """Write 16 numbers, or ``count`` of them; bfloat16 rounds to the nearest, ties to even."""
    narrow = dtype == int16
    element, name, align = (_I16, "v16i16", 2) if narrow else (_F32, "v16f32", 4)
    memory = ir.VectorType(element, LANES)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _to_bfloat16(builder, args[2]) if narrow else args[2]
        pointer = builder.inttoptr(args[1], memory.as_pointer())
        if count == types.none:
            builder.store(value, pointer, align=align)
        else:
            arguments = [value, pointer, ir.Constant(_I32, align), _mask(builder, args[3])]
            _masked(builder, f"llvm.masked.store.{name}.p0", ir.VoidType(), arguments)
        return context.get_dummy_value()

    return void(dtype, address, x, count), generate


def _to_bfloat16(builder: Any, x: Any) -> Any:
    wide = ir.VectorType(_I32, LANES)
    bits = builder.bitcast(x, wide)
    odd = builder.and_(builder.lshr(bits, _bits(16, wide)), _bits(1, wide))
    rounded = builder.add(builder.add(bits, _bits(0x7FFF, wide)), odd)
    is_nan = builder.fcmp_unordered("uno", x, x)
    rounded = builder.select(is_nan, _bits(0x7FC00000, wide), rounded)
    return builder.trunc(builder.lshr(rounded, _bits(16, wide)), ir.VectorType(_I16, LANES))


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """Sixteen times one float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _spread(builder, args[0], _VECTOR)

    return vector(float32), generate


@intrinsic
def times(typing: Any, x: Any, y: Any) -> Any:
    """The product of two vectors."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(*args)

    return vector(vector, vector), generate


@intrinsic
def plus(typing: Any, x: Any, y: Any) -> Any:
    """The sum of two vectors."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(*args)

    return vector(vector, vector), generate


@intrinsic
def times_plus(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """``x * y + z``, rounded once where the machine can."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arguments = list(args)
        return _masked(builder, "llvm.fmuladd.v16f32", _VECTOR, arguments)

    return vector(vector, vector, vector), generate


@intrinsic
def total(typing: Any, x: Any) -> Any:
    """The sum of a vector's sixteen numbers, by halves."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x = args[0]
        width = LANES
        while width > 1:
            width //= 2
            mask = [(i + width) % LANES for i in range(LANES)]
            other = ir.Constant(ir.VectorType(_I32, LANES), mask)
            x = builder.fadd(x, builder.shuffle_vector(x, x, other))
        return builder.extract_element(x, ir.Constant(_I32, 0))

    return float32(vector), generate


@intrinsic
def totals(
    typing: Any, a0: Any, a1: Any, a2: Any, a3: Any, a4: Any, a5: Any, a6: Any, a7: Any
) -> Any:
    """The sums of eight vectors, each by halves as in `total`, in the first eight numbers."""

    def fold(builder: Any, x: Any, y: Any, width: int) -> Any:
        low = [i for i in range(2 * LANES) if i % (2 * width) < width]
        low, high = (
            ir.Constant(ir.VectorType(_I32, LANES), at) for at in (low, [i + width for i in low])
        )
        return builder.fadd(builder.shuffle_vector(x, y, low), builder.shuffle_vector(x, y, high))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, width = list(args), LANES // 2
        while len(rows) > 1:
            pairs = zip(rows[::2], rows[1::2], strict=True)
            rows, width = [fold(builder, x, y, width) for x, y in pairs], width // 2
        return fold(builder, rows[0], rows[0], 1)

    return vector(*[vector] * 8), generate


@intrinsic
def quotient(typing: Any, length: Any, sums: Any, given: Any) -> Any:
    """``length / sums``; where it is ``given`` that no sum vanished, zero for a zero."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        length, sums, given = args
        empty = _empty(builder, sums, given)
        return builder.select(empty, ir.Constant(_VECTOR, None), builder.fdiv(length, sums))

    return vector(vector, vector, types.boolean), generate


@intrinsic
def doubtful(typing: Any, sums: Any, scales: Any, floor: Any, given: Any) -> Any:
    """Whether a sum is below ``floor`` or a scale below the normal numbers; a NaN is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, scales, floor, given = args
        smallest = ir.Constant(_VECTOR, [SMALLEST_NORMAL] * LANES)
        bad = builder.or_(
            builder.fcmp_unordered("<", sums, floor), builder.fcmp_unordered("<", scales, smallest)
        )
        bad = builder.and_(bad, builder.not_(_empty(builder, sums, given)))
        bits = builder.bitcast(bad, _I16)
        return builder.icmp_unsigned("!=", bits, ir.Constant(_I16, 0))

    return types.boolean(vector, vector, vector, types.boolean), generate


def _empty(builder: Any, sums: Any, given: Any) -> Any:
    zero = builder.fcmp_ordered("==", sums, ir.Constant(_VECTOR, None))
    return builder.and_(zero, _spread(builder, given, ir.VectorType(ir.IntType(1), LANES)))


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Bring a line into the cache; an address beyond the matrix does no harm."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I8.as_pointer())
        arguments = [pointer, *(ir.Constant(_I32, value) for value in (0, 3, 1))]
        _masked(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)
        return context.get_dummy_value()

    return void(int64), generate


@intrinsic
def claim(typing: Any, address: Any) -> Any:
    """Add one to a counter that all threads share, and return what it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(_I64, 1), "monotonic")

    return int64(int64), generate


def _scalar(kind: Any, memory: Any) -> tuple[Any, Any]:
    @intrinsic
    def get(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(builder.inttoptr(args[0], memory.as_pointer()))

        return kind(int64), generate

    @intrinsic
    def put(typing: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[1], builder.inttoptr(args[0], memory.as_pointer()))
            return context.get_dummy_value()

        return void(int64, kind), generate

    return get, put


get_int, put_int = _scalar(int64, _I64)
get_byte, _ = _scalar(types.int8, _I8)
get_float, put_float = _scalar(float32, _F32)
get_double, _ = _scalar(float64, ir.DoubleType())

inlined = njit(forceinline=True, error_model="numpy")
compiled = njit(error_model="numpy")


# One pass -----------------------------------------------------------------------------------------


@inlined
def _weigh(dtype, g, ld, v, count, a0, a1, a2, a3, a4, a5, a6, a7):
    """Add ``v`` times the squares of 16 columns of 8 rows to the 8 row sums."""
    c = load(float32(0), v, count)
    x = load(dtype, g, count)
    a0 = times_plus(times(x, x), c, a0)
    x = load(dtype, g + ld, count)
    a1 = times_plus(times(x, x), c, a1)
    x = load(dtype, g + 2 * ld, count)
    a2 = times_plus(times(x, x), c, a2)
    x = load(dtype, g + 3 * ld, count)
    a3 = times_plus(times(x, x), c, a3)
    x = load(dtype, g + 4 * ld, count)
    a4 = times_plus(times(x, x), c, a4)
    x = load(dtype, g + 5 * ld, count)
    a5 = times_plus(times(x, x), c, a5)
    x = load(dtype, g + 6 * ld, count)
    a6 = times_plus(times(x, x), c, a6)
    x = load(dtype, g + 7 * ld, count)
    a7 = times_plus(times(x, x), c, a7)
    return a0, a1, a2, a3, a4, a5, a6, a7


@inlined
def _gather(dtype, g, ld, sums, count, r0, r1, r2, r3, r4, r5, r6, r7):
    """Add 8 rows' squares, each times its ``u``, to 16 column sums, in two chains."""
    x = load(dtype, g, count)
    a = times_plus(times(x, x), r0, load(float32(0), sums, count))
    x = load(dtype, g + ld, count)
    b = times(times(x, x), r1)
    x = load(dtype, g + 2 * ld, count)
    a = times_plus(times(x, x), r2, a)
    x = load(dtype, g + 3 * ld, count)
    b = times_plus(times(x, x), r3, b)
    x = load(dtype, g + 4 * ld, count)
    a = times_plus(times(x, x), r4, a)
    x = load(dtype, g + 5 * ld, count)
    b = times_plus(times(x, x), r5, b)
    x = load(dtype, g + 6 * ld, count)
    a = times_plus(times(x, x), r6, a)
    x = load(dtype, g + 7 * ld, count)
    b = times_plus(times(x, x), r7, b)
    store(float32(0), sums, plus(a, b), count)


@inlined
def _row_sums(dtype, size, g, ld, Q, v, u, length, floor, given):
    """Set ``u`` of 8 rows; return whether a sum cannot be trusted."""
    full = Q - Q % LANES
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = splat(float32(0))
    for j in range(0, full, LANES):
        a0, a1, a2, a3, a4, a5, a6, a7 = _weigh(
            dtype, g + j * size, ld, v + 4 * j, None, a0, a1, a2, a3, a4, a5, a6, a7
        )
    if full < Q:
        a0, a1, a2, a3, a4, a5, a6, a7 = _weigh(
            dtype, g + full * size, ld, v + 4 * full, Q - full, a0, a1, a2, a3, a4, a5, a6, a7
        )
    sums = totals(a0, a1, a2, a3, a4, a5, a6, a7)
    scales = quotient(splat(length), sums, given)
    store(float32(0), u, scales, ROWS)
    return doubtful(sums, scales, splat(floor), given)


@inlined
def _divide(address, length, value, floor, given):
    """Write ``length / value``; zero for a zero sum where it is ``given`` that none vanished."""
    if given and value == 0:
        put_float(address, float32(0))
        return False
    scale = length / value
    put_float(address, scale)
    return not (value >= floor and scale >= float32(SMALLEST_NORMAL))  # a NaN fails too


@inlined
def _column_sums(dtype, size, g, ld, Q, u, sums, ahead):
    """Add 8 rows to the column sums, fetching the rows ``ahead`` (in bytes) meanwhile."""
    full = Q - Q % LANES
    r0, r1 = splat(get_float(u)), splat(get_float(u + 4))
    r2, r3 = splat(get_float(u + 8)), splat(get_float(u + 12))
    r4, r5 = splat(get_float(u + 16)), splat(get_float(u + 20))
    r6, r7 = splat(get_float(u + 24)), splat(get_float(u + 28))
    for j in range(0, full, LANES):
        at = g + j * size
        _gather(dtype, at, ld, sums + 4 * j, None, r0, r1, r2, r3, r4, r5, r6, r7)
        at += ahead
        prefetch(at)
        prefetch(at + ld)
        prefetch(at + 2 * ld)
        prefetch(at + 3 * ld)
        prefetch(at + 4 * ld)
        prefetch(at + 5 * ld)
        prefetch(at + 6 * ld)
        prefetch(at + 7 * ld)
    if full < Q:
        at = g + full * size
        _gather(dtype, at, ld, sums + 4 * full, Q - full, r0, r1, r2, r3, r4, r5, r6, r7)


@inlined
def _one_row(dtype, size, g, Q, v, u, sums, length, floor, given, rows, columns):
    """What `_row_sums` and `_column_sums` do, for a row of the last block of fewer than 8."""
    full = Q - Q % LANES
    failed = False
    if rows:
        a = splat(float32(0))
        for j in range(0, full, LANES):
            x = load(dtype, g + j * size, None)
            a = times_plus(times(x, x), load(float32(0), v + 4 * j, None), a)
        if full < Q:
            x = load(dtype, g + full * size, Q - full)
            a = times_plus(times(x, x), load(float32(0), v + 4 * full, Q - full), a)
        failed = _divide(u, length, total(a), floor, given)
    if columns:
        r = splat(get_float(u))
        for j in range(0, full, LANES):
            x = load(dtype, g + j * size, None)
            a = times_plus(times(x, x), r, load(float32(0), sums + 4 * j, None))
            store(float32(0), sums + 4 * j, a, None)
        if full < Q:
            x = load(dtype, g + full * size, Q - full)
            a = times_plus(times(x, x), r, load(float32(0), sums + 4 * full, Q - full))
            store(float32(0), sums + 4 * full, a, Q - full)
    return failed


@compiled
def _sweep(dtype, size, g, ld, low, high, Q, v, u, sums, panel, given, rows, columns, forward):
    """Pass once over the rows from ``low`` to ``high``: their ``u``, then their share of ``sums``.

    Rows are walked in alternate directions, so that a pass starts on what the last one left in the
    cache.
    """
    length = float32(Q)
    floor = float32(FLOOR) * (length + _sum(v, Q))
    failed = False
    blocks = (high - low) // ROWS
    rest = low + blocks * ROWS
    for block in range(blocks):
        row = low + ROWS * (block if forward else blocks - 1 - block)
        at = g + row * ld
        if rows:
            failed |= _row_sums(dtype, size, at, ld, Q, v, u + 4 * row, length, floor, given)
        if columns:
            ahead = ROWS * ld if forward else -ROWS * ld
            _column_sums(dtype, size, at, ld, Q, u + 4 * row, panel, ahead)
            if (block + 1) % PANEL == 0:
                _move(panel, sums, Q)
    for row in range(rest, high):
        at = g + row * ld
        failed |= _one_row(
            dtype, size, at, Q, v, u + 4 * row, panel, length, floor, given, rows, columns
        )
    if columns:
        _move(panel, sums, Q)
    return failed


@compiled
def _move(panel, sums, Q):
    """Add a panel's column sums to the worker's, and clear them."""
    for j in range(0, Q, LANES):
        count = min(LANES, Q - j)
        x = load(float32(0), panel + 4 * j, count)
        store(float32(0), sums + 4 * j, plus(x, load(float32(0), sums + 4 * j, count)), count)
        store(float32(0), panel + 4 * j, splat(float32(0)), count)


@compiled
def _sum(address, count):
    full = count - count % LANES
    a = splat(float32(0))
    for j in range(0, full, LANES):
        a = plus(a, load(float32(0), address + 4 * j, None))
    if full < count:
        a = plus(a, load(float32(0), address + 4 * full, count - full))
    return total(a)


@compiled
def _fill(address, count, value):
    for j in range(count):
        put_float(address + 4 * j, value)


@compiled
def _root(address, count):
    for j in range(count):
        put_float(address + 4 * j, math.sqrt(get_float(address + 4 * j)))


@compiled
def _reduce(sums, stride, workers, low, high, P, u, v, given):
    """Add the workers' column sums in their order, and set ``v`` from ``low`` to ``high``."""
    length = float32(P)
    floor = float32(FLOOR) * (length + _sum(u, P))
    failed = False
    full = low + (high - low) // LANES * LANES
    for j in range(low, full, LANES):
        column = load(float32(0), sums + 4 * j, None)
        for worker in range(1, workers):
            column = plus(column, load(float32(0), sums + worker * stride + 4 * j, None))
        scales = quotient(splat(length), column, given)
        store(float32(0), v + 4 * j, scales, None)
        failed |= doubtful(column, scales, splat(floor), given)
    for j in range(full, high):
        value = get_float(sums + 4 * j)
        for worker in range(1, workers):
            value += get_float(sums + worker * stride + 4 * j)
        failed |= _divide(v + 4 * j, length, value, floor, given)
    return failed


@inlined
def _share(count, worker, workers, unit):
    """Where a worker's part of ``count`` begins, in whole units; parts differ by at most one."""
    units = (count + unit - 1) // unit
    return min(count, unit * (units * worker // workers))


# One matrix ---------------------------------------------------------------------------------------


@compiled
def _one_pass(entry, number, iters, low, high, sums, panel):
    """Run pass ``number`` over the rows from ``low`` to ``high``; say whether it failed."""
    turned = get_int(entry + _TURNED) != 0
    rows = not turned or number > 0
    columns = not turned or number < iters
    Q = get_int(entry + _Q)
    if columns:
        _fill(sums, Q, float32(0))
        _fill(panel, Q, float32(0))
    g, ld = get_int(entry + _G), get_int(entry + _LD)
    u, v = get_int(entry + _U), get_int(entry + _V)
    given = get_int(entry + _GIVEN) != 0
    forward = number % 2 == 0
    if get_int(entry + _DTYPE) == BF16:
        return _sweep(
            int16(0), 2, g, ld, low, high, Q, v, u, sums, panel, given, rows, columns, forward
        )
    return _sweep(
        float32(0), 4, g, ld, low, high, Q, v, u, sums, panel, given, rows, columns, forward
    )


@compiled
def _solve(job, entry, first, team, workers, scratch, alone):
    """Find the scales of one matrix as worker ``first``, ``first + team``, … of ``workers``."""
    P, Q, iters = get_int(entry + _P), get_int(entry + _Q), get_int(job + _ITERS)
    u, v = get_int(entry + _U), get_int(entry + _V)
    stride, given = get_int(job + _STRIDE), get_int(entry + _GIVEN) != 0
    turned = get_int(entry + _TURNED) != 0
    failed = False
    if not given:
        for worker in range(first, workers, team):
            start, end = (u, P) if turned else (v, Q)
            low = _share(end, worker, workers, 1)
            _fill(start + 4 * low, _share(end, worker + 1, workers, 1) - low, float32(1))
    if not alone:
        barrier()
    for number in range(iters + turned):
        for worker in range(first, workers, team):
            low, high = _share(P, worker, workers, ROWS), _share(P, worker + 1, workers, ROWS)
            sums = scratch + worker * stride
            failed |= _one_pass(entry, number, iters, low, high, sums, sums + stride // 2)
        if not alone:
            barrier()
        if number < iters:
            for worker in range(first, workers, team):
                low, high = _share(Q, worker, workers, 1), _share(Q, worker + 1, workers, 1)
                failed |= _reduce(scratch, stride, workers, low, high, P, u, v, given)
            if not alone:
                barrier()
    for worker in range(first, workers, team):
        low = _share(P, worker, workers, 1)
        _root(u + 4 * low, _share(P, worker + 1, workers, 1) - low)
        low = _share(Q, worker, workers, 1)
        _root(v + 4 * low, _share(Q, worker + 1, workers, 1) - low)
    if failed:
        put_int(entry + _FAILED, 1)


# The two jobs -------------------------------------------------------------------------------------


@cfunc(void(int64), cache=True, error_model="numpy")
def find_scales(job):
    """Find the scales of a table of gradients, as one thread of a team.

    Large matrices come first, their rows split over all workers; then each small one goes whole to
    the thread that claims it, without barriers. Which is which depends on the matrix alone, so its
    bits do not depend on the others.
    """
    table, count, workers = get_int(job), get_int(job + _COUNT), get_int(job + _WORKERS)
    scratch, stride = get_int(job + _SCRATCH), get_int(job + _STRIDE)
    first, team = int64(thread_num()), int64(num_threads())
    for i in range(count):
        entry = table + i * GRADIENT_BYTES
        if get_int(entry + _P) * get_int(entry + _Q) > get_int(job + _WHOLE):
            _solve(job, entry, first, team, workers, scratch, False)
    i = claim(job + _NEXT)
    while i < count:
        entry = table + i * GRADIENT_BYTES
        if get_int(entry + _P) * get_int(entry + _Q) <= get_int(job + _WHOLE):
            _solve(job, entry, 0, 1, 1, scratch + first * stride, True)
        i = claim(job + _NEXT)


@inlined
def _step(w_dtype, g_dtype, w, g, v, r, keep, step, count):
    x = times(times(load(g_dtype, g, count), r), load(float32(0), v, count))
    kept = times(keep, load(w_dtype, w, count))
    store(w_dtype, w, times_plus(step, x, kept), count)


@compiled
def _step_rows(w_dtype, w_size, g_dtype, g_size, entry, low, high, keep, step):
    Q, u, v = get_int(entry + _WQ), get_int(entry + _WU), get_int(entry + _WV)
    full = Q - Q % LANES
    for row in range(low, high):
        w = get_int(entry + _W) + row * get_int(entry + _WLD)
        g = get_int(entry + _WG) + row * get_int(entry + _GLD)
        r = splat(get_float(u + 4 * row))
        for j in range(0, full, LANES):
            _step(w_dtype, g_dtype, w + j * w_size, g + j * g_size, v + 4 * j, r, keep, step, None)
        if full < Q:
            w += full * w_size
            g += full * g_size
            _step(w_dtype, g_dtype, w, g, v + 4 * full, r, keep, step, Q - full)


@cfunc(void(int64), cache=True, error_model="numpy")
def take_steps(job):
    """Update a table of parameters, as one thread of a team that claims blocks of rows.

    The table is walked from its end: the gradients that `find_scales` read last are in the cache.
    """
    table, count = get_int(job), get_int(job + _COUNT)
    factors = get_int(job + _FACTORS)
    keep, step = splat(float32(get_double(factors))), splat(float32(get_double(factors + 8)))
    begin = 0
    mine = claim(job + _NEXT)
    for i in range(count - 1, -1, -1):
        entry = table + i * UPDATE_BYTES
        P = get_int(entry + _WP)
        rows = max(1, 32768 // max(1, get_int(entry + _WQ)))
        blocks = (P + rows - 1) // rows
        allowed = get_int(entry + _ALLOWED)
        skip = allowed != 0 and get_byte(allowed) == 0
        while mine < begin + blocks:
            low = (mine - begin) * rows
            high = min(P, low + rows)
            wide, g_wide = get_int(entry + _WDTYPE) == F32, get_int(entry + _GDTYPE) == F32
            if skip:
                pass
            elif wide and g_wide:
                _step_rows(float32(0), 4, float32(0), 4, entry, low, high, keep, step)
            elif wide:
                _step_rows(float32(0), 4, int16(0), 2, entry, low, high, keep, step)
            elif g_wide:
                _step_rows(int16(0), 2, float32(0), 4, entry, low, high, keep, step)
            else:
                _step_rows(int16(0), 2, int16(0), 2, entry, low, high, keep, step)
            mine = claim(job + _NEXT)
        begin += blocks
