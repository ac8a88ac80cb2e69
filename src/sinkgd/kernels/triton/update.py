"""The kernels that write parameters: each entry is read, changed and rounded once.

Letters: as in `sinkgd.kernels.triton.tables` and `sinkgd.kernels.triton.schedule`, and
    w, g: entries of a parameter and of its gradient
    y: the update, u * g * v
"""

import triton
import triton.language as tl

from sinkgd.kernels.triton.full_iteration import find_u, program_and_matrix
from sinkgd.kernels.triton.primitives import (
    INTERPRETED,
    LARGEST,
    dot_float32,
    field,
    load_tile,
    matrix_at,
    row_length,
)
from sinkgd.kernels.triton.tables import (
    GIVEN,
    DescentMatrix,
    RowProgram,
    TileProgram,
    UpdateAddresses,
    UpdateMatrix,
)

_PROGRAM = tl.constexpr(len(TileProgram._fields))
_LINE, _FIRST = field(TileProgram, "line"), field(TileProgram, "first")

_MATRIX = tl.constexpr(len(UpdateMatrix._fields))
_TENSOR, _OFFSET = field(UpdateMatrix, "tensor"), field(UpdateMatrix, "offset")
_GRAD_OFFSET, _GRAD_LD = field(UpdateMatrix, "grad_offset"), field(UpdateMatrix, "grad_ld")
_P, _Q, _LD = field(UpdateMatrix, "P"), field(UpdateMatrix, "Q"), field(UpdateMatrix, "ld")
_U, _V, _ENTRY = field(UpdateMatrix, "u"), field(UpdateMatrix, "v"), field(UpdateMatrix, "entry")
_RANK, _FACTOR = field(UpdateMatrix, "rank"), field(UpdateMatrix, "factor")
_TALL, _TALL_LD = field(UpdateMatrix, "tall"), field(UpdateMatrix, "tall_ld")
_WIDE, _WIDE_LD = field(UpdateMatrix, "wide"), field(UpdateMatrix, "wide_ld")
_TALL_COL_STEP = field(UpdateMatrix, "tall_col_step")
_WIDE_COL_STEP = field(UpdateMatrix, "wide_col_step")

_ADDRESSES = tl.constexpr(len(UpdateAddresses._fields))
_A_GRAD = field(UpdateAddresses, "grad")
_A_U, _A_V = field(UpdateAddresses, "u"), field(UpdateAddresses, "v")
_A_ALLOWED, _A_KEY = field(UpdateAddresses, "allowed"), field(UpdateAddresses, "key")
_A_FACTOR = field(UpdateAddresses, "factor")
_A_TALL, _A_WIDE = field(UpdateAddresses, "tall"), field(UpdateAddresses, "wide")


@triton.jit(do_not_specialize=["keep", "step"])
def update(
    addresses,
    matrices,
    programs,
    keep,
    step,
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KEEP_IS_STORED: tl.constexpr,  # whether keep is a pointer
    STEP_IS_STORED: tl.constexpr,
    ROUND: tl.constexpr,  # bfloat16 is rounded stochastically
    CAUTIOUS: tl.constexpr,  # keep applies only to entries that move toward zero
    VECTOR: tl.constexpr,  # the narrower type's entries in 16 bytes if loads are that wide, else 1
    K: tl.constexpr,  # at least the rank of the matrix that is subtracted; 0 if there is none
    DENSE: tl.constexpr,  # whether its sides have dense rows of K, aligned to 16 bytes
    TF32: tl.constexpr,  # whether a product of float32 is computed as three products of tf32
):
    """Set a tile of a parameter to ``keep * param + step * y``, rounded once, if this is allowed.

    If K > 0, y is u * grad * v times a factor, less a matrix of low rank.
    """
    program = programs + tl.program_id(0) * _PROGRAM
    matrix = matrices + tl.load(program) * _MATRIX
    rows = tl.load(program + _LINE).to(tl.int32) * BM + tl.arange(0, BM)
    cols = tl.load(program + _FIRST).to(tl.int32) * BN + tl.arange(0, BN)
    own = addresses + tl.load(matrix + _TENSOR) * _ADDRESSES
    allowed = tl.load(own + _A_ALLOWED)
    if tl.load(allowed.to(tl.pointer_type(tl.int8)), mask=allowed != 0, other=1) == 0:
        return
    P = tl.load(matrix + _P).to(tl.int32)
    Q = row_length(matrix + _Q, VECTOR)
    param, ld = matrix_at(own, matrix + _OFFSET, matrix + _LD, DTYPE, VECTOR)
    grad, grad_ld = matrix_at(
        own + _A_GRAD, matrix + _GRAD_OFFSET, matrix + _GRAD_LD, GRAD_DTYPE, VECTOR
    )
    inside = (rows < P)[:, None] & (cols < Q)[None, :]
    g = load_tile(grad, grad_ld, rows, cols, inside)
    u = tl.load(own + _A_U).to(tl.pointer_type(tl.float32)) + tl.load(matrix + _U)
    v = tl.load(own + _A_V).to(tl.pointer_type(tl.float32)) + tl.load(matrix + _V)
    y = g * tl.load(u + rows, mask=rows < P, other=0.0)[:, None]
    y = y * tl.load(v + cols, mask=cols < Q, other=0.0)[None, :]
    if K > 0:
        y = _less_low_rank(y, own, matrix, rows, cols, P, Q, K, DENSE, TF32)
    if KEEP_IS_STORED:
        keep = tl.load(keep).to(tl.float32)
    if STEP_IS_STORED:
        step = tl.load(step).to(tl.float32)
    key = tl.full((), 0, tl.int64)
    if ROUND and tl.bfloat16 == DTYPE:
        key = tl.load(tl.load(own + _A_KEY).to(tl.pointer_type(tl.int64)))
    write_tile(
        param, ld, rows, cols, inside, y, keep, step, matrix + _ENTRY, key, DTYPE, ROUND, CAUTIOUS
    )


_D_GIVEN = tl.constexpr(GIVEN)
_D_TENSOR, _D_OFFSET = field(DescentMatrix, "tensor"), field(DescentMatrix, "offset")
_D_Q, _D_LD = field(DescentMatrix, "Q"), field(DescentMatrix, "ld")
_D_U, _D_V = field(DescentMatrix, "u"), field(DescentMatrix, "v")
_D_PARAM_OFFSET = field(DescentMatrix, "param_offset")
_D_PARAM_LD = field(DescentMatrix, "param_ld")
_D_NONFINITE, _D_ENTRY = field(DescentMatrix, "nonfinite"), field(DescentMatrix, "entry")
_R_FIRST, _R_END = field(RowProgram, "first"), field(RowProgram, "end")


@triton.jit(do_not_specialize=["keep", "step", "matrices", "programs", "count", "flip"])
def finish(
    grads,  # addresses
    weights,  # addresses of parameters; not called params, a name that the dispatcher uses
    keys,
    overflow,  # pointer to a bool that forbids all writing; not read unless OVERFLOW
    table,
    scales,
    counters,
    keep,
    step,
    matrices,
    programs,
    count,
    flip,
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    BM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    U_FROM: tl.constexpr,
    WRITE: tl.constexpr,
    OVERFLOW: tl.constexpr,
    KEEP_IS_STORED: tl.constexpr,  # whether keep is a pointer
    STEP_IS_STORED: tl.constexpr,
    ROUND: tl.constexpr,  # bfloat16 is rounded stochastically
    CAUTIOUS: tl.constexpr,  # keep applies only to entries that move toward zero
    VECTOR: tl.constexpr,  # the narrower type's entries in 16 bytes if loads are that wide, else 1
):
    """Find u from v unless it is known; if WRITE, set ``param`` to ``keep * param + step * y``.

    Parameters are left unchanged if a gradient of their owner is not finite, or on overflow.
    """
    program, matrix = program_and_matrix(table, matrices, programs, count, flip)
    may = WRITE
    if WRITE:
        may = tl.load(counters + tl.load(matrix + _D_NONFINITE)) == 0
        if OVERFLOW:
            may = may & (tl.load(overflow.to(tl.pointer_type(tl.int8))) == 0)
        if U_FROM == _D_GIVEN:
            if not may:
                return
    first = tl.load(program + _R_FIRST).to(tl.int32)
    end = tl.load(program + _R_END).to(tl.int32)
    Q = row_length(matrix + _D_Q, VECTOR)
    tensor = tl.load(matrix + _D_TENSOR)
    grad, ld = matrix_at(grads + tensor, matrix + _D_OFFSET, matrix + _D_LD, GRAD_DTYPE, VECTOR)
    param, param_ld = matrix_at(
        weights + tensor, matrix + _D_PARAM_OFFSET, matrix + _D_PARAM_LD, DTYPE, VECTOR
    )
    u = scales + tl.load(matrix + _D_U)
    v = scales + tl.load(matrix + _D_V)
    colsA = tl.arange(0, A)
    colsB = A + tl.arange(0, B if B > 0 else A)
    vA = tl.load(v + colsA, mask=colsA < Q, other=0.0)
    vB = vA
    if B > 0:
        vB = tl.load(v + colsB, mask=colsB < Q, other=0.0)
    if WRITE and KEEP_IS_STORED:
        keep = tl.load(keep).to(tl.float32)
    if WRITE and STEP_IS_STORED:
        step = tl.load(step).to(tl.float32)
    key = tl.full((), 0, tl.int64)
    if ROUND:
        key = tl.load(tl.load(keys + tensor).to(tl.pointer_type(tl.int64)))
    for panel in range(first, end, BM):
        rows = panel + tl.arange(0, BM)
        valid = rows < end
        gA = load_tile(grad, ld, rows, colsA, valid[:, None] & (colsA < Q)[None, :])
        if B > 0:
            gB = load_tile(grad, ld, rows, colsB, valid[:, None] & (colsB < Q)[None, :])
        else:
            gB = gA
        if U_FROM == _D_GIVEN:
            found = tl.load(u + rows, mask=valid, other=0.0)
        else:
            found, _, _, _, _ = find_u(
                u, rows, valid, gA, gB, vA, vB, Q.to(tl.float32), B, U_FROM, False
            )
            tl.debug_barrier()  # as in `full_iteration`
            tl.store(u + rows, found, mask=valid)
        if WRITE:
            written = rows < tl.where(may, end, 0)
            inside = written[:, None] & (colsA < Q)[None, :]
            y = (gA * found[:, None]) * vA[None, :]
            write_tile(
                param, param_ld, rows, colsA, inside, y, keep, step, matrix + _D_ENTRY, key,
                DTYPE, ROUND, CAUTIOUS,
            )  # fmt: skip
            if B > 0:
                inside = written[:, None] & (colsB < Q)[None, :]
                y = (gB * found[:, None]) * vB[None, :]
                write_tile(
                    param, param_ld, rows, colsB, inside, y, keep, step, matrix + _D_ENTRY, key,
                    DTYPE, ROUND, CAUTIOUS,
                )  # fmt: skip


@triton.jit
def _random_word(index, key):
    """Return the hash of `sinkgd.kernels.rounding`, uint32; its upper half has the random bits."""
    word = (index + key.to(tl.uint32)) ^ (key >> 32).to(tl.uint32)
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def _rounded(w, index, key, DTYPE: tl.constexpr, ROUND: tl.constexpr):
    """Return float32 numbers in ``DTYPE``: the nearest, or bfloat16 rounded at random."""
    if (ROUND or INTERPRETED) and tl.bfloat16 == DTYPE:  # the interpreter would cut bits off
        bits = w.to(tl.uint32, bitcast=True)
        if ROUND:
            added = _random_word(index, key) >> 16
        else:
            added = 0x7FFF + ((bits >> 16) & 1)  # to the nearest, ties to even
        kept = tl.where(w == w, bits, 0x7FC00000)
        bits = tl.where(tl.abs(w) <= LARGEST, bits + added, kept)
        return (bits >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    else:  # noqa: RET505 - triton compiles one of two branches
        return w.to(DTYPE)


@triton.jit
def write_tile(
    param, ld, rows, cols, inside, y, keep, step, entry_fields, key,
    DTYPE: tl.constexpr, ROUND: tl.constexpr, CAUTIOUS: tl.constexpr,
):  # fmt: skip
    """Set a tile of a parameter to ``keep * param + step * y``, rounded once.

    ``entry_fields`` points to entry, entry_row_step and entry_col_step in a table.
    """
    pointers = param + (rows.to(tl.int64) * ld)[:, None] + cols[None, :]
    w = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if CAUTIOUS:
        moved = y * step
        keep = tl.where(((moved > 0) == (w < 0)) & (moved != 0), keep, 1.0)
    w = w * keep + y * step
    index = rows[:, None] * 0 + cols[None, :] * 0
    if ROUND and tl.bfloat16 == DTYPE:
        index = tl.load(entry_fields).to(tl.uint32)
        index = index + (rows.to(tl.uint32) * tl.load(entry_fields + 1).to(tl.uint32))[:, None]
        index = index + (cols.to(tl.uint32) * tl.load(entry_fields + 2).to(tl.uint32))[None, :]
    tl.store(pointers, _rounded(w, index, key, DTYPE, ROUND), mask=inside)


@triton.jit
def _side(
    address, offset, ld, col_step, index, length, rank, K: tl.constexpr, DENSE: tl.constexpr
):  # fmt: skip
    """Return one side of a matrix of low rank; zeros follow beyond its own columns."""
    k = tl.arange(0, K)
    if DENSE:
        entries, stride = matrix_at(address, offset, ld, tl.float32, 4)
        pointers = entries + index.to(tl.int64)[:, None] * stride + k[None, :]
        return tl.load(pointers, mask=(index < length)[:, None], other=0.0)
    else:  # noqa: RET505 - triton compiles one of two branches
        entries, stride = matrix_at(address, offset, ld, tl.float32, 1)
        pointers = entries + index.to(tl.int64)[:, None] * stride + (k * tl.load(col_step))[None, :]
        return tl.load(pointers, mask=(index < length)[:, None] & (k < rank)[None, :], other=0.0)


@triton.jit
def _less_low_rank(
    y, own, matrix, rows, cols, P, Q,
    K: tl.constexpr, DENSE: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Return an update times its factor, less tall @ wide.T."""
    factor = tl.load(own + _A_FACTOR)
    at = factor.to(tl.pointer_type(tl.float32)) + tl.load(matrix + _FACTOR)
    y = y * tl.load(at, mask=factor != 0, other=1.0)
    rank = tl.load(matrix + _RANK)
    tall = _side(
        own + _A_TALL, matrix + _TALL, matrix + _TALL_LD, matrix + _TALL_COL_STEP,
        rows, P, rank, K, DENSE,
    )  # fmt: skip
    wide = _side(
        own + _A_WIDE, matrix + _WIDE, matrix + _WIDE_LD, matrix + _WIDE_COL_STEP,
        cols, Q, rank, K, DENSE,
    )  # fmt: skip
    return y - dot_float32(tall, wide.T, TF32)
