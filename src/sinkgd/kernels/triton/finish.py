"""The last launch of a descent: it finds u where that is not known, and writes the parameter.

Letters: those of `sinkgd.kernels.triton.sweep`.
"""

import triton
import triton.language as tl

from sinkgd.kernels.triton.fields import GIVEN, Block, Walk
from sinkgd.kernels.triton.primitives import field, load_tile, matrix_at, row_length
from sinkgd.kernels.triton.step import write_tile
from sinkgd.kernels.triton.sweep import find_u, walk_and_block

_GIVEN = tl.constexpr(GIVEN)
_TENSOR, _OFFSET = field(Block, "tensor"), field(Block, "offset")
_Q, _LD = field(Block, "Q"), field(Block, "ld")
_U, _V, _BAD = field(Block, "u"), field(Block, "v"), field(Block, "bad")
_PARAM_OFFSET, _PARAM_LD = field(Block, "param_offset"), field(Block, "param_ld")
_PLACE = field(Block, "place")
_FIRST, _BEYOND = field(Walk, "first"), field(Walk, "beyond")


@triton.jit(do_not_specialize=["blocks", "walks", "count", "flip", "keep", "step"])
def finish(
    grads,  # addresses
    weights,  # addresses of parameters; triton's dispatcher has a variable called params
    keys,
    overflow,  # a bool that forbids all writing, or another pointer
    table,
    scales,
    numbers,
    blocks,
    walks,
    count,
    flip,
    keep,
    step,
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    BM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    U_FROM: tl.constexpr,
    WRITE: tl.constexpr,
    OVERFLOW: tl.constexpr,
    KEEP_IS_STORED: tl.constexpr,  # keep is a pointer to it
    STEP_IS_STORED: tl.constexpr,
    ROUND: tl.constexpr,  # bfloat16 is rounded stochastically
    VECTOR: tl.constexpr,  # as for sweep, of the parameter and the gradient
):
    """Find u from v unless it is known, and write ``keep * param + step * u * grad * v``."""
    walk, block = walk_and_block(table, blocks, walks, count, flip)
    may = WRITE
    if WRITE:
        may = tl.load(numbers + tl.load(block + _BAD)) == 0
        if OVERFLOW:
            may = may & (tl.load(overflow.to(tl.pointer_type(tl.int8))) == 0)
        if U_FROM == _GIVEN:
            if not may:
                return
    first = tl.load(walk + _FIRST).to(tl.int32)
    beyond = tl.load(walk + _BEYOND).to(tl.int32)
    Q = row_length(block + _Q, VECTOR)
    tensor = tl.load(block + _TENSOR)
    grad, ld = matrix_at(grads + tensor, block + _OFFSET, block + _LD, GRAD_DTYPE, VECTOR)
    param, param_ld = matrix_at(
        weights + tensor, block + _PARAM_OFFSET, block + _PARAM_LD, DTYPE, VECTOR
    )
    u = scales + tl.load(block + _U)
    v = scales + tl.load(block + _V)
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
    for panel in range(first, beyond, BM):
        rows = panel + tl.arange(0, BM)
        valid = rows < beyond
        gA = load_tile(grad, ld, rows, colsA, valid[:, None] & (colsA < Q)[None, :])
        if B > 0:
            gB = load_tile(grad, ld, rows, colsB, valid[:, None] & (colsB < Q)[None, :])
        else:
            gB = gA
        if U_FROM == _GIVEN:
            found = tl.load(u + rows, mask=valid, other=0.0)
        else:
            found, _, _, _, _ = find_u(
                u, rows, valid, gA, gB, vA, vB, Q.to(tl.float32), B, U_FROM, False
            )
            tl.debug_barrier()  # as in `sweep`
            tl.store(u + rows, found, mask=valid)
        if WRITE:
            written = rows < tl.where(may, beyond, 0)
            inside = written[:, None] & (colsA < Q)[None, :]
            y = (gA * found[:, None]) * vA[None, :]
            write_tile(
                param, param_ld, rows, colsA, inside, y, keep, step, block + _PLACE, key,
                DTYPE, ROUND,
            )  # fmt: skip
            if B > 0:
                inside = written[:, None] & (colsB < Q)[None, :]
                y = (gB * found[:, None]) * vB[None, :]
                write_tile(
                    param, param_ld, rows, colsB, inside, y, keep, step, block + _PLACE, key,
                    DTYPE, ROUND,
                )  # fmt: skip
