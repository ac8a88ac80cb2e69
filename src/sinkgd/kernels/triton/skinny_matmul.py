"""The kernels of products of an update X = u * G * v with k vectors, on G as it lies in memory.

Letters: those of `sinkgd.kernels.triton.fields`, and
    g: a tile of the gradient
    tall, wide: vectors with an entry for each row in memory, and for each column
    along, down: the products X @ wide, and X.T @ tall
    K: vectors of a launch, 16 or 32

A program owns 64 rows of a product and adds up all their terms, so no sum depends on the order of
programs, and none is shared. The scales of the other side are folded into the vectors beforehand,
and those of this side into the result. Vectors that meet a bfloat16 gradient are split into three
bfloat16 numbers, 24 bits together; others stay float32, and the product is one of float32.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from sinkgd.kernels.triton.primitives import (
    INTERPRETED,
    add_up,
    cut_bits,
    field,
    matrix_at,
    peaks,
    power_of_two,
    row_length,
    upper_bits,
)

BLOCK = 128  # rows of vectors: those of a matrix fill whole blocks
ROWS = 64  # of a program's product


class Skinny(NamedTuple):
    """A gradient's matrix. Places count elements, and those of vectors count vectors' entries."""

    grad: int  # where its address lies among all addresses
    offset: int  # from the tensor's first entry to the matrix's
    P: int
    Q: int
    ld: int
    u: int  # where the address of its P scales lies
    v: int
    u_offset: int  # from there to its first scale
    v_offset: int
    tall: int  # its first entry in vectors with an entry for each row in memory
    wide: int
    u_size: int  # where the power of two that brings u to the size of v lies
    v_size: int
    tall_given: int  # its first entry in vectors that matrices share
    wide_given: int


_MATRIX = tl.constexpr(len(Skinny._fields))
_GRAD, _OFFSET = field(Skinny, "grad"), field(Skinny, "offset")
_P, _Q, _LD = field(Skinny, "P"), field(Skinny, "Q"), field(Skinny, "ld")
_U, _U_OFFSET, _U_SIZE = field(Skinny, "u"), field(Skinny, "u_offset"), field(Skinny, "u_size")
_V, _V_OFFSET, _V_SIZE = field(Skinny, "v"), field(Skinny, "v_offset"), field(Skinny, "v_size")
_TALL, _TALL_GIVEN = field(Skinny, "tall"), field(Skinny, "tall_given")
_WIDE, _WIDE_GIVEN = field(Skinny, "wide"), field(Skinny, "wide_given")

_BLOCK, _ROWS = tl.constexpr(BLOCK), tl.constexpr(ROWS)
_CHUNK = tl.constexpr(1024)
_APART = tl.constexpr(16)  # rows in memory from one that a thread holds to its next


@triton.jit
def _exponent(scales, count):
    """Return the exponent of the largest of ``count`` scales, NaN apart."""
    power = power_of_two(tl.full((), 0.0, tl.float32))
    for first in range(0, count, _CHUNK):
        at = first + tl.arange(0, _CHUNK)
        power = tl.maximum(power, peaks(tl.load(scales + at, mask=at < count, other=0.0), 0))
    return (power.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _power(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def balance(
    addresses,
    matrices,
    sizes,  # float32
):
    """Find the powers of two that give the scales of both sides of a matrix the same size.

    Neither vectors nor products with bare entries of the gradient leave the range then.
    """
    matrix = matrices + tl.program_id(0) * _MATRIX
    u, P = _scales(addresses, matrix, _U, _U_OFFSET), tl.load(matrix + _P).to(tl.int32)
    v, Q = _scales(addresses, matrix, _V, _V_OFFSET), tl.load(matrix + _Q).to(tl.int32)
    shift = (_exponent(v, Q) - _exponent(u, P)) >> 1
    tl.store(sizes + tl.load(matrix + _U_SIZE), _power(shift))
    tl.store(sizes + tl.load(matrix + _V_SIZE), _power(-shift))


@triton.jit
def _scales(addresses, matrix, FIELD: tl.constexpr, OFFSET: tl.constexpr):
    """Return the address of a matrix's scales of one side."""
    scales = tl.load(addresses + tl.load(matrix + FIELD)).to(tl.pointer_type(tl.float32))
    return scales + tl.load(matrix + OFFSET)


@triton.jit
def _store(vectors, at, x, PARTS: tl.constexpr, K: tl.constexpr):
    tl.store(vectors + at.to(tl.int64)[:, None] * (PARTS * K) + tl.arange(0, K)[None, :], x)


@triton.jit
def _fold(x, scales, folded, at, K: tl.constexpr, PARTS: tl.constexpr):
    """Store vectors times their rows' scales, the parts of a row one after the other."""
    x = x * scales[:, None]
    if PARTS == 3:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        _store(folded, at, high, PARTS, K)
        _store(folded + K, at, middle, PARTS, K)
        _store(folded + 2 * K, at, (rest - middle.to(tl.float32)).to(tl.bfloat16), PARTS, K)
    elif PARTS == 2:
        high = upper_bits(x)
        _store(folded, at, high, PARTS, K)
        _store(folded + K, at, upper_bits(x - high), PARTS, K)
    else:
        _store(folded, at, x, PARTS, K)


@triton.jit(do_not_specialize=["first", "width"])
def fold(
    addresses,
    matrices,
    owners,  # the matrix of each block of vectors
    sizes,
    given,  # float64, ``width`` entries a row
    folded,
    first,  # block
    width,
    OF_ROWS: tl.constexpr,  # whether they have an entry for each row in memory
    SHARED: tl.constexpr,  # whether matrices share the vectors that are given
    K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Fold a block of vectors with their scales. What is beyond the matrix becomes zero."""
    block = first + tl.program_id(0)
    matrix = matrices + tl.load(owners + block) * _MATRIX
    if OF_ROWS:
        begin, count = tl.load(matrix + _TALL), tl.load(matrix + _P).to(tl.int32)
        scales, size = _scales(addresses, matrix, _U, _U_OFFSET), tl.load(matrix + _U_SIZE)
        shared = tl.load(matrix + _TALL_GIVEN)
    else:
        begin, count = tl.load(matrix + _WIDE), tl.load(matrix + _Q).to(tl.int32)
        scales, size = _scales(addresses, matrix, _V, _V_OFFSET), tl.load(matrix + _V_SIZE)
        shared = tl.load(matrix + _WIDE_GIVEN)
    at = block.to(tl.int64) * _BLOCK - begin + tl.arange(0, _BLOCK)
    cols = tl.arange(0, K)
    inside = at < count
    scale = tl.load(scales + at, mask=inside, other=0.0) * tl.load(sizes + size)
    if SHARED:
        source = shared + at
    else:
        source = begin + at
    x = tl.load(
        given + source[:, None] * width + cols[None, :],
        mask=inside[:, None] & (cols < width)[None, :],
        other=0.0,
    )
    _fold(x.to(tl.float32), scale, folded, begin + at, K, PARTS)


@triton.jit
def _load(folded, at, PARTS: tl.constexpr, K: tl.constexpr):
    return tl.load(folded + at[:, None] * (PARTS * K) + tl.arange(0, K)[None, :])


@triton.jit
def _dot(g, folded, at, K: tl.constexpr, PARTS: tl.constexpr, DOWN: tl.constexpr):
    """Return ``g`` or its transpose times vectors, the smallest parts first."""
    high = _load(folded, at, PARTS, K)
    if PARTS == 3:
        low, middle = _load(folded + 2 * K, at, PARTS, K), _load(folded + K, at, PARTS, K)
        if INTERPRETED:  # it would multiply the bits as whole numbers
            g, low = g.to(tl.float32), low.to(tl.float32)
            middle, high = middle.to(tl.float32), high.to(tl.float32)
        if DOWN:
            g = g.T
        total = tl.dot(g, high, tl.dot(g, middle, tl.dot(g, low)))
    else:
        x = g.to(tl.float32)
        if PARTS == 2:
            low = _load(folded + K, at, PARTS, K)
            x = upper_bits(x)
            if DOWN:  # a tensor core takes the transpose of narrower numbers alone
                total = tl.dot(low.T, x, input_precision="tf32")
            else:
                total = tl.dot(x, low, input_precision="tf32")
            if g.dtype == tl.float32:
                rest = g - x
                if INTERPRETED:
                    rest = cut_bits(rest)
                if DOWN:
                    total = tl.dot(high.T, rest, total, input_precision="tf32")
                else:
                    total = tl.dot(rest, high, total, input_precision="tf32")
            if DOWN:
                total = tl.dot(high.T, x, total, input_precision="tf32")
            else:
                total = tl.dot(x, high, total, input_precision="tf32")
        else:
            if DOWN:
                total = tl.dot(high.T, x, input_precision="ieee")
            else:
                total = tl.dot(x, high, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["first", "one"])
def along(
    addresses,
    matrices,
    owners,  # the matrix of each block of tall vectors
    sizes,
    folded,  # wide vectors
    result,  # float32, K entries a row
    folded_result,
    squares,  # float32, of the rows of X
    first,  # block
    one,
    DTYPE: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,  # 3 of a bfloat16 gradient; 2 where products are of tf32, else 1
    SQUARES: tl.constexpr,
    FOLD: tl.constexpr,  # whether the result is folded for the other product
    VECTOR: tl.constexpr,
):
    """Find X @ wide of a block of rows in memory."""
    row = first.to(tl.int64) * _BLOCK + tl.program_id(0) * _ROWS
    matrix = matrices + tl.load(owners + row // _BLOCK) * _MATRIX
    tall = tl.multiple_of(tl.load(matrix + _TALL), _BLOCK)
    wide = tl.multiple_of(tl.load(matrix + _WIDE), _BLOCK)
    P, Q = tl.load(matrix + _P).to(tl.int32), row_length(matrix + _Q, VECTOR)
    address = addresses + tl.load(matrix + _GRAD)
    grad, ld = matrix_at(address, matrix + _OFFSET, matrix + _LD, DTYPE, VECTOR)
    rows = (row - tall).to(tl.int32) + tl.arange(0, _ROWS)
    u = tl.load(_scales(addresses, matrix, _U, _U_OFFSET) + rows, mask=rows < P, other=0.0)
    u = u * tl.load(sizes + tl.load(matrix + _U_SIZE))
    v = _scales(addresses, matrix, _V, _V_OFFSET)
    v_size = tl.load(sizes + tl.load(matrix + _V_SIZE))
    total = tl.full((_ROWS, K), 0.0, tl.float32)
    square = tl.full((_ROWS, BN // VECTOR), 0.0, tl.float32)  # a thread's own, of each load
    folded += wide * (PARTS * K)
    lines = grad + (rows.to(tl.int64) * ld)[:, None]
    for start in range(0, Q, BN):
        cols = start + tl.arange(0, BN)
        inside = cols < Q
        g = tl.load(lines + cols[None, :], mask=(rows < P)[:, None] & inside[None, :], other=0.0)
        # Times one, or the compiler would have a tensor core add to the total, and that cuts bits.
        total += _dot(g, folded, cols, K, PARTS, False) * one
        if SQUARES:
            y = (g.to(tl.float32) * u[:, None]) * (
                tl.load(v + cols, mask=inside, other=0.0) * v_size
            )[None, :]
            square += add_up(tl.reshape(y * y, (_ROWS, BN // VECTOR, VECTOR)), 2)
    total = total * u[:, None]
    _store(result, tall + rows, total, 1, K)
    if SQUARES:
        tl.store(squares + tall + rows, add_up(square, 1))
    if FOLD:
        _fold(total, u, folded_result, tall + rows, K, PARTS)


@triton.jit(do_not_specialize=["first", "one"])
def down(
    addresses,
    matrices,
    owners,  # the matrix of each block of wide vectors
    sizes,
    folded,  # tall vectors
    result,
    folded_result,
    squares,  # of the columns in memory of X
    first,
    one,
    DTYPE: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    PARTS: tl.constexpr,  # 3 of a bfloat16 gradient; 2 where products are of tf32, else 1
    SQUARES: tl.constexpr,
    FOLD: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Find X.T @ tall of a block of columns in memory."""
    row = first.to(tl.int64) * _BLOCK + tl.program_id(0) * _ROWS
    matrix = matrices + tl.load(owners + row // _BLOCK) * _MATRIX
    tall = tl.multiple_of(tl.load(matrix + _TALL), _BLOCK)
    wide = tl.multiple_of(tl.load(matrix + _WIDE), _BLOCK)
    P, Q = tl.load(matrix + _P).to(tl.int32), row_length(matrix + _Q, VECTOR)
    address = addresses + tl.load(matrix + _GRAD)
    grad, ld = matrix_at(address, matrix + _OFFSET, matrix + _LD, DTYPE, VECTOR)
    cols = tl.multiple_of((row - wide).to(tl.int32), _ROWS) + tl.arange(0, _ROWS)
    v = tl.load(_scales(addresses, matrix, _V, _V_OFFSET) + cols, mask=cols < Q, other=0.0)
    v = v * tl.load(sizes + tl.load(matrix + _V_SIZE))
    u = _scales(addresses, matrix, _U, _U_OFFSET)
    u_size = tl.load(sizes + tl.load(matrix + _U_SIZE))
    if PARTS == 3:
        total = tl.full((_ROWS, K), 0.0, tl.float32)
    else:
        total = tl.full((K, _ROWS), 0.0, tl.float32)
    square = tl.full((_APART, _ROWS), 0.0, tl.float32)
    folded += tall * (PARTS * K)
    lines = grad + cols[None, :] + (tl.arange(0, BM).to(tl.int64) * ld)[:, None]
    for line in range(0, P, BM):
        rows = line + tl.arange(0, BM)
        inside = rows < P
        g = tl.load(lines, mask=inside[:, None] & (cols < Q)[None, :], other=0.0)
        lines += BM * ld
        total += _dot(g, folded, rows, K, PARTS, True) * one
        if SQUARES:
            y = g.to(tl.float32) * (tl.load(u + rows, mask=inside, other=0.0) * u_size)[:, None]
            y = y * v[None, :]
            square += add_up(tl.reshape(y * y, (BM // _APART, _APART, _ROWS)), 0)
    if PARTS != 3:
        total = total.T
    total = total * v[:, None]
    _store(result, wide + cols, total, 1, K)
    if SQUARES:
        tl.store(squares + wide + cols, add_up(square, 0))
    if FOLD:
        _fold(total, v, folded_result, wide + cols, K, PARTS)
