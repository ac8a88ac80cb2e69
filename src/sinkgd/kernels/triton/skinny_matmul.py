"""The kernels of products of an update X = u * G * v with k vectors, for any layout of G.

Letters: as in `sinkgd.kernels.triton.tables`, and
    g: a tile of the gradient
    tall, wide: vectors with an entry for each row in memory, and for each column
    K: vectors of a launch, 16 or 32

`matmul` finds X @ wide, and `matmul_transposed` X.T @ tall. A program computes 64 rows of a product
and adds up all their terms, so no sum is shared or depends on the order of programs. The vectors
are first multiplied by the scales of one side, and then the product by the scales of the other. For
a bfloat16 gradient, a number of a vector is split into three bfloat16 numbers, 24 bits together.
For other gradients it is split into two tf32 numbers if products are computed in tf32, and stays
float32 otherwise. The product is float32.
"""

import triton
import triton.language as tl

from sinkgd.kernels.triton.primitives import (
    INTERPRETED,
    field,
    matrix_at,
    peak_powers,
    power_of_two,
    round_to_tf32,
    row_length,
    sum_along,
    truncate_to_tf32,
)
from sinkgd.kernels.triton.product_plan import BLOCK, ROWS
from sinkgd.kernels.triton.tables import ProductMatrix

_MATRIX = tl.constexpr(len(ProductMatrix._fields))
_TENSOR, _OFFSET = field(ProductMatrix, "tensor"), field(ProductMatrix, "offset")
_P, _Q, _LD = field(ProductMatrix, "P"), field(ProductMatrix, "Q"), field(ProductMatrix, "ld")
_U, _U_OFFSET, _U_POWER = (
    field(ProductMatrix, "u"),
    field(ProductMatrix, "u_offset"),
    field(ProductMatrix, "u_power"),
)
_V, _V_OFFSET, _V_POWER = (
    field(ProductMatrix, "v"),
    field(ProductMatrix, "v_offset"),
    field(ProductMatrix, "v_power"),
)
_TALL, _TALL_SHARED = field(ProductMatrix, "tall"), field(ProductMatrix, "tall_shared")
_WIDE, _WIDE_SHARED = field(ProductMatrix, "wide"), field(ProductMatrix, "wide_shared")

_BLOCK, _ROWS = tl.constexpr(BLOCK), tl.constexpr(ROWS)
_CHUNK = tl.constexpr(1024)
_ROW_STEP = tl.constexpr(16)  # rows in memory from one row of a thread to its next row


@triton.jit
def balance_scales(
    addresses,
    matrices,
    powers,  # float32
):
    """Find the powers of two that bring the scales of both sides of a matrix to the same size.

    As a result, neither vectors nor their products with unscaled entries of the gradient overflow.
    """
    matrix = matrices + tl.program_id(0) * _MATRIX
    u, P = _scales(addresses, matrix, _U, _U_OFFSET), tl.load(matrix + _P).to(tl.int32)
    v, Q = _scales(addresses, matrix, _V, _V_OFFSET), tl.load(matrix + _Q).to(tl.int32)
    shift = (_exponent(v, Q) - _exponent(u, P)) >> 1
    tl.store(powers + tl.load(matrix + _U_POWER), _power(shift))
    tl.store(powers + tl.load(matrix + _V_POWER), _power(-shift))


@triton.jit
def _exponent(scales, count):
    """Return the exponent of the largest of ``count`` scales, ignoring NaN."""
    power = power_of_two(tl.full((), 0.0, tl.float32))
    for first in range(0, count, _CHUNK):
        at = first + tl.arange(0, _CHUNK)
        power = tl.maximum(power, peak_powers(tl.load(scales + at, mask=at < count, other=0.0), 0))
    return (power.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _power(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["first", "width"])
def scale_vectors(
    addresses,
    matrices,
    owners,  # the matrix of each block of vectors
    powers,
    given,  # float64, ``width`` entries per row
    scaled,  # output: the vectors times their scales, split
    first,  # index of the first block
    width,
    OF_ROWS: tl.constexpr,  # whether vectors have an entry for each row in memory
    SHARED: tl.constexpr,  # whether matrices share the given vectors
    K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Multiply a block of vectors by their scales; zeros follow beyond the matrix."""
    block = first + tl.program_id(0)
    matrix = matrices + tl.load(owners + block) * _MATRIX
    if OF_ROWS:
        begin, count = tl.load(matrix + _TALL), tl.load(matrix + _P).to(tl.int32)
        scales, size = _scales(addresses, matrix, _U, _U_OFFSET), tl.load(matrix + _U_POWER)
        shared = tl.load(matrix + _TALL_SHARED)
    else:
        begin, count = tl.load(matrix + _WIDE), tl.load(matrix + _Q).to(tl.int32)
        scales, size = _scales(addresses, matrix, _V, _V_OFFSET), tl.load(matrix + _V_POWER)
        shared = tl.load(matrix + _WIDE_SHARED)
    at = block.to(tl.int64) * _BLOCK - begin + tl.arange(0, _BLOCK)
    cols = tl.arange(0, K)
    inside = at < count
    scale = tl.load(scales + at, mask=inside, other=0.0) * tl.load(powers + size)
    if SHARED:
        source = shared + at
    else:
        source = begin + at
    x = tl.load(
        given + source[:, None] * width + cols[None, :],
        mask=inside[:, None] & (cols < width)[None, :],
        other=0.0,
    )
    _store_scaled(x.to(tl.float32), scale, scaled, begin + at, K, SPLITS)


@triton.jit(do_not_specialize=["first", "one"])
def matmul(
    addresses,
    matrices,
    owners,  # the matrix of each block of tall vectors
    powers,
    scaled,  # wide vectors times their scales
    result,  # float32, K entries per row
    scaled_result,
    squares,  # float32, the sum of squares of each row in memory of X
    first,  # index of the first block
    one,
    DTYPE: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,  # 3 for a bfloat16 gradient; 2 if products are in tf32, else 1
    SQUARES: tl.constexpr,
    SCALE_RESULT: tl.constexpr,  # whether the result becomes the vectors of the other product
    VECTOR: tl.constexpr,
):
    """Find X @ wide for a block of rows in memory."""
    row, matrix, tall, wide, P, Q, grad, ld = _locate(
        addresses, matrices, owners, first, DTYPE, VECTOR
    )
    rows = (row - tall).to(tl.int32) + tl.arange(0, _ROWS)
    u = tl.load(_scales(addresses, matrix, _U, _U_OFFSET) + rows, mask=rows < P, other=0.0)
    u = u * tl.load(powers + tl.load(matrix + _U_POWER))
    v = _scales(addresses, matrix, _V, _V_OFFSET)
    v_power = tl.load(powers + tl.load(matrix + _V_POWER))
    total = tl.full((_ROWS, K), 0.0, tl.float32)
    # A partial sum for each load, so that no thread needs the entries of another.
    square = tl.full((_ROWS, BN // VECTOR), 0.0, tl.float32)
    scaled += wide * (SPLITS * K)
    lines = grad + (rows.to(tl.int64) * ld)[:, None]
    for start in range(0, Q, BN):
        cols = start + tl.arange(0, BN)
        inside = cols < Q
        g = tl.load(lines + cols[None, :], mask=(rows < P)[:, None] & inside[None, :], other=0.0)
        # Without this factor of one, the compiler lets a tensor core add to the total, which
        # truncates bits.
        total += _dot(g, scaled, BN, K, SPLITS, False) * one
        scaled += BN * SPLITS * K
        if SQUARES:
            y = (g.to(tl.float32) * u[:, None]) * (
                tl.load(v + cols, mask=inside, other=0.0) * v_power
            )[None, :]
            square += sum_along(tl.reshape(y * y, (_ROWS, BN // VECTOR, VECTOR)), 2)
    total = total * u[:, None]
    _store(result, tall + rows, total, 1, K)
    if SQUARES:
        tl.store(squares + tall + rows, sum_along(square, 1))
    if SCALE_RESULT:
        _store_scaled(total, u, scaled_result, tall + rows, K, SPLITS)


@triton.jit(do_not_specialize=["first", "one"])
def matmul_transposed(
    addresses,
    matrices,
    owners,  # the matrix of each block of wide vectors
    powers,
    scaled,  # tall vectors times their scales
    result,
    scaled_result,
    squares,  # the sum of squares of each column in memory of X
    first,
    one,
    DTYPE: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    SPLITS: tl.constexpr,  # 3 for a bfloat16 gradient; 2 if products are in tf32, else 1
    SQUARES: tl.constexpr,
    SCALE_RESULT: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Find X.T @ tall for a block of columns in memory."""
    row, matrix, tall, wide, P, Q, grad, ld = _locate(
        addresses, matrices, owners, first, DTYPE, VECTOR
    )
    cols = tl.multiple_of((row - wide).to(tl.int32), _ROWS) + tl.arange(0, _ROWS)
    v = tl.load(_scales(addresses, matrix, _V, _V_OFFSET) + cols, mask=cols < Q, other=0.0)
    v = v * tl.load(powers + tl.load(matrix + _V_POWER))
    u = _scales(addresses, matrix, _U, _U_OFFSET)
    u_power = tl.load(powers + tl.load(matrix + _U_POWER))
    if SPLITS == 3:
        total = tl.full((_ROWS, K), 0.0, tl.float32)
    else:
        total = tl.full((K, _ROWS), 0.0, tl.float32)
    square = tl.full((_ROW_STEP, _ROWS), 0.0, tl.float32)
    scaled += tall * (SPLITS * K)
    lines = grad + cols[None, :] + (tl.arange(0, BM).to(tl.int64) * ld)[:, None]
    for line in range(0, P, BM):
        rows = line + tl.arange(0, BM)
        inside = rows < P
        g = tl.load(lines, mask=inside[:, None] & (cols < Q)[None, :], other=0.0)
        lines += BM * ld
        total += _dot(g, scaled, BM, K, SPLITS, True) * one
        scaled += BM * SPLITS * K
        if SQUARES:
            y = g.to(tl.float32) * (tl.load(u + rows, mask=inside, other=0.0) * u_power)[:, None]
            y = y * v[None, :]
            square += sum_along(tl.reshape(y * y, (BM // _ROW_STEP, _ROW_STEP, _ROWS)), 0)
    if SPLITS != 3:
        total = total.T
    total = total * v[:, None]
    _store(result, wide + cols, total, 1, K)
    if SQUARES:
        tl.store(squares + wide + cols, sum_along(square, 0))
    if SCALE_RESULT:
        _store_scaled(total, v, scaled_result, wide + cols, K, SPLITS)


@triton.jit
def _locate(addresses, matrices, owners, first, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Return where this program works.

    Returns:
        This program's first row of the product; its matrix in the table; where its tall and its
        wide vectors begin; P; Q; a pointer to the gradient's matrix; ld.
    """
    row = first.to(tl.int64) * _BLOCK + tl.program_id(0) * _ROWS
    matrix = matrices + tl.load(owners + row // _BLOCK) * _MATRIX
    tall = tl.multiple_of(tl.load(matrix + _TALL), _BLOCK)
    wide = tl.multiple_of(tl.load(matrix + _WIDE), _BLOCK)
    P, Q = tl.load(matrix + _P).to(tl.int32), row_length(matrix + _Q, VECTOR)
    address = addresses + tl.load(matrix + _TENSOR)
    grad, ld = matrix_at(address, matrix + _OFFSET, matrix + _LD, DTYPE, VECTOR)
    return row, matrix, tall, wide, P, Q, grad, ld


@triton.jit
def _scales(addresses, matrix, FIELD: tl.constexpr, OFFSET: tl.constexpr):
    """Return a pointer to the scales of one side of a matrix."""
    scales = tl.load(addresses + tl.load(matrix + FIELD)).to(tl.pointer_type(tl.float32))
    return scales + tl.load(matrix + OFFSET)


@triton.jit
def _dot(
    g,
    scaled,
    LENGTH: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Return ``g`` or its transpose times vectors of LENGTH; add the smallest products first.

    If TRANSPOSED and SPLITS is not 3, return the transpose of the product.
    """
    high = _load(scaled, LENGTH, SPLITS, K)
    if SPLITS == 3:
        low = _load(scaled + 2 * K, LENGTH, SPLITS, K)
        middle = _load(scaled + K, LENGTH, SPLITS, K)
        if INTERPRETED:  # the interpreter would multiply the bits as whole numbers
            g, low = g.to(tl.float32), low.to(tl.float32)
            middle, high = middle.to(tl.float32), high.to(tl.float32)
        if TRANSPOSED:
            g = g.T
        total = tl.dot(g, high, tl.dot(g, middle, tl.dot(g, low)))
    else:
        x = g.to(tl.float32)
        if SPLITS == 2:
            low = _load(scaled + K, LENGTH, SPLITS, K)
            x = round_to_tf32(x)
            if TRANSPOSED:  # a tensor core can read a transposed operand only in narrower types
                total = tl.dot(low.T, x, input_precision="tf32")
            else:
                total = tl.dot(x, low, input_precision="tf32")
            if g.dtype == tl.float32:
                rest = g - x
                if INTERPRETED:
                    rest = truncate_to_tf32(rest)
                if TRANSPOSED:
                    total = tl.dot(high.T, rest, total, input_precision="tf32")
                else:
                    total = tl.dot(rest, high, total, input_precision="tf32")
            if TRANSPOSED:
                total = tl.dot(high.T, x, total, input_precision="tf32")
            else:
                total = tl.dot(x, high, total, input_precision="tf32")
        else:
            if TRANSPOSED:
                total = tl.dot(high.T, x, input_precision="ieee")
            else:
                total = tl.dot(x, high, input_precision="ieee")
    return total


@triton.jit
def _load(scaled, LENGTH: tl.constexpr, SPLITS: tl.constexpr, K: tl.constexpr):
    at = tl.arange(0, LENGTH)
    return tl.load(scaled + at[:, None] * (SPLITS * K) + tl.arange(0, K)[None, :])


@triton.jit
def _store_scaled(x, scales, scaled, at, K: tl.constexpr, SPLITS: tl.constexpr):
    """Store vectors times their scales, split into numbers that are K entries apart."""
    x = x * scales[:, None]
    if SPLITS == 3:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        _store(scaled, at, high, SPLITS, K)
        _store(scaled + K, at, middle, SPLITS, K)
        _store(scaled + 2 * K, at, (rest - middle.to(tl.float32)).to(tl.bfloat16), SPLITS, K)
    elif SPLITS == 2:
        high = round_to_tf32(x)
        _store(scaled, at, high, SPLITS, K)
        _store(scaled + K, at, round_to_tf32(x - high), SPLITS, K)
    else:
        _store(scaled, at, x, SPLITS, K)


@triton.jit
def _store(vectors, at, x, SPLITS: tl.constexpr, K: tl.constexpr):
    tl.store(vectors + at.to(tl.int64)[:, None] * (SPLITS * K) + tl.arange(0, K)[None, :], x)
