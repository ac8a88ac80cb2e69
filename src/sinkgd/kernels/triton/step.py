"""The kernel of the update: many parameters at once, each entry read, changed and rounded once.

Letters: those of `sinkgd.kernels.triton.fields`, and
    w, g: entries of a parameter and of its gradient
    y: the update, u * g * v
"""

import triton
import triton.language as tl

from sinkgd.kernels.triton.fields import Addresses, Program, Target
from sinkgd.kernels.triton.primitives import (
    INTERPRETED,
    LARGEST,
    field,
    load_tile,
    matrix_at,
    product,
    row_length,
)

_PROGRAM_FIELDS = tl.constexpr(len(Program._fields))
_LINE, _FIRST = field(Program, "line"), field(Program, "first")

_TARGET = tl.constexpr(len(Target._fields))
_T_OWNER, _T_OFFSET = field(Target, "owner"), field(Target, "offset")
_T_GRAD_OFFSET, _T_GRAD_LD = field(Target, "grad_offset"), field(Target, "grad_ld")
_T_P, _T_Q, _T_LD = field(Target, "P"), field(Target, "Q"), field(Target, "ld")
_T_U, _T_V, _T_PLACE = field(Target, "u"), field(Target, "v"), field(Target, "place")
_T_RANK, _T_FACTOR = field(Target, "rank"), field(Target, "factor")
_T_TALL, _T_TALL_LD = field(Target, "tall"), field(Target, "tall_ld")
_T_WIDE, _T_WIDE_LD = field(Target, "wide"), field(Target, "wide_ld")
_T_TALL_APART, _T_WIDE_APART = field(Target, "tall_apart"), field(Target, "wide_apart")

_ADDRESSES = tl.constexpr(len(Addresses._fields))
_A_GRAD, _A_U, _A_V = field(Addresses, "grad"), field(Addresses, "u"), field(Addresses, "v")
_A_ALLOWED, _A_KEY = field(Addresses, "allowed"), field(Addresses, "key")
_A_FACTOR = field(Addresses, "factor")
_A_TALL, _A_WIDE = field(Addresses, "tall"), field(Addresses, "wide")


@triton.jit
def _random_word(place, key):
    """The bits of `sinkgd.kernels.rounding`, uint32."""
    word = (place + key.to(tl.uint32)) ^ (key >> 32).to(tl.uint32)
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def _rounded(w, place, key, DTYPE: tl.constexpr, ROUND: tl.constexpr):
    """Return float32 numbers in ``DTYPE``: to the nearest, or bfloat16 at random by their place."""
    if tl.bfloat16 == DTYPE and (ROUND or INTERPRETED):  # the interpreter would cut bits off
        bits = w.to(tl.uint32, bitcast=True)
        if ROUND:
            added = _random_word(place, key) >> 16
        else:
            added = 0x7FFF + ((bits >> 16) & 1)  # to the nearest, ties to even
        kept = tl.where(w == w, bits, 0x7FC00000)
        bits = tl.where(tl.abs(w) <= LARGEST, bits + added, kept)
        return (bits >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    else:  # noqa: RET505 - triton compiles one of two branches
        return w.to(DTYPE)


@triton.jit
def write_tile(
    param, ld, rows, cols, inside, y, keep, step, places, key,
    DTYPE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Set a tile of a parameter to ``keep * param + step * y``, rounded once.

    ``places`` points to the parameter's place, row_place and col_place in a table.
    """
    lies = param + (rows.to(tl.int64) * ld)[:, None] + cols[None, :]
    w = tl.load(lies, mask=inside, other=0.0).to(tl.float32)
    w = w * keep + y * step
    place = rows[:, None] * 0 + cols[None, :] * 0
    if tl.bfloat16 == DTYPE and ROUND:
        place = tl.load(places).to(tl.uint32)
        place = place + (rows.to(tl.uint32) * tl.load(places + 1).to(tl.uint32))[:, None]
        place = place + (cols.to(tl.uint32) * tl.load(places + 2).to(tl.uint32))[None, :]
    tl.store(lies, _rounded(w, place, key, DTYPE, ROUND), mask=inside)


@triton.jit
def _side(
    address, offset, ld, apart, index, length, rank, K: tl.constexpr, DENSE: tl.constexpr
):  # fmt: skip
    """Return one side of a matrix of low rank; zeros follow its own numbers."""
    k = tl.arange(0, K)
    if DENSE:
        numbers, distance = matrix_at(address, offset, ld, tl.float32, 4)
        lies = numbers + index.to(tl.int64)[:, None] * distance + k[None, :]
        return tl.load(lies, mask=(index < length)[:, None], other=0.0)
    else:  # noqa: RET505 - triton compiles one of two branches
        numbers, distance = matrix_at(address, offset, ld, tl.float32, 1)
        lies = numbers + index.to(tl.int64)[:, None] * distance + (k * tl.load(apart))[None, :]
        return tl.load(lies, mask=(index < length)[:, None] & (k < rank)[None, :], other=0.0)


@triton.jit
def _lowered(
    y, own, entry, rows, cols, P, Q,
    K: tl.constexpr, DENSE: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Return an update times its factor, less what is taken from it."""
    factor = tl.load(own + _A_FACTOR)
    at = factor.to(tl.pointer_type(tl.float32)) + tl.load(entry + _T_FACTOR)
    y = y * tl.load(at, mask=factor != 0, other=1.0)
    rank = tl.load(entry + _T_RANK)
    tall = _side(
        own + _A_TALL, entry + _T_TALL, entry + _T_TALL_LD, entry + _T_TALL_APART,
        rows, P, rank, K, DENSE,
    )  # fmt: skip
    wide = _side(
        own + _A_WIDE, entry + _T_WIDE, entry + _T_WIDE_LD, entry + _T_WIDE_APART,
        cols, Q, rank, K, DENSE,
    )  # fmt: skip
    return y - product(tall, wide.T, TF32)


@triton.jit(do_not_specialize=["keep", "step"])
def update(
    addresses,
    targets,
    programs,
    keep,
    step,
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KEEP_IS_STORED: tl.constexpr,  # keep is a pointer to it
    STEP_IS_STORED: tl.constexpr,
    ROUND: tl.constexpr,  # bfloat16 is rounded stochastically
    VECTOR: tl.constexpr,  # as for half_iteration, of the parameter and the gradient
    K: tl.constexpr,  # at least the rank of what is subtracted from u * grad * v; 0 where nothing
    DENSE: tl.constexpr,  # whether its sides lie in rows of K, to 16 bytes
    TF32: tl.constexpr,  # whether the device multiplies matrices of tf32 alone
):
    """Set a tile of a parameter to ``keep * param + step * u * grad * v``, rounded once."""
    program = programs + tl.program_id(0) * _PROGRAM_FIELDS
    entry = targets + tl.load(program) * _TARGET
    rows = tl.load(program + _LINE).to(tl.int32) * BM + tl.arange(0, BM)
    cols = tl.load(program + _FIRST).to(tl.int32) * BN + tl.arange(0, BN)
    own = addresses + tl.load(entry + _T_OWNER) * _ADDRESSES
    allowed = tl.load(own + _A_ALLOWED)
    if tl.load(allowed.to(tl.pointer_type(tl.int8)), mask=allowed != 0, other=1) == 0:
        return
    P = tl.load(entry + _T_P).to(tl.int32)
    Q = row_length(entry + _T_Q, VECTOR)
    param, ld = matrix_at(own, entry + _T_OFFSET, entry + _T_LD, DTYPE, VECTOR)
    grad, grad_ld = matrix_at(
        own + _A_GRAD, entry + _T_GRAD_OFFSET, entry + _T_GRAD_LD, GRAD_DTYPE, VECTOR
    )
    inside = (rows < P)[:, None] & (cols < Q)[None, :]
    g = load_tile(grad, grad_ld, rows, cols, inside)
    u = tl.load(own + _A_U).to(tl.pointer_type(tl.float32)) + tl.load(entry + _T_U)
    v = tl.load(own + _A_V).to(tl.pointer_type(tl.float32)) + tl.load(entry + _T_V)
    y = g * tl.load(u + rows, mask=rows < P, other=0.0)[:, None]
    y = y * tl.load(v + cols, mask=cols < Q, other=0.0)[None, :]
    if K > 0:
        y = _lowered(y, own, entry, rows, cols, P, Q, K, DENSE, TF32)
    if KEEP_IS_STORED:
        keep = tl.load(keep).to(tl.float32)
    if STEP_IS_STORED:
        step = tl.load(step).to(tl.float32)
    key = tl.full((), 0, tl.int64)
    if tl.bfloat16 == DTYPE and ROUND:
        key = tl.load(tl.load(own + _A_KEY).to(tl.pointer_type(tl.int64)))
    write_tile(param, ld, rows, cols, inside, y, keep, step, entry + _T_PLACE, key, DTYPE, ROUND)
