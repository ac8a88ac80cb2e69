"""The primitives of the compiled loops: vectors of sixteen floats, memory, and threads.

Vectors have sixteen lanes on every machine, and the loops state the order of every sum. Fast-math
is off, so the compiler neither reorders sums nor assumes that numbers are finite. Therefore float32
and bfloat16 gradients with the same values give the same bits, and NaN and infinity are preserved.
Threads receive addresses as plain integers, and no arrays.
"""

from typing import Any

from llvmlite import ir
from llvmlite.binding import add_symbol
from numba import float32, float64, int16, int64, njit, types, void
from numba.extending import intrinsic, models, register_model

from sinkgd.kernels.cpu import tables as t
from sinkgd.kernels.cpu.launch import torch_openmp
from sinkgd.kernels.rounding import FACTORS, SHIFTS

LANES = 16
SPINS = 10_000  # reads of a counter before a waiting thread yields; each takes about a nanosecond

_I64, _I32, _I16, _I8 = (ir.IntType(bits) for bits in (64, 32, 16, 8))
_F32 = ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)

# A call to an unregistered symbol ends the process, so all symbols are registered before linking.
_openmp = torch_openmp()
if _openmp is None:
    raise ImportError("torch's OpenMP runtime lacks GOMP_parallel, or is not found")
for _name, _address in _openmp.symbols.items():
    add_symbol(_name, _address)

inlined = njit(forceinline=True, error_model="numpy")
compiled = njit(error_model="numpy")


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Vector16f32")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _VECTOR)


def _bits(value: int, like: ir.VectorType) -> ir.Constant:
    return ir.Constant(like, [value] * LANES)


def _mask(builder: Any, count: Any) -> Any:
    indices = ir.Constant(ir.VectorType(_I64, LANES), list(range(LANES)))
    return builder.icmp_signed("<", indices, _spread(builder, count, ir.VectorType(_I64, LANES)))


def _spread(builder: Any, value: Any, like: ir.VectorType) -> Any:
    undefined = ir.Constant(like, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, _bits(0, ir.VectorType(_I32, LANES)))


def _call_intrinsic(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    function_type = ir.FunctionType(result, [a.type for a in arguments])
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, function_type, name)
    return builder.call(function, arguments)


@intrinsic
def load(typing: Any, like: Any, address: Any, count: Any) -> Any:
    """Read 16 numbers as float32. With ``count``, read that many; the rest are zeros.

    ``like`` is a dummy number. Its type says what is stored: float32 for float32, int16 for
    bfloat16.
    """
    narrow = like == int16
    element, name, align = (_I16, "v16i16", 2) if narrow else (_F32, "v16f32", 4)
    memory = ir.VectorType(element, LANES)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[1], memory.as_pointer())
        if count == types.none:
            x = builder.load(pointer, align=align)
        else:
            zeros = ir.Constant(memory, None)
            arguments = [pointer, ir.Constant(_I32, align), _mask(builder, args[2]), zeros]
            x = _call_intrinsic(builder, f"llvm.masked.load.{name}.p0", memory, arguments)
        if not narrow:
            return x
        wide = ir.VectorType(_I32, LANES)
        return builder.bitcast(builder.shl(builder.zext(x, wide), _bits(16, wide)), _VECTOR)

    return vector(like, address, count), generate


@intrinsic
def store(typing: Any, like: Any, address: Any, x: Any, count: Any) -> Any:
    """Write 16 numbers, or ``count`` of them; ``like`` is as for `load`.

    For bfloat16, numbers are rounded to the nearest value, ties to even.
    """
    narrow = like == int16
    element, name, align = (_I16, "v16i16", 2) if narrow else (_F32, "v16f32", 4)
    memory = ir.VectorType(element, LANES)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _to_bfloat16(builder, args[2]) if narrow else args[2]
        pointer = builder.inttoptr(args[1], memory.as_pointer())
        if count == types.none:
            builder.store(value, pointer, align=align)
        else:
            arguments = [value, pointer, ir.Constant(_I32, align), _mask(builder, args[3])]
            _call_intrinsic(builder, f"llvm.masked.store.{name}.p0", ir.VoidType(), arguments)
        return context.get_dummy_value()

    return void(like, address, x, count), generate


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
    """Broadcast a float32 to all lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _spread(builder, args[0], _VECTOR)

    return vector(float32), generate


def _binary(operation: str) -> Any:
    @intrinsic
    def binary(typing: Any, x: Any, y: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, operation)(*args)

        return vector(vector, vector), generate

    return binary


add, mul, div = _binary("fadd"), _binary("fmul"), _binary("fdiv")


@intrinsic
def muladd(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """Return ``x * y + z``, rounded once if the machine has an instruction for it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arguments = list(args)
        return _call_intrinsic(builder, "llvm.fmuladd.v16f32", _VECTOR, arguments)

    return vector(vector, vector, vector), generate


@intrinsic
def sum_lanes(typing: Any, x: Any) -> Any:
    """Sum the sixteen lanes, by halves."""

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
def sum_lanes_of_eight(
    typing: Any, a0: Any, a1: Any, a2: Any, a3: Any, a4: Any, a5: Any, a6: Any, a7: Any
) -> Any:
    """Sum eight vectors, each as `sum_lanes` does. The sums are in the first eight lanes."""

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
def any_below(typing: Any, x: Any, least: Any, count: Any) -> Any:
    """Whether one of the first ``count`` lanes (None: any lane) is below ``least`` or NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        below = builder.fcmp_unordered("<", args[0], args[1])
        if count != types.none:
            below = builder.and_(below, _mask(builder, args[2]))
        bits = builder.bitcast(below, _I16)
        return builder.icmp_unsigned("!=", bits, ir.Constant(_I16, 0))

    return types.boolean(vector, vector, count), generate


@intrinsic
def round_stochastically(typing: Any, x: Any, index: Any, stride: Any, key: Any) -> Any:
    """Round each lane at random to one of its two bfloat16 neighbors.

    Lane i is entry ``index + i * stride`` of the parameter. `sinkgd.kernels.rounding` defines the
    random bits. NaN and infinity are preserved.
    """
    wide = ir.VectorType(_I32, LANES)

    def spread(builder: Any, word: Any) -> Any:
        return _spread(builder, builder.trunc(word, _I32), wide)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, index, stride, key = args
        lanes = builder.mul(ir.Constant(wide, list(range(LANES))), spread(builder, stride))
        word = builder.add(lanes, spread(builder, builder.add(index, key)))
        word = builder.xor(word, spread(builder, builder.lshr(key, ir.Constant(_I64, 32))))
        for shift, factor in zip(SHIFTS, FACTORS, strict=False):
            word = builder.xor(word, builder.lshr(word, _bits(shift, wide)))
            word = builder.mul(word, _bits(factor, wide))
        word = builder.xor(word, builder.lshr(word, _bits(SHIFTS[2], wide)))
        noise = builder.lshr(word, _bits(16, wide))
        rounded = builder.and_(
            builder.add(builder.bitcast(x, wide), noise), _bits(0xFFFF0000, wide)
        )
        is_nan = builder.fcmp_unordered("uno", x, x)
        return builder.select(is_nan, x, builder.bitcast(rounded, _VECTOR))

    return vector(vector, int64, int64, int64), generate


@intrinsic
def select_toward_zero(typing: Any, w: Any, moved: Any, one: Any, other: Any) -> Any:
    """Return ``one`` in lanes where adding ``moved`` moves ``w`` toward zero, elsewhere ``other``.

    Where ``w`` is zero, the result may be either; where ``moved`` is zero, it is ``other``.
    """
    wide = ir.VectorType(_I32, LANES)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        w, moved, one, other = args
        signs = builder.xor(builder.bitcast(w, wide), builder.bitcast(moved, wide))
        is_opposite = builder.icmp_signed("<", signs, _bits(0, wide))
        moves = builder.fcmp_ordered("!=", moved, ir.Constant(_VECTOR, [0.0] * LANES))
        return builder.select(builder.and_(is_opposite, moves), one, other)

    return vector(vector, vector, vector, vector), generate


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Fetch a cache line into L2. The address may lie beyond the matrix.

    L1 would evict rows that are a large power of two apart before they are read.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I8.as_pointer())
        arguments = [pointer, *(ir.Constant(_I32, value) for value in (0, 2, 1))]
        _call_intrinsic(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)
        return context.get_dummy_value()

    return void(int64), generate


@intrinsic
def opaque(typing: Any, number: Any) -> Any:
    """Return ``number``, as a value that the compiler knows nothing about.

    In a loop, the compiler then recomputes expressions of this value in each round, instead of
    keeping them in registers. The addresses of eight rows, ``ld`` bytes apart, would otherwise
    occupy a register each.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.asm(ir.FunctionType(_I64, [_I64]), "", "=r,0", args, side_effect=True)

    return int64(int64), generate


def _scalar(kind: Any, memory: Any) -> tuple[Any, Any]:
    """Return intrinsics that load and store one number at an address."""

    @intrinsic
    def load_scalar(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(builder.inttoptr(args[0], memory.as_pointer()))

        return kind(int64), generate

    @intrinsic
    def store_scalar(typing: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[1], builder.inttoptr(args[0], memory.as_pointer()))
            return context.get_dummy_value()

        return void(int64, kind), generate

    return load_scalar, store_scalar


load_int, store_int = _scalar(int64, _I64)
load_byte, _ = _scalar(types.int8, _I8)
load_float, store_float = _scalar(float32, _F32)
load_double, _ = _scalar(float64, ir.DoubleType())


@compiled
def fill(address, count, value):
    """Write one float32 ``count`` times."""
    x = splat(value)
    full = count - count % LANES
    for j in range(0, full, LANES):
        store(float32(0), address + 4 * j, x, None)
    if full < count:
        store(float32(0), address + 4 * full, x, int64(count - full))


@compiled
def sum_of(address, count):
    """Return the sum of ``count`` float32 numbers."""
    full = count - count % LANES
    a = splat(float32(0))
    for j in range(0, full, LANES):
        a = add(a, load(float32(0), address + 4 * j, None))
    if full < count:
        a = add(a, load(float32(0), address + 4 * full, count - full))
    return sum_lanes(a)


thread_num = types.ExternalFunction("sinkgd_thread_num", types.int32())
num_threads = types.ExternalFunction("sinkgd_num_threads", types.int32())
_yield = types.ExternalFunction("sinkgd_yield", types.int32())


@intrinsic
def fetch_add(typing: Any, address: Any) -> Any:
    """Add one to a shared counter, and return its previous value.

    A thread that reads the counter later sees what this thread wrote before.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(_I64, 1), "seq_cst")

    return int64(int64), generate


@intrinsic
def load_atomic(typing: Any, address: Any) -> Any:
    """Read a shared counter."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8)

    return int64(int64), generate


@inlined
def share_begin(count, worker, workers, unit):
    """Return where a worker's share of ``count`` begins.

    Shares consist of whole units, of which the very last may be incomplete. They differ by at most
    one unit.
    """
    units = (count + unit - 1) // unit
    return min(count, unit * (units * worker // workers))


@compiled
def barrier(job, team):
    """Wait until all ``team`` threads have arrived.

    A thread spins for some microseconds and then yields: with more threads than cores, the thread
    that all wait for may need this core.
    """
    arrival = fetch_add(job + t.ARRIVED)
    complete = arrival - arrival % team + team
    reads = 0
    while load_atomic(job + t.ARRIVED) < complete:
        reads += 1
        if reads > SPINS:
            _yield()
