"""The kernels of a descent that reads the gradient once an iteration.

Letters: those of `sinkgd.kernels.triton.fields` and `sinkgd.kernels.triton.panels`, and
    g: entries of the gradient
    y: the gradient under its scales, u * g * v; its squares are what is added up
    f: what the squares of y are multiplied by when their row's scale is found

One launch of `sweep` is one iteration. A program holds whole rows in registers: it adds up their
squares, finds u from them, and adds up the columns of the same squares under the new u. It walks
down some panels of rows and then stores one partial sum a column. The last of eight neighboring
programs to arrive adds up their eight; the last of eight such groups goes on; the last of all
finds v. Nobody waits, and no sum depends on the order of arrival.

In its first finding a scale meets a gradient of any size: squares are then summed under a power of
two of their own, which partial sums of columns carry beside them. Later the rows or columns of y
have the right length already, and their squares stay in range.
"""

import triton
import triton.language as tl

from sinkgd.kernels.triton.fields import BARE, GIVEN, SCALED, Block, State, Walk
from sinkgd.kernels.triton.panels import FAN_IN
from sinkgd.kernels.triton.primitives import (
    LARGEST,
    LOWEST_POWER,
    add_up,
    field,
    inverse_power,
    load_tile,
    matrix_at,
    peaks,
    row_length,
)

_GIVEN, _BARE, _SCALED = tl.constexpr(GIVEN), tl.constexpr(BARE), tl.constexpr(SCALED)

_BLOCK = tl.constexpr(len(Block._fields))
_TENSOR, _OFFSET = field(Block, "tensor"), field(Block, "offset")
_P, _Q, _LD = field(Block, "P"), field(Block, "Q"), field(Block, "ld")
_U, _V, _BEGIN = field(Block, "u"), field(Block, "v"), field(Block, "start")
_STATE, _BAD = field(Block, "state"), field(Block, "bad")
_PARTS, _COUNTERS = field(Block, "parts"), field(Block, "counters")
_PROGRAMS = field(Block, "programs")

_LIVE_U, _LIVE_V = field(State, "live_u"), field(State, "live_v")
_MOVED, _SETTLED = field(State, "moved"), field(State, "settled")

_WALK, _NUMBER = tl.constexpr(len(Walk._fields)), field(Walk, "number")
_FIRST, _BEYOND = field(Walk, "first"), field(Walk, "beyond")

_FAN_IN = tl.constexpr(FAN_IN)


@triton.jit
def walk_and_block(table, blocks, walks, count, flip):
    """Return where the table says what this program walks, and of which matrix."""
    program = tl.program_id(0)
    if flip != 0:
        program = count - 1 - program
    walk = table + walks + program * _WALK
    return walk, table + blocks + tl.load(walk) * _BLOCK


@triton.jit
def _first_scale(total, inverse, target):
    """Return the scale that makes ``target`` of a sum of bare squares under a power of two."""
    scale = tl.sqrt_rn(tl.div_rn(target, total)) * inverse
    scale = tl.where(scale > LARGEST, LARGEST, scale)
    scale = tl.where(total <= LARGEST, scale, float("nan"))
    return tl.where(total == 0, 0.0, scale)


@triton.jit
def _next_scale(before, total, target):
    """Return the scale that makes ``target`` of a sum, and its square over that of the one before.

    Sums are of squares under the scale before.
    """
    f = tl.div_rn(target, total)
    f = tl.where(total == 0, 0.0, f)
    return before * tl.sqrt_rn(f), f


@triton.jit
def find_u(
    u, rows, valid, gA, gB, vA, vB, target, B: tl.constexpr, FROM: tl.constexpr, ONES: tl.constexpr
):
    """Find u of a panel: return it, the squares of y before, f, and the sums of the rows."""
    if FROM == _BARE:
        yA, yB = gA, gB
        if not ONES:
            yA = yA * vA[None, :]
            if B > 0:
                yB = yB * vB[None, :]
        power = peaks(yA, 1)
        if B > 0:
            power = tl.maximum(power, peaks(yB, 1))
        inverse = inverse_power(power)
        yA = yA * inverse[:, None]
        sA = yA * yA
        total = add_up(sA, 1)
        if B > 0:
            yB = yB * inverse[:, None]
            sB = yB * yB
            total += add_up(sB, 1)
        else:
            sB = gB
        found = _first_scale(total, inverse, target)
        f = found * power
        f = f * f
    else:
        before = tl.load(u + rows, mask=valid, other=0.0)
        yA = (gA * before[:, None]) * vA[None, :]
        sA = yA * yA
        total = add_up(sA, 1)
        if B > 0:
            yB = (gB * before[:, None]) * vB[None, :]
            sB = yB * yB
            total += add_up(sB, 1)
        else:
            sB = gB
        # Every thread needs these, so a root to 23 bits has to do; f is the square of what u gets.
        grown = tl.where(total == 0, 0.0, tl.rsqrt(total * tl.div_rn(1.0, target)))
        found = before * grown
        f = grown * grown
    return found, sA, sB, f, total


@triton.jit
def _add_bare(g, u, sums, powers):
    """Add the squares of the columns of u * g to ``sums``, which are under ``powers``."""
    y = g * u[:, None]
    higher = tl.maximum(powers, peaks(y, 0))
    quotient = powers * inverse_power(higher)
    y = y * inverse_power(higher)[None, :]
    return sums * (quotient * quotient) + add_up(y * y, 0), higher


@triton.jit
def _exponent(power):
    return ((power.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.int8)


@triton.jit
def _power(exponent):
    return ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _store_part(parts, exponents, cols, Q, sums, powers, FROM: tl.constexpr):
    tl.store(parts + cols, sums, mask=cols < Q)
    if FROM == _BARE:
        tl.store(exponents + cols, _exponent(powers), mask=cols < Q)


@triton.jit
def _total(
    parts, exponents, stride, size, cols, Q, FROM: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Add up the partial sums of at most eight programs: return the sums, and their powers."""
    k = tl.arange(0, _FAN_IN)
    at = k.to(tl.int64)[:, None] * stride + cols[None, :]
    read = (k < size)[:, None] & (cols < Q)[None, :]
    sums = tl.load(parts + at, mask=read, other=0.0, cache_modifier=".cg")
    if FROM == _BARE:
        powers = _power(tl.load(exponents + at, mask=read, other=-126, cache_modifier=".cg"))
        highest = tl.reduce(powers, 0, tl.standard._elementwise_max)
        quotient = powers * inverse_power(highest)[None, :]
        sums = sums * (quotient * quotient)
    else:
        highest = tl.full((CHUNK,), 1.0, tl.float32)
    return add_up(sums, 0), highest


@triton.jit
def _share(state, P, Q, TURNED: tl.constexpr):
    """Return what column scales' target is multiplied by where rows or columns are zero.

    A scale of zero takes its row's or column's share out of the sum of all squares. Both sides
    must aim at the same sum, or the scales would drift apart by a factor an iteration.
    """
    live_u = tl.load(state + _LIVE_U, cache_modifier=".cg").to(tl.float32)
    live_v = tl.load(state + _LIVE_V, cache_modifier=".cg").to(tl.float32)
    rows, cols = P.to(tl.float32), Q.to(tl.float32)
    if TURNED:
        return tl.div_rn(live_v, cols) * tl.div_rn(rows, live_u)
    return tl.div_rn(live_u, rows) * tl.div_rn(cols, live_v)


@triton.jit(
    do_not_specialize=["blocks", "walks", "count", "flip", "iteration", "last", "low", "high"]
)
def sweep(
    grads,  # addresses
    starts,  # addresses of column scales to begin from, or 0
    table,
    scales,
    partial,
    numbers,  # int32: states of matrices, flags of owners, counters of arrivals
    blocks,  # where those of this launch begin in the table
    walks,
    count,  # of programs
    flip,  # whether the last program's rows are walked by the first
    iteration,  # that column scales are found of, from 1
    last,  # whether it is the last
    low,  # squares of the factors by which a row may move and still count as settled
    high,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    U_FROM: tl.constexpr,
    V_FROM: tl.constexpr,
    TURNED: tl.constexpr,  # a row in memory is a column of the matrix
    STARTED: tl.constexpr,  # whether column scales to begin from are given, for some tensor
    TOL: tl.constexpr,
    CHUNK: tl.constexpr,  # columns whose partial sums are added up at once
    VECTOR: tl.constexpr,  # entries of 16 bytes, of which rows in memory are multiples; or 1
):
    """Find u from v, then v from u, in one reading.

    Of a turned matrix v are the row scales: the first launch has u given, and the last launch of a
    descent, `finish`, finds u.
    """
    walk, block = walk_and_block(table, blocks, walks, count, flip)
    state = numbers + tl.load(block + _STATE)
    if TOL:
        if tl.load(state + _SETTLED) != 0:
            return
    number = tl.load(walk + _NUMBER).to(tl.int32)
    first = tl.load(walk + _FIRST).to(tl.int32)
    beyond = tl.load(walk + _BEYOND).to(tl.int32)
    P = tl.load(block + _P).to(tl.int32)
    Q = row_length(block + _Q, VECTOR)
    tensor = tl.load(block + _TENSOR)
    base, ld = matrix_at(grads + tensor, block + _OFFSET, block + _LD, DTYPE, VECTOR)
    begin = tl.load(starts + tensor)
    start = begin.to(tl.pointer_type(tl.float32)) + tl.load(block + _BEGIN)
    u = scales + tl.load(block + _U)
    v = scales + tl.load(block + _V)
    colsA = tl.arange(0, A)
    colsB = A + tl.arange(0, B if B > 0 else A)

    vA = tl.full((A,), 1.0, tl.float32)
    vB = tl.full((B if B > 0 else A,), 1.0, tl.float32)
    if U_FROM != _GIVEN:
        if U_FROM == _BARE and not TURNED:
            if STARTED:
                given = tl.where(begin != 0, Q, 0)
                vA = tl.load(start + colsA, mask=colsA < given, other=1.0)
                if B > 0:
                    vB = tl.load(start + colsB, mask=colsB < given, other=1.0)
        else:
            vA = tl.load(v + colsA, mask=colsA < Q, other=0.0)
            if B > 0:
                vB = tl.load(v + colsB, mask=colsB < Q, other=0.0)

    of_u = Q.to(tl.float32)  # what squares of a row under its new scale add up to
    share = 1.0
    if U_FROM == _SCALED and (TURNED or TOL):
        share = _share(state, P, Q, TURNED)
        if TURNED:
            of_u = of_u * share

    sumsA = tl.full((A,), 0.0, tl.float32)
    sumsB = tl.full((B if B > 0 else A,), 0.0, tl.float32)
    powersA = tl.full((A,), LOWEST_POWER, tl.float32)
    powersB = tl.full((B if B > 0 else A,), LOWEST_POWER, tl.float32)
    live = tl.full((BM,), 0, tl.int32)
    moves = tl.full((BM,), 0, tl.int32)
    for panel in range(first, beyond, BM):
        rows = panel + tl.arange(0, BM)
        valid = rows < beyond
        gA = load_tile(base, ld, rows, colsA, valid[:, None] & (colsA < Q)[None, :])
        if B > 0:
            gB = load_tile(base, ld, rows, colsB, valid[:, None] & (colsB < Q)[None, :])
        else:
            gB = gA
        if U_FROM == _GIVEN:
            given = tl.where(begin != 0, beyond, 0)
            found = tl.load(start + rows, mask=rows < given, other=1.0)
        else:
            found, sA, sB, f, total = find_u(
                u, rows, valid, gA, gB, vA, vB, of_u, B, U_FROM, not TURNED and not STARTED
            )
            if U_FROM == _BARE:
                live += (found != 0).to(tl.int32)
            if TOL and U_FROM == _SCALED and not TURNED:
                move = tl.where(iteration >= 3, f, tl.div_rn(f, share))
                moves |= (valid & (total != 0) & ((move >= low) & (move <= high) == 0)).to(tl.int32)
            tl.debug_barrier()  # warps that hold the same rows have all loaded u
            tl.store(u + rows, found, mask=valid)
        if V_FROM == _BARE:
            sumsA, powersA = _add_bare(gA, found, sumsA, powersA)
            if B > 0:
                sumsB, powersB = _add_bare(gB, found, sumsB, powersB)
        else:
            sumsA += add_up(sA * f[:, None], 0)
            if B > 0:
                sumsB += add_up(sB * f[:, None], 0)
    if U_FROM == _BARE:
        tl.atomic_add(state + _LIVE_U, add_up(live, 0), sem="relaxed")
    if TOL and U_FROM == _SCALED and not TURNED:
        if tl.reduce(moves, 0, tl.standard._elementwise_max) != 0:
            tl.store(state + _MOVED, 1)

    programs = tl.load(block + _PROGRAMS).to(tl.int32)
    stride = (Q + 3) // 4 * 4
    parts = partial + tl.load(block + _PARTS)
    exponents = (parts + programs.to(tl.int64) * stride).to(tl.pointer_type(tl.int8))
    own = number.to(tl.int64) * stride
    _store_part(parts + own, exponents + own, colsA, Q, sumsA, powersA, V_FROM)
    if B > 0:
        _store_part(parts + own, exponents + own, colsB, Q, sumsB, powersB, V_FROM)

    counters = numbers + tl.load(block + _COUNTERS)
    bad = numbers + tl.load(block + _BAD)
    node = number
    nodes = programs
    apart = stride.to(tl.int64)  # from the sums of a node to its neighbor's
    level = 0  # where the counters of this level begin
    going = True
    while going:
        group = node // _FAN_IN
        groups = (nodes + _FAN_IN - 1) // _FAN_IN
        size = tl.minimum(nodes - group * _FAN_IN, _FAN_IN)
        tl.debug_barrier()  # what other threads have stored comes before this one's arrival
        arrived = tl.atomic_add(counters + level + group, 1, sem="acq_rel")
        going = False
        if arrived == size - 1:
            tl.store(counters + level + group, 0)
            from_ = parts + (group * _FAN_IN) * apart
            exponents_from = exponents + (group * _FAN_IN) * apart
            if groups > 1:
                for chunk in range(0, Q, CHUNK):
                    cols = chunk + tl.arange(0, CHUNK)
                    sums, powers = _total(
                        from_, exponents_from, apart, size, cols, Q, V_FROM, CHUNK
                    )
                    _store_part(from_, exponents_from, cols, Q, sums, powers, V_FROM)
                going = True
            else:
                _find_v(
                    from_, exponents_from, apart, size, v, state, bad, P, Q,
                    iteration, last, low, high, V_FROM, TURNED, TOL, CHUNK,
                )  # fmt: skip
        node = group
        nodes = groups
        level += groups
        apart = apart * _FAN_IN


@triton.jit
def _find_v(
    parts,
    exponents,
    apart,
    size,
    v,
    state,
    bad,
    P,
    Q,
    iteration,
    last,
    low,
    high,
    FROM: tl.constexpr,
    TURNED: tl.constexpr,
    TOL: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Find v from the last partial sums, and say whether it is finite and whether rows moved."""
    moved = tl.load(state + _MOVED, cache_modifier=".cg")
    target = P.to(tl.float32)
    share = 1.0
    if FROM == _SCALED:
        share = _share(state, P, Q, TURNED)
        if not TURNED:
            final = last != 0
            if TOL:
                final = final | ((moved == 0) & (iteration >= 2))
            target = tl.where(final, target, target * share)
    live = tl.full((CHUNK,), 0, tl.int32)
    ill = tl.full((CHUNK,), 0, tl.int32)
    moves = tl.full((CHUNK,), 0, tl.int32)
    for chunk in range(0, Q, CHUNK):
        cols = chunk + tl.arange(0, CHUNK)
        valid = cols < Q
        total, power = _total(parts, exponents, apart, size, cols, Q, FROM, CHUNK)
        if FROM == _BARE:
            found = _first_scale(total, inverse_power(power), target)
            live += (valid & (found != 0)).to(tl.int32)
        else:
            before = tl.load(v + cols, mask=valid, other=0.0, cache_modifier=".cg")
            found, f = _next_scale(before, total, target)
            if TOL and TURNED:
                move = tl.where(iteration >= 3, f, tl.div_rn(f, share))
                moves |= (valid & (total != 0) & ((move >= low) & (move <= high) == 0)).to(tl.int32)
        ill |= (valid & ((tl.abs(found) <= LARGEST) == 0)).to(tl.int32)
        tl.debug_barrier()  # warps that hold the same columns have all loaded v, and `moved`
        tl.store(v + cols, found, mask=valid)
    if FROM == _BARE:
        tl.store(state + _LIVE_V, add_up(live, 0))
    if tl.reduce(ill, 0, tl.standard._elementwise_max) != 0:
        tl.store(bad, 1)
    if TOL and FROM == _SCALED:
        if TURNED:
            moved = tl.reduce(moves, 0, tl.standard._elementwise_max)
        if moved == 0:
            if iteration >= 2:
                tl.store(state + _SETTLED, 1)
        if not TURNED:
            tl.store(state + _MOVED, 0)
