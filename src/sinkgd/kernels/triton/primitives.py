"""Functions that several kernels use: fields of tables, matrices in memory, sums, powers of two.

Letters: as in `sinkgd.kernels.triton.tables`.
"""

from typing import Any

import torch
import triton
import triton.language as tl

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
LARGEST = tl.constexpr(3.4028234663852886e38)
LOWEST_POWER, _HIGHEST_POWER = tl.constexpr(2.0**-126), tl.constexpr(2.0**126)


def field(row: type[Any], name: str) -> tl.constexpr:
    """Return the index of a field in a row of a table."""
    return tl.constexpr(row._fields.index(name))


@triton.jit
def row_length(pointer, VECTOR: tl.constexpr):
    """Return Q, read from a table: a multiple of ``VECTOR``."""
    Q = tl.load(pointer).to(tl.int32)
    if VECTOR > 1:
        Q = tl.multiple_of(Q, VECTOR)
    return Q


@triton.jit
def matrix_at(address, offset, ld, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Return a pointer to a matrix's first entry, and ld as an integer of 64 bits.

    With ``VECTOR`` above 1, the compiler is told that loads of 16 bytes are aligned.
    """
    base = tl.load(address).to(tl.pointer_type(DTYPE))
    first = tl.load(offset)
    stride = tl.load(ld)
    if VECTOR > 1:
        base = tl.multiple_of(base, 16)
        first = tl.multiple_of(first, VECTOR)
        stride = tl.multiple_of(stride, VECTOR)
    return base + first, stride


@triton.jit
def load_tile(base, ld, rows, cols, inside):
    """Return a tile in float32; 0 where ``inside`` is False."""
    pointers = base + (rows.to(tl.int64) * ld)[:, None] + cols[None, :]
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def sum_along(x, AXIS: tl.constexpr):
    """Return the sums along ``AXIS``."""
    return tl.reduce(x, AXIS, tl.standard._sum_combine)


@triton.jit
def power_of_two(peak):
    """Return the power of two at or below ``peak``, clamped so that its inverse is also normal."""
    power = (peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.minimum(tl.maximum(power, LOWEST_POWER), _HIGHEST_POWER)


@triton.jit
def inverse_power(power):
    """Return the inverse of a power of two between the lowest and the highest."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def peak_powers(x, AXIS: tl.constexpr):
    """Return the power of two at or below the largest magnitude along ``AXIS``.

    NaN is ignored. For a line of only NaN, the power is undefined.
    """
    size = tl.abs(x)
    if INTERPRETED:  # the interpreter's maximum returns NaN; a compiled maximum ignores it
        size = tl.where(x == x, size, 0.0)
    return power_of_two(tl.reduce(size, AXIS, tl.standard._elementwise_max))


@triton.jit
def round_to_tf32(x):
    """Return numbers rounded to 11 bits, which a tensor core reads exactly, as tf32."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def truncate_to_tf32(x):
    """Keep the 11 leading bits: a tensor core reads only these, but the interpreter reads all."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def dot_float32(left, right, TF32: tl.constexpr):
    """Multiply float32 matrices: by three products in tf32, to 21 bits, or by one in float32."""
    if TF32:
        upper, right_upper = round_to_tf32(left), round_to_tf32(right)
        lower, right_lower = left - upper, right - right_upper
        if INTERPRETED:
            lower, right_lower = truncate_to_tf32(lower), truncate_to_tf32(right_lower)
        total = tl.dot(upper, right_lower, input_precision="tf32")
        total = tl.dot(lower, right_upper, total, input_precision="tf32")
        return tl.dot(upper, right_upper, total, input_precision="tf32")
    else:  # noqa: RET505 - triton compiles one of two branches
        return tl.dot(left, right, input_precision="ieee")


IS_INTERPRETED = not isinstance(peak_powers, triton.JITFunction)
INTERPRETED = tl.constexpr(IS_INTERPRETED)
