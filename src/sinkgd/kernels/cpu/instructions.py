"""The instructions of the compiled loops: sixteen floats at a time, whatever the machine's width.

The vectors are explicit, so the order of every sum is written in the loops and not chosen by the
optimizer: float32 and bfloat16 gradients that hold the same numbers give the same bits, and NaN and
infinity stay what they are. Addresses are plain integers, and so is everything that a thread is
told.
"""

from typing import Any

from llvmlite import ir
from numba import float32, float64, int16, int64, njit, types, void
from numba.extending import intrinsic, models, register_model

from sinkgd.kernels.rounding import FACTORS, SHIFTS

LANES = 16

_I64, _I32, _I16, _I8 = (ir.IntType(bits) for bits in (64, 32, 16, 8))
_F32 = ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)

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


def _of_two(operation: str) -> Any:
    @intrinsic
    def of_two(typing: Any, x: Any, y: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, operation)(*args)

        return vector(vector, vector), generate

    return of_two


plus, times, quotient = _of_two("fadd"), _of_two("fmul"), _of_two("fdiv")


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
def any_below(typing: Any, x: Any, least: Any, count: Any) -> Any:
    """Whether one of the first ``count`` numbers (all of them if None) is not at least ``least``.

    A NaN is not.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        below = builder.fcmp_unordered("<", args[0], args[1])
        if count != types.none:
            below = builder.and_(below, _mask(builder, args[2]))
        bits = builder.bitcast(below, _I16)
        return builder.icmp_unsigned("!=", bits, ir.Constant(_I16, 0))

    return types.boolean(vector, vector, count), generate


@intrinsic
def dither(typing: Any, x: Any, place: Any, stride: Any, key: Any) -> Any:
    """Sixteen numbers, each rounded at random to one of the two bfloat16 beside it.

    Number i is at ``place + i * stride``; `sinkgd.kernels.rounding` defines the random bits. NaN
    and infinity stay what they are.
    """
    wide = ir.VectorType(_I32, LANES)

    def spread(builder: Any, word: Any) -> Any:
        return _spread(builder, builder.trunc(word, _I32), wide)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, place, stride, key = args
        lanes = builder.mul(ir.Constant(wide, list(range(LANES))), spread(builder, stride))
        word = builder.add(lanes, spread(builder, builder.add(place, key)))
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
def prefetch(typing: Any, address: Any) -> Any:
    """Bring a line into the second cache; an address beyond the matrix does no harm.

    The first one would not hold rows that are a power of two apart until they are read.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I8.as_pointer())
        arguments = [pointer, *(ir.Constant(_I32, value) for value in (0, 2, 1))]
        _masked(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)
        return context.get_dummy_value()

    return void(int64), generate


@intrinsic
def anew(typing: Any, number: Any) -> Any:
    """The same number, from a register that the compiler believes was changed.

    What is computed from it is computed again each time around a loop, where it would otherwise be
    kept: eight rows a ``ld`` apart then need a few multiples of ``ld``, not a register each.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.asm(ir.FunctionType(_I64, [_I64]), "", "=r,0", args, side_effect=True)

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
