"""The kernel of the scales: half an iteration, on many matrices at once.

Letters: those of `sinkgd.kernels.triton.fields`, and
    y: the gradient under its scales, u * G * v; its squares are what is added up

Half an iteration sums the squares of y along the rows or the columns of its tiles and writes those
partial sums; the next launch adds them up, in their order, and so finds the scales that it needs.
No sum depends on the order in which programs run. Scales multiply up from one half to the next, so
the rows or columns of y have the right length already and their squares stay in range. The first
iteration meets the bare gradient: it hands on lengths, each found under a power of two of its own.
"""

import triton
import triton.language as tl

from sinkgd.kernels.triton.fields import Matrix, Program
from sinkgd.kernels.triton.primitives import (
    LARGEST,
    add_up,
    field,
    load_tile,
    matrix_at,
    peaks,
    power_of_two,
    row_length,
)

# What a half finds its first scales from: where the iteration starts, the lengths of the first
# iteration, the sums of squares of a later one.
START, LENGTHS, SQUARES = 0, 1, 2


_START, _LENGTHS, _SQUARES = tl.constexpr(START), tl.constexpr(LENGTHS), tl.constexpr(SQUARES)

_MATRIX = tl.constexpr(len(Matrix._fields))
_OWNER, _OFFSET = field(Matrix, "owner"), field(Matrix, "offset")
_P, _Q, _LD = field(Matrix, "P"), field(Matrix, "Q"), field(Matrix, "ld")
_U, _V, _BEGIN = field(Matrix, "u"), field(Matrix, "v"), field(Matrix, "start")
_ROW_SUMS, _COL_SUMS = field(Matrix, "row_sums"), field(Matrix, "col_sums")
_NUMBER = field(Matrix, "number")

_PROGRAM, _LINE = tl.constexpr(len(Program._fields)), field(Program, "line")
_FIRST, _BEYOND = field(Program, "first"), field(Program, "beyond")

_ROOM = tl.constexpr(1 / 64)  # a tile's side is 2048 at most, its root below 64: nothing overflows
_CHUNK = tl.constexpr(4096)  # partial sums that a program holds at once


@triton.jit
def _scale_from_lengths(parts, count, stride, index, valid, target, SIDE: tl.constexpr):
    """Return the scale that gives each line of the bare gradient the square ``target``."""
    chunk = tl.arange(0, _CHUNK // SIDE)
    longest = tl.full((_CHUNK // SIDE, SIDE), 0.0, tl.float32)
    for first in range(0, count, _CHUNK // SIDE):
        at = (first + chunk)[:, None] * stride + index[None, :]
        read = ((first + chunk) < count)[:, None] & valid[None, :]
        lengths = tl.load(parts + at, mask=read, other=0.0)
        longest = tl.maximum(longest, tl.where(lengths == lengths, lengths, 0.0))
    power = power_of_two(tl.reduce(longest, 0, tl.standard._elementwise_max))
    inverse = tl.div_rn(1.0, power)
    squares = tl.full((_CHUNK // SIDE, SIDE), 0.0, tl.float32)
    for first in range(0, count, _CHUNK // SIDE):
        at = (first + chunk)[:, None] * stride + index[None, :]
        read = ((first + chunk) < count)[:, None] & valid[None, :]
        lengths = tl.load(parts + at, mask=read, other=0.0) * inverse[None, :]
        squares += lengths * lengths
    total = add_up(squares, 0)
    scale = tl.sqrt_rn(tl.div_rn(target, total)) * _ROOM * inverse
    scale = tl.where(scale > LARGEST, LARGEST, scale)
    scale = tl.where(total <= LARGEST, scale, float("nan"))
    return tl.where(total == 0, 0.0, scale)


@triton.jit
def _total_squares(parts, count, stride, index, valid, SIDE: tl.constexpr):
    """Add up the partial sums of each line."""
    chunk = tl.arange(0, _CHUNK // SIDE)
    squares = tl.full((_CHUNK // SIDE, SIDE), 0.0, tl.float32)
    for first in range(0, count, _CHUNK // SIDE):
        at = (first + chunk)[:, None] * stride + index[None, :]
        read = ((first + chunk) < count)[:, None] & valid[None, :]
        squares += tl.load(parts + at, mask=read, other=0.0)
    return add_up(squares, 0)


@triton.jit(do_not_specialize=["done", "low", "high"])
def half_iteration(
    addresses,
    starts,
    matrices,
    programs,
    old,  # scales before this half's were found
    new,  # scales with this half's
    out,  # scales as they are returned
    parts,
    alive,  # rows and columns with a scale other than zero, a pair a matrix
    earlier,  # whether a row of each matrix moved: an iteration ago,
    now,  # in the last one,
    coming,  # in this one
    done,  # iterations
    low,  # squares of the factors by which a row may move and still count as settled
    high,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    AXIS: tl.constexpr,  # 1 sums rows in memory, and finds v first; 0 sums columns, and finds u
    ROWS: tl.constexpr,  # whether the sums are of the matrix's rows
    FROM: tl.constexpr,  # START, LENGTHS or SQUARES
    SUMS: tl.constexpr,  # whether there is another half; where not, scales are only found
    TOL: tl.constexpr,
    VECTOR: tl.constexpr,  # entries of 16 bytes, of which rows in memory are multiples; or 1
):
    """Find the scales of one side from the sums before, and sum along it for the other side's.

    "Found" are the scales across the sums: columns' where rows are summed. A program holds those of
    one line of tiles and walks along the line; "other" are the scales that go with it.
    """
    BARE: tl.constexpr = FROM == _START or (FROM == _LENGTHS and not ROWS)
    SIDE: tl.constexpr = BN if AXIS == 1 else BM
    OTHER_SIDE: tl.constexpr = BM if AXIS == 1 else BN
    program = programs + tl.program_id(0) * _PROGRAM
    entry = matrices + tl.load(program) * _MATRIX
    line = tl.load(program + _LINE).to(tl.int32)
    first = tl.load(program + _FIRST).to(tl.int32)
    beyond = tl.load(program + _BEYOND).to(tl.int32)
    if not SUMS:
        if first != 0:
            return
    number = tl.load(entry + _NUMBER)
    P = tl.load(entry + _P).to(tl.int32)
    Q = row_length(entry + _Q, VECTOR)
    owner = tl.load(entry + _OWNER)
    base, ld = matrix_at(addresses + owner, entry + _OFFSET, entry + _LD, DTYPE, VECTOR)
    row_sums = parts + tl.load(entry + _ROW_SUMS)
    col_sums = parts + tl.load(entry + _COL_SUMS)
    u_at = tl.load(entry + _U)
    v_at = tl.load(entry + _V)
    if AXIS == 1:
        length, other_length = Q, P
        at, other_at = v_at, u_at
        sums_in, sums_out = col_sums, row_sums
    else:
        length, other_length = P, Q
        at, other_at = u_at, v_at
        sums_in, sums_out = row_sums, col_sums
    stride = (length + 3) // 4 * 4
    out_stride = (other_length + 3) // 4 * 4
    index = line * SIDE + tl.arange(0, SIDE)
    valid = index < length
    tiles = (other_length + OTHER_SIDE - 1) // OTHER_SIDE

    settled = False
    if TOL:
        if ROWS:
            # Nothing moves after a matrix has settled, so one look back tells.
            if tl.load(earlier + number) == 0:
                return
            settled = tl.load(now + number) == 0
        else:
            if tl.load(now + number) == 0:
                return

    # A scale of zero takes its row's or column's share out of the sum of all squares. Both sides
    # must aim at the same sum, or the scales would drift apart by a factor an iteration.
    target = other_length.to(tl.float32)
    share = 1.0
    if FROM == _SQUARES and (SUMS or TOL):
        if ROWS:
            m, n = other_length.to(tl.float32), length.to(tl.float32)
        else:
            m, n = length.to(tl.float32), other_length.to(tl.float32)
        live_rows = tl.load(alive + 2 * number).to(tl.float32)
        live_cols = tl.load(alive + 2 * number + 1).to(tl.float32)
        share = tl.div_rn(live_rows, m) * tl.div_rn(n, live_cols)
    if FROM == _START:
        begin = tl.load(starts + owner)
        start = begin.to(tl.pointer_type(tl.float32)) + tl.load(entry + _BEGIN)
        given = tl.where(begin != 0, length, 0)
        found = tl.load(start + index, mask=index < given, other=1.0)
    elif FROM == _LENGTHS:
        found = _scale_from_lengths(sums_in, tiles, stride, index, valid, target, SIDE)
    else:
        total = _total_squares(sums_in, tiles, stride, index, valid, SIDE)
        before = tl.load(old + at + index, mask=valid, other=0.0)
        if ROWS and SUMS:
            target = tl.where(settled, target, target * share)
        factor = tl.div_rn(target, total)
        if TOL and not ROWS:
            move = tl.where(done >= 2, factor, tl.div_rn(factor, share))
            moved = valid & (total != 0) & ((move >= low) & (move <= high) == 0)
            if tl.reduce(moved.to(tl.int32), 0, tl.standard._elementwise_max) != 0:
                tl.store(coming + number, 1)
        found = tl.where(total == 0, 0.0, before * tl.sqrt_rn(factor))

    if FROM != _START:
        if first == 0:
            tl.store(new + at + index, found, mask=valid)
            if FROM == _LENGTHS and SUMS:
                live = add_up((found != 0).to(tl.int32), 0)
                tl.atomic_add(alive + 2 * number + (1 if ROWS else 0), live, sem="relaxed")
    if SUMS:
        if settled:
            if first == 0:
                tl.store(out + at + index, found, mask=valid)
            if line == 0:
                for tile in range(first, beyond):
                    o = tile * OTHER_SIDE + tl.arange(0, OTHER_SIDE)
                    scale = tl.load(new + other_at + o, mask=o < other_length, other=0.0)
                    tl.store(out + other_at + o, scale, mask=o < other_length)
            return
        for tile in range(first, beyond):
            o = tile * OTHER_SIDE + tl.arange(0, OTHER_SIDE)
            if AXIS == 1:
                rows, cols = o, index
            else:
                rows, cols = index, o
            inside = (rows < P)[:, None] & (cols < Q)[None, :]
            g = load_tile(base, ld, rows, cols, inside)
            if BARE:
                if AXIS == 1:
                    y = g * found[None, :]
                else:
                    y = g * found[:, None]
                power = peaks(y, AXIS)
                inverse = tl.div_rn(1.0, power)
                if AXIS == 1:
                    y = y * inverse[:, None]
                else:
                    y = y * inverse[None, :]
                sums = tl.sqrt_rn(add_up(y * y, AXIS)) * _ROOM * power
            else:
                held = tl.load(
                    (new if ROWS else old) + other_at + o, mask=o < other_length, other=0.0
                )
                if AXIS == 1:
                    y = (g * held[:, None]) * found[None, :]
                else:
                    y = (g * found[:, None]) * held[None, :]
                sums = add_up(y * y, AXIS)
            tl.store(sums_out + line.to(tl.int64) * out_stride + o, sums, mask=o < other_length)
