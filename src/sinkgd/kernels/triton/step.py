"""The kernel of the update: many parameters at once, each entry read, changed and rounded once.

Letters: those of `sinkgd.kernels.triton.fields`, and
    w, g: entries of a parameter and of its gradient
    y: the update, u * g * v
"""

import triton
import triton.language as tl

from sinkgd.kernels.triton.fields import Addresses, Program, Target
from sinkgd.kernels.triton.loops import INTERPRETED, LARGEST, field

_PROGRAM_FIELDS = tl.constexpr(len(Program._fields))
_LINE, _FIRST = field(Program, "line"), field(Program, "first")

_TARGET = tl.constexpr(len(Target._fields))
_T_OWNER, _T_OFFSET = field(Target, "owner"), field(Target, "offset")
_T_GRAD_OFFSET, _T_GRAD_LD = field(Target, "grad_offset"), field(Target, "grad_ld")
_T_P, _T_Q, _T_LD = field(Target, "P"), field(Target, "Q"), field(Target, "ld")
_T_U, _T_V, _T_PLACE = field(Target, "u"), field(Target, "v"), field(Target, "place")
_T_ROW_PLACE, _T_COL_PLACE = field(Target, "row_place"), field(Target, "col_place")

_ADDRESSES = tl.constexpr(len(Addresses._fields))
_A_GRAD, _A_U, _A_V = field(Addresses, "grad"), field(Addresses, "u"), field(Addresses, "v")
_INTERPRETED = tl.constexpr(INTERPRETED)
_A_ALLOWED, _A_KEY = field(Addresses, "allowed"), field(Addresses, "key")


@triton.jit
def _random_word(place, key):
    """The bits of `sinkgd.kernels.rounding`, uint32."""
    word = (place + key.to(tl.uint32)) ^ (key >> 32).to(tl.uint32)
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def rounded(w, place, key, DTYPE: tl.constexpr, ROUND: tl.constexpr):
    """Return float32 numbers in ``DTYPE``: to the nearest, or bfloat16 at random by their place."""
    if tl.bfloat16 == DTYPE and (ROUND or _INTERPRETED):  # the interpreter would cut bits off
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
    Q = tl.load(entry + _T_Q).to(tl.int32)
    ld, grad_ld = tl.load(entry + _T_LD), tl.load(entry + _T_GRAD_LD)
    param = tl.load(own).to(tl.pointer_type(DTYPE))
    grad = tl.load(own + _A_GRAD).to(tl.pointer_type(GRAD_DTYPE))
    offset, grad_offset = tl.load(entry + _T_OFFSET), tl.load(entry + _T_GRAD_OFFSET)
    if VECTOR > 1:
        Q = tl.multiple_of(Q, VECTOR)
        ld, grad_ld = tl.multiple_of(ld, VECTOR), tl.multiple_of(grad_ld, VECTOR)
        param, grad = tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
        offset = tl.multiple_of(offset, VECTOR)
        grad_offset = tl.multiple_of(grad_offset, VECTOR)
    inside = (rows < P)[:, None] & (cols < Q)[None, :]
    param = param + offset + (rows.to(tl.int64) * ld)[:, None] + cols[None, :]
    grad = grad + grad_offset + (rows.to(tl.int64) * grad_ld)[:, None] + cols[None, :]
    g = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(param, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(own + _A_U).to(tl.pointer_type(tl.float32)) + tl.load(entry + _T_U)
    v = tl.load(own + _A_V).to(tl.pointer_type(tl.float32)) + tl.load(entry + _T_V)
    y = g * tl.load(u + rows, mask=rows < P, other=0.0)[:, None]
    y = y * tl.load(v + cols, mask=cols < Q, other=0.0)[None, :]
    if KEEP_IS_STORED:
        keep = tl.load(keep).to(tl.float32)
    if STEP_IS_STORED:
        step = tl.load(step).to(tl.float32)
    w = w * keep + y * step
    place = tl.full((BM, BN), 0, tl.uint32)
    key = tl.full((), 0, tl.int64)
    if tl.bfloat16 == DTYPE and ROUND:
        row_place = tl.load(entry + _T_ROW_PLACE).to(tl.uint32)
        col_place = tl.load(entry + _T_COL_PLACE).to(tl.uint32)
        place = place + tl.load(entry + _T_PLACE).to(tl.uint32)
        place = place + (rows.to(tl.uint32) * row_place)[:, None]
        place = place + (cols.to(tl.uint32) * col_place)[None, :]
        key = tl.load(tl.load(own + _A_KEY).to(tl.pointer_type(tl.int64)))
    tl.store(param, rounded(w, place, key, DTYPE, ROUND), mask=inside)
