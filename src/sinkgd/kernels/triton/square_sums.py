"""The kernels that sum squares tile by tile: half an iteration, and weighted sums of a shard.

Letters: as in `sinkgd.kernels.triton.tables`, and
    y: the scaled gradient, u * g * v; `half_iteration` sums its squares

Half an iteration sums the squares of y along the rows or the columns of its tiles and writes these
partial sums; the next launch adds them up, in order, and finds the scales that it needs. No sum
depends on the order in which programs run. From the second iteration on, y is scaled by the latest
scales, so its rows or columns already have the right length, and their squares stay in range; new
scales are the old ones times a factor. In the first iteration y is scaled on one side at most. The
kernel then writes lengths instead of sums of squares, and divides entries by a power of two before
it squares them.

`weighted_square_sums` works differently: its squares and sums are float64, whose range includes the
squares of all float32 numbers, so the kernel needs no powers of two and reads a gradient once per
call. One program adds up a whole line of a shard, so the bits of a sum depend only on that line.
The kernel needs 4 float64 instructions per entry: few for a data center's GPU, many for other GPUs.
Its speed has not been measured.
"""

import triton
import triton.language as tl

from sinkgd.kernels.triton.primitives import (
    LARGEST,
    field,
    load_tile,
    matrix_at,
    peak_powers,
    power_of_two,
    row_length,
    sum_along,
)
from sinkgd.kernels.triton.tables import HalfMatrix, ShardMatrix, TileProgram

# What a half iteration finds its scales from: the given initial scales, the lengths that the first
# iteration wrote, or the sums of squares that a later one wrote.
START, LENGTHS, SQUARES = 0, 1, 2
_START, _LENGTHS, _SQUARES = tl.constexpr(START), tl.constexpr(LENGTHS), tl.constexpr(SQUARES)

_MATRIX = tl.constexpr(len(HalfMatrix._fields))
_TENSOR, _OFFSET = field(HalfMatrix, "tensor"), field(HalfMatrix, "offset")
_P, _Q, _LD = field(HalfMatrix, "P"), field(HalfMatrix, "Q"), field(HalfMatrix, "ld")
_U, _V, _INITIAL = field(HalfMatrix, "u"), field(HalfMatrix, "v"), field(HalfMatrix, "start")
_ROW_SUMS, _COL_SUMS = field(HalfMatrix, "row_sums"), field(HalfMatrix, "col_sums")
_NUMBER = field(HalfMatrix, "number")

_PROGRAM, _LINE = tl.constexpr(len(TileProgram._fields)), field(TileProgram, "line")
_FIRST, _END = field(TileProgram, "first"), field(TileProgram, "end")

# Lengths are stored times this number, so that none overflows: a tile's side is at most 2048.
_HEADROOM = tl.constexpr(1 / 64)
_CHUNK = tl.constexpr(4096)  # partial sums that a program loads at a time


@triton.jit(do_not_specialize=["done", "low", "high"])
def half_iteration(
    addresses,
    starts,  # addresses of initial column scales, or 0
    matrices,
    programs,
    old,  # scales before this half iteration
    new,  # scales after it
    out,  # scales that are returned
    partial_sums,
    nonzero,  # how many row and column scales are not zero, a pair for each matrix
    earlier,  # for each matrix, whether some row scale moved in iteration ``done - 1``
    now,  # for each matrix, whether some row scale moved in iteration ``done``
    coming,  # the same for this iteration, ``done + 1``; written
    done,  # number of iterations that are finished
    low,  # the least quotient of squared scales that counts as no movement
    high,  # the largest one
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    AXIS: tl.constexpr,  # 1: find v, then sum rows in memory; 0: find u, then sum columns
    ROWS: tl.constexpr,  # whether the sums are of the matrix's rows
    FROM: tl.constexpr,  # START, LENGTHS or SQUARES
    SUMS: tl.constexpr,  # whether another half iteration follows; else only scales are found
    TOL: tl.constexpr,  # whether converged matrices are skipped
    VECTOR: tl.constexpr,  # entries in 16 bytes if loads are that wide, else 1
):
    """Find the scales of one side from the previous sums, then sum squares for the other side.

    ``found`` are the new scales: of columns if rows are summed, else of rows. A program has the
    scales of one line of tiles and goes along that line. Names with ``other_`` belong to the other
    side.
    """
    UNSCALED: tl.constexpr = FROM == _START or (FROM == _LENGTHS and not ROWS)
    SIDE: tl.constexpr = BN if AXIS == 1 else BM
    OTHER_SIDE: tl.constexpr = BM if AXIS == 1 else BN
    program = programs + tl.program_id(0) * _PROGRAM
    matrix = matrices + tl.load(program) * _MATRIX
    line = tl.load(program + _LINE).to(tl.int32)
    first = tl.load(program + _FIRST).to(tl.int32)
    end = tl.load(program + _END).to(tl.int32)
    if not SUMS:
        if first != 0:
            return
    number = tl.load(matrix + _NUMBER)
    P = tl.load(matrix + _P).to(tl.int32)
    Q = row_length(matrix + _Q, VECTOR)
    tensor = tl.load(matrix + _TENSOR)
    base, ld = matrix_at(addresses + tensor, matrix + _OFFSET, matrix + _LD, DTYPE, VECTOR)
    row_sums = partial_sums + tl.load(matrix + _ROW_SUMS)
    col_sums = partial_sums + tl.load(matrix + _COL_SUMS)
    u_at = tl.load(matrix + _U)
    v_at = tl.load(matrix + _V)
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

    converged = False
    if TOL:
        if ROWS:
            # If no row scale moved in iteration `done - 1`, `out` already has the final scales.
            if tl.load(earlier + number) == 0:
                return
            converged = tl.load(now + number) == 0
        else:
            if tl.load(now + number) == 0:
                return

    # A row or column whose scale is zero adds nothing to the sum of all squares. Both sides must
    # aim at the same sum, or the scales would drift apart by a factor in every iteration.
    target = other_length.to(tl.float32)
    share = 1.0
    if FROM == _SQUARES and (SUMS or TOL):
        if ROWS:
            m, n = other_length.to(tl.float32), length.to(tl.float32)
        else:
            m, n = length.to(tl.float32), other_length.to(tl.float32)
        nonzero_rows = tl.load(nonzero + 2 * number).to(tl.float32)
        nonzero_cols = tl.load(nonzero + 2 * number + 1).to(tl.float32)
        share = tl.div_rn(nonzero_rows, m) * tl.div_rn(n, nonzero_cols)
    if FROM == _START:
        begin = tl.load(starts + tensor)
        start = begin.to(tl.pointer_type(tl.float32)) + tl.load(matrix + _INITIAL)
        given = tl.where(begin != 0, length, 0)
        found = tl.load(start + index, mask=index < given, other=1.0)
    elif FROM == _LENGTHS:
        found = _scale_from_lengths(sums_in, tiles, stride, index, valid, target, SIDE)
    else:
        total = _total_squares(sums_in, tiles, stride, index, valid, SIDE)
        before = tl.load(old + at + index, mask=valid, other=0.0)
        if ROWS and SUMS:
            target = tl.where(converged, target, target * share)
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
                nonzero_here = sum_along((found != 0).to(tl.int32), 0)
                tl.atomic_add(
                    nonzero + 2 * number + (1 if ROWS else 0), nonzero_here, sem="relaxed"
                )
    if SUMS:
        if converged:
            if first == 0:
                tl.store(out + at + index, found, mask=valid)
            if line == 0:
                for tile in range(first, end):
                    o = tile * OTHER_SIDE + tl.arange(0, OTHER_SIDE)
                    scale = tl.load(new + other_at + o, mask=o < other_length, other=0.0)
                    tl.store(out + other_at + o, scale, mask=o < other_length)
            return
        for tile in range(first, end):
            o = tile * OTHER_SIDE + tl.arange(0, OTHER_SIDE)
            if AXIS == 1:
                rows, cols = o, index
            else:
                rows, cols = index, o
            inside = (rows < P)[:, None] & (cols < Q)[None, :]
            g = load_tile(base, ld, rows, cols, inside)
            if UNSCALED:
                if AXIS == 1:
                    y = g * found[None, :]
                else:
                    y = g * found[:, None]
                power = peak_powers(y, AXIS)
                inverse = tl.div_rn(1.0, power)
                if AXIS == 1:
                    y = y * inverse[:, None]
                else:
                    y = y * inverse[None, :]
                sums = tl.sqrt_rn(sum_along(y * y, AXIS)) * _HEADROOM * power
            else:
                scale = tl.load(
                    (new if ROWS else old) + other_at + o, mask=o < other_length, other=0.0
                )
                if AXIS == 1:
                    y = (g * scale[:, None]) * found[None, :]
                else:
                    y = (g * found[:, None]) * scale[None, :]
                sums = sum_along(y * y, AXIS)
            tl.store(sums_out + line.to(tl.int64) * out_stride + o, sums, mask=o < other_length)


@triton.jit
def _scale_from_lengths(partial_sums, count, stride, index, valid, target, SIDE: tl.constexpr):
    """Return the scales that bring the squared length of each unscaled line to ``target``."""
    chunk = tl.arange(0, _CHUNK // SIDE)
    longest = tl.full((_CHUNK // SIDE, SIDE), 0.0, tl.float32)
    for first in range(0, count, _CHUNK // SIDE):
        at = (first + chunk)[:, None] * stride + index[None, :]
        read = ((first + chunk) < count)[:, None] & valid[None, :]
        lengths = tl.load(partial_sums + at, mask=read, other=0.0)
        longest = tl.maximum(longest, tl.where(lengths == lengths, lengths, 0.0))
    power = power_of_two(tl.reduce(longest, 0, tl.standard._elementwise_max))
    inverse = tl.div_rn(1.0, power)
    squares = tl.full((_CHUNK // SIDE, SIDE), 0.0, tl.float32)
    for first in range(0, count, _CHUNK // SIDE):
        at = (first + chunk)[:, None] * stride + index[None, :]
        read = ((first + chunk) < count)[:, None] & valid[None, :]
        lengths = tl.load(partial_sums + at, mask=read, other=0.0) * inverse[None, :]
        squares += lengths * lengths
    total = sum_along(squares, 0)
    scale = tl.sqrt_rn(tl.div_rn(target, total)) * _HEADROOM * inverse
    scale = tl.where(scale > LARGEST, LARGEST, scale)
    scale = tl.where(total <= LARGEST, scale, float("nan"))
    return tl.where(total == 0, 0.0, scale)


@triton.jit
def _total_squares(partial_sums, count, stride, index, valid, SIDE: tl.constexpr):
    """Add up the partial sums of each line."""
    chunk = tl.arange(0, _CHUNK // SIDE)
    squares = tl.full((_CHUNK // SIDE, SIDE), 0.0, tl.float32)
    for first in range(0, count, _CHUNK // SIDE):
        at = (first + chunk)[:, None] * stride + index[None, :]
        read = ((first + chunk) < count)[:, None] & valid[None, :]
        squares += tl.load(partial_sums + at, mask=read, other=0.0)
    return sum_along(squares, 0)


_SHARD = tl.constexpr(len(ShardMatrix._fields))
_S_TENSOR, _S_OFFSET = field(ShardMatrix, "tensor"), field(ShardMatrix, "offset")
_S_P, _S_Q, _S_LD = field(ShardMatrix, "P"), field(ShardMatrix, "Q"), field(ShardMatrix, "ld")
_S_ROWS, _S_COLS = field(ShardMatrix, "rows"), field(ShardMatrix, "cols")


@triton.jit
def weighted_square_sums(
    addresses,
    matrices,
    programs,
    weights,
    sums,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    OF_ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write the sums of squares times weights, of rows in memory or of columns.

    Args:
        addresses: Addresses of the gradients.
        matrices: Rows of `ShardMatrix`.
        programs: For each program, its matrix and which block of lines it sums.
        weights: float64, one for each entry of a line.
        sums: float64, one for each line.
        DTYPE: Dtype of the gradients.
        BM: Rows of a tile.
        BN: Columns of a tile.
        OF_ROWS: Whether rows in memory are summed.
        VECTOR: Entries in 16 bytes if loads are that wide, else 1.
    """
    program = programs + tl.program_id(0) * 2
    matrix = matrices + tl.load(program) * _SHARD
    block = tl.load(program + 1).to(tl.int32)
    P = tl.load(matrix + _S_P).to(tl.int32)
    Q = row_length(matrix + _S_Q, VECTOR)
    address = addresses + tl.load(matrix + _S_TENSOR)
    base, ld = matrix_at(address, matrix + _S_OFFSET, matrix + _S_LD, DTYPE, VECTOR)
    row_offset, col_offset = tl.load(matrix + _S_ROWS), tl.load(matrix + _S_COLS)
    total = tl.full((BM, BN), 0.0, tl.float64)
    if OF_ROWS:
        rows = block * BM + tl.arange(0, BM)
        for first in range(0, Q, BN):
            cols = first + tl.arange(0, BN)
            squares = _squares(base, ld, rows, cols, P, Q)
            total += squares * tl.load(weights + col_offset + cols, cols < Q, 0.0)[None, :]
        tl.store(sums + row_offset + rows, sum_along(total, 1), rows < P)
    else:
        cols = block * BN + tl.arange(0, BN)
        for first in range(0, P, BM):
            rows = first + tl.arange(0, BM)
            squares = _squares(base, ld, rows, cols, P, Q)
            total += squares * tl.load(weights + row_offset + rows, rows < P, 0.0)[:, None]
        tl.store(sums + col_offset + cols, sum_along(total, 0), cols < Q)


@triton.jit
def _squares(base, ld, rows, cols, P, Q):
    pointers = base + (rows.to(tl.int64) * ld)[:, None] + cols[None, :]
    inside = (rows < P)[:, None] & (cols < Q)[None, :]
    entries = tl.load(pointers, mask=inside, other=0.0).to(tl.float64)
    return entries * entries
