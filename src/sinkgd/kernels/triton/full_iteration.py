"""The kernel of a descent that reads the gradient once per iteration.

Letters: as in `sinkgd.kernels.triton.tables` and `sinkgd.kernels.triton.schedule`, and
    g: entries of the gradient
    y: the scaled gradient, u * g * v; the kernel sums its squares
    f: the factor by which the squares of y in a row grow with the row's new scale

One launch of `full_iteration` is one iteration. A program keeps whole rows in registers: it sums
their squares, finds u from the sums, and sums the columns of the same squares, scaled by the new u.
It does so for some panels of rows, one after the other, and then stores one partial sum for each
column. Programs form groups of up to eight neighbors: the last one to arrive adds up the partial
sums of its group. Groups form groups of eight in the same way, and so on; the last program of all
finds v. No program waits, and no sum depends on the order of arrival.

When a scale is found for the first time, entries of the gradient may have any magnitude. Those of a
row or column are then divided by a power of two before they are squared. The powers of columns are
stored next to the partial sums. Later, the rows or columns of y already have the right length, and
their squares stay in range.
"""

import triton
import triton.language as tl

from sinkgd.kernels.triton.primitives import (
    LARGEST,
    LOWEST_POWER,
    field,
    inverse_power,
    load_tile,
    matrix_at,
    peak_powers,
    row_length,
    sum_along,
)
from sinkgd.kernels.triton.schedule import FAN_IN
from sinkgd.kernels.triton.tables import (
    GIVEN,
    SCALED,
    UNSCALED,
    DescentMatrix,
    DescentState,
    RowProgram,
)

_GIVEN, _UNSCALED, _SCALED = tl.constexpr(GIVEN), tl.constexpr(UNSCALED), tl.constexpr(SCALED)

_MATRIX = tl.constexpr(len(DescentMatrix._fields))
_TENSOR, _OFFSET = field(DescentMatrix, "tensor"), field(DescentMatrix, "offset")
_P, _Q, _LD = field(DescentMatrix, "P"), field(DescentMatrix, "Q"), field(DescentMatrix, "ld")
_U, _V, _START = field(DescentMatrix, "u"), field(DescentMatrix, "v"), field(DescentMatrix, "start")
_STATE, _NONFINITE = field(DescentMatrix, "state"), field(DescentMatrix, "nonfinite")
_PARTIAL_SUMS, _ARRIVALS = field(DescentMatrix, "partial_sums"), field(DescentMatrix, "arrivals")
_PROGRAMS = field(DescentMatrix, "programs")

_NONZERO_U, _NONZERO_V = field(DescentState, "nonzero_u"), field(DescentState, "nonzero_v")
_MOVED, _CONVERGED = field(DescentState, "moved"), field(DescentState, "converged")

_PROGRAM, _NUMBER = tl.constexpr(len(RowProgram._fields)), field(RowProgram, "number")
_FIRST, _END = field(RowProgram, "first"), field(RowProgram, "end")

_FAN_IN = tl.constexpr(FAN_IN)


@triton.jit
def program_and_matrix(table, matrices, programs, count, flip):
    """Return pointers to this program's `RowProgram` and to its `DescentMatrix`."""
    number = tl.program_id(0)
    if flip != 0:
        number = count - 1 - number
    program = table + programs + number * _PROGRAM
    return program, table + matrices + tl.load(program) * _MATRIX


@triton.jit
def _first_scale(total, inverse, target):
    """Return the scale that brings a sum of squares of unscaled entries to ``target``.

    The entries were multiplied by ``inverse``, a power of two, before they were squared.
    """
    scale = tl.sqrt_rn(tl.div_rn(target, total)) * inverse
    scale = tl.where(scale > LARGEST, LARGEST, scale)
    scale = tl.where(total <= LARGEST, scale, float("nan"))
    return tl.where(total == 0, 0.0, scale)


@triton.jit
def _next_scale(before, total, target):
    """Return the scale that brings a sum of squares to ``target``, and how the squares grow.

    The scale ``before`` is a factor of the entries that were squared.
    """
    f = tl.div_rn(target, total)
    f = tl.where(total == 0, 0.0, f)
    return before * tl.sqrt_rn(f), f


@triton.jit
def find_u(
    u, rows, valid, gA, gB, vA, vB, target, B: tl.constexpr, FROM: tl.constexpr, ONES: tl.constexpr
):
    """Find u of a panel.

    Returns:
        The new u; the squares of y = u * g * v with the previous u, for both tiles; f; the sums of
        these squares along rows. If there is no previous u, an inverse power of two takes its place
        in y.
    """
    if FROM == _UNSCALED:
        yA, yB = gA, gB
        if not ONES:
            yA = yA * vA[None, :]
            if B > 0:
                yB = yB * vB[None, :]
        power = peak_powers(yA, 1)
        if B > 0:
            power = tl.maximum(power, peak_powers(yB, 1))
        inverse = inverse_power(power)
        yA = yA * inverse[:, None]
        sA = yA * yA
        total = sum_along(sA, 1)
        if B > 0:
            yB = yB * inverse[:, None]
            sB = yB * yB
            total += sum_along(sB, 1)
        else:
            sB = gB
        found = _first_scale(total, inverse, target)
        f = found * power
        f = f * f
    else:
        before = tl.load(u + rows, mask=valid, other=0.0)
        yA = (gA * before[:, None]) * vA[None, :]
        sA = yA * yA
        total = sum_along(sA, 1)
        if B > 0:
            yB = (gB * before[:, None]) * vB[None, :]
            sB = yB * yB
            total += sum_along(sB, 1)
        else:
            sB = gB
        # Every thread computes this, so a fast root with 23 correct bits is used. f is the square
        # of the growth of u.
        grown = tl.where(total == 0, 0.0, tl.rsqrt(total * tl.div_rn(1.0, target)))
        found = before * grown
        f = grown * grown
    return found, sA, sB, f, total


@triton.jit
def _add_unscaled(g, u, sums, powers):
    """Add the column sums of the squares of u * g to ``sums``, in units of squared ``powers``.

    Returns the new sums and the new powers.
    """
    y = g * u[:, None]
    higher = tl.maximum(powers, peak_powers(y, 0))
    quotient = powers * inverse_power(higher)
    y = y * inverse_power(higher)[None, :]
    return sums * (quotient * quotient) + sum_along(y * y, 0), higher


@triton.jit
def _exponent(power):
    return ((power.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.int8)


@triton.jit
def _power(exponent):
    return ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _store_partial_sums(partial_sums, exponents, cols, Q, sums, powers, FROM: tl.constexpr):
    tl.store(partial_sums + cols, sums, mask=cols < Q)
    if FROM == _UNSCALED:
        tl.store(exponents + cols, _exponent(powers), mask=cols < Q)


@triton.jit
def _group_total(
    partial_sums, exponents, stride, size, cols, Q, FROM: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Add up the partial sums of at most eight programs or groups; return sums and powers."""
    k = tl.arange(0, _FAN_IN)
    at = k.to(tl.int64)[:, None] * stride + cols[None, :]
    read = (k < size)[:, None] & (cols < Q)[None, :]
    sums = tl.load(partial_sums + at, mask=read, other=0.0, cache_modifier=".cg")
    if FROM == _UNSCALED:
        powers = _power(tl.load(exponents + at, mask=read, other=-126, cache_modifier=".cg"))
        highest = tl.reduce(powers, 0, tl.standard._elementwise_max)
        quotient = powers * inverse_power(highest)[None, :]
        sums = sums * (quotient * quotient)
    else:
        highest = tl.full((CHUNK,), 1.0, tl.float32)
    return sum_along(sums, 0), highest


@triton.jit
def _share(state, P, Q, TRANSPOSED: tl.constexpr):
    """Return the factor of a target that accounts for zero rows and columns.

    A row or column whose scale is zero adds nothing to the sum of all squares. Both sides must aim
    at the same sum, or the scales would drift apart by a factor in every iteration.
    """
    nonzero_u = tl.load(state + _NONZERO_U, cache_modifier=".cg").to(tl.float32)
    nonzero_v = tl.load(state + _NONZERO_V, cache_modifier=".cg").to(tl.float32)
    rows, cols = P.to(tl.float32), Q.to(tl.float32)
    if TRANSPOSED:
        return tl.div_rn(nonzero_v, cols) * tl.div_rn(rows, nonzero_u)
    return tl.div_rn(nonzero_u, rows) * tl.div_rn(cols, nonzero_v)


@triton.jit(
    do_not_specialize=["matrices", "programs", "count", "flip", "iteration", "last", "low", "high"]
)
def full_iteration(
    grads,  # addresses
    starts,  # addresses of initial column scales, or 0; read if STARTED
    table,
    scales,
    all_partial_sums,
    counters,  # int32: `DescentState` of matrices, flags of parameters, arrivals of programs
    matrices,  # where the matrices of this launch begin in the table
    programs,  # where the programs of this launch begin in the table
    count,  # number of programs
    flip,  # whether the first program takes the last rows, the second the rows before, and so on
    iteration,  # number of the iteration whose v this launch finds, from 1
    last,  # whether this iteration is the last
    low,  # the least quotient of squared scales that counts as no movement
    high,  # the largest one
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    U_FROM: tl.constexpr,
    V_FROM: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # a row in memory is a column of the matrix
    STARTED: tl.constexpr,  # whether some tensor has initial column scales
    TOL: tl.constexpr,  # whether converged matrices are skipped
    CHUNK: tl.constexpr,  # columns whose partial sums are added up at a time
    VECTOR: tl.constexpr,  # entries in 16 bytes if loads are that wide, else 1
):
    """Find u from v, then v from u, and read the gradient once.

    The v of a transposed matrix are its row scales. For such a matrix the first launch is given u,
    and the last u is found after all iterations, by `finish`.
    """
    program, matrix = program_and_matrix(table, matrices, programs, count, flip)
    state = counters + tl.load(matrix + _STATE)
    if TOL:
        if tl.load(state + _CONVERGED) != 0:
            return
    number = tl.load(program + _NUMBER).to(tl.int32)
    first = tl.load(program + _FIRST).to(tl.int32)
    end = tl.load(program + _END).to(tl.int32)
    P = tl.load(matrix + _P).to(tl.int32)
    Q = row_length(matrix + _Q, VECTOR)
    tensor = tl.load(matrix + _TENSOR)
    base, ld = matrix_at(grads + tensor, matrix + _OFFSET, matrix + _LD, DTYPE, VECTOR)
    begin = tl.full((), 0, tl.int64)
    if STARTED:
        begin = tl.load(starts + tensor)
    start = begin.to(tl.pointer_type(tl.float32)) + tl.load(matrix + _START)
    u = scales + tl.load(matrix + _U)
    v = scales + tl.load(matrix + _V)
    colsA = tl.arange(0, A)
    colsB = A + tl.arange(0, B if B > 0 else A)

    vA = tl.full((A,), 1.0, tl.float32)
    vB = tl.full((B if B > 0 else A,), 1.0, tl.float32)
    if U_FROM != _GIVEN:
        if U_FROM == _UNSCALED and not TRANSPOSED:
            if STARTED:
                given = tl.where(begin != 0, Q, 0)
                vA = tl.load(start + colsA, mask=colsA < given, other=1.0)
                if B > 0:
                    vB = tl.load(start + colsB, mask=colsB < given, other=1.0)
        else:
            vA = tl.load(v + colsA, mask=colsA < Q, other=0.0)
            if B > 0:
                vB = tl.load(v + colsB, mask=colsB < Q, other=0.0)

    target = Q.to(tl.float32)  # the sum of the squares of a row with its new scale
    share = 1.0
    if U_FROM == _SCALED and (TRANSPOSED or TOL):
        share = _share(state, P, Q, TRANSPOSED)
        if TRANSPOSED:
            target = target * share

    sumsA = tl.full((A,), 0.0, tl.float32)
    sumsB = tl.full((B if B > 0 else A,), 0.0, tl.float32)
    powersA = tl.full((A,), LOWEST_POWER, tl.float32)
    powersB = tl.full((B if B > 0 else A,), LOWEST_POWER, tl.float32)
    nonzero = tl.full((BM,), 0, tl.int32)
    moves = tl.full((BM,), 0, tl.int32)
    for panel in range(first, end, BM):
        rows = panel + tl.arange(0, BM)
        valid = rows < end
        gA = load_tile(base, ld, rows, colsA, valid[:, None] & (colsA < Q)[None, :])
        if B > 0:
            gB = load_tile(base, ld, rows, colsB, valid[:, None] & (colsB < Q)[None, :])
        else:
            gB = gA
        if U_FROM == _GIVEN:
            given = tl.where(begin != 0, end, 0)
            found = tl.load(start + rows, mask=rows < given, other=1.0)
        else:
            found, sA, sB, f, total = find_u(
                u, rows, valid, gA, gB, vA, vB, target, B, U_FROM, not TRANSPOSED and not STARTED
            )
            if U_FROM == _UNSCALED:
                nonzero += (found != 0).to(tl.int32)
            if TOL and (U_FROM == _SCALED and not TRANSPOSED):
                move = tl.where(iteration >= 3, f, tl.div_rn(f, share))
                moves |= (valid & (total != 0) & ((move >= low) & (move <= high) == 0)).to(tl.int32)
            tl.debug_barrier()  # all warps that work on the same rows have loaded u
            tl.store(u + rows, found, mask=valid)
        if V_FROM == _UNSCALED:
            sumsA, powersA = _add_unscaled(gA, found, sumsA, powersA)
            if B > 0:
                sumsB, powersB = _add_unscaled(gB, found, sumsB, powersB)
        else:
            sumsA += sum_along(sA * f[:, None], 0)
            if B > 0:
                sumsB += sum_along(sB * f[:, None], 0)
    if U_FROM == _UNSCALED:
        tl.atomic_add(state + _NONZERO_U, sum_along(nonzero, 0), sem="relaxed")
    if TOL and (U_FROM == _SCALED and not TRANSPOSED):
        if tl.reduce(moves, 0, tl.standard._elementwise_max) != 0:
            tl.store(state + _MOVED, 1)

    matrix_programs = tl.load(matrix + _PROGRAMS).to(tl.int32)
    stride = (Q + 3) // 4 * 4
    partial_sums = all_partial_sums + tl.load(matrix + _PARTIAL_SUMS)
    exponents = (partial_sums + matrix_programs.to(tl.int64) * stride).to(tl.pointer_type(tl.int8))
    own = number.to(tl.int64) * stride
    _store_partial_sums(partial_sums + own, exponents + own, colsA, Q, sumsA, powersA, V_FROM)
    if B > 0:
        _store_partial_sums(partial_sums + own, exponents + own, colsB, Q, sumsB, powersB, V_FROM)

    arrivals = counters + tl.load(matrix + _ARRIVALS)
    nonfinite = counters + tl.load(matrix + _NONFINITE)
    node = number  # a program, and on higher levels a group
    nodes = matrix_programs
    node_stride = stride.to(tl.int64)  # from the sums of a node to those of its neighbor
    level = 0  # where the arrivals of this level begin
    going = True
    while going:
        group = node // _FAN_IN
        groups = (nodes + _FAN_IN - 1) // _FAN_IN
        size = tl.minimum(nodes - group * _FAN_IN, _FAN_IN)
        tl.debug_barrier()  # the stores of other threads come before the arrival of this thread
        arrived = tl.atomic_add(arrivals + level + group, 1, sem="acq_rel")
        going = False
        if arrived == size - 1:
            tl.store(arrivals + level + group, 0)
            group_sums = partial_sums + (group * _FAN_IN) * node_stride
            group_exponents = exponents + (group * _FAN_IN) * node_stride
            if groups > 1:
                for chunk in range(0, Q, CHUNK):
                    cols = chunk + tl.arange(0, CHUNK)
                    sums, powers = _group_total(
                        group_sums, group_exponents, node_stride, size, cols, Q, V_FROM, CHUNK
                    )
                    _store_partial_sums(group_sums, group_exponents, cols, Q, sums, powers, V_FROM)
                going = True
            else:
                _find_v(
                    group_sums, group_exponents, node_stride, size, v, state, nonfinite, P, Q,
                    iteration, last, low, high, V_FROM, TRANSPOSED, TOL, CHUNK,
                )  # fmt: skip
        node = group
        nodes = groups
        level += groups
        node_stride = node_stride * _FAN_IN


@triton.jit
def _find_v(
    partial_sums,
    exponents,
    node_stride,
    size,
    v,
    state,
    nonfinite,
    P,
    Q,
    iteration,
    last,
    low,
    high,
    FROM: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TOL: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Find v from the last partial sums; store whether it is finite and has converged."""
    moved = tl.load(state + _MOVED, cache_modifier=".cg")
    target = P.to(tl.float32)
    share = 1.0
    if FROM == _SCALED:
        share = _share(state, P, Q, TRANSPOSED)
        if not TRANSPOSED:
            final = last != 0
            if TOL:
                final = final | ((moved == 0) & (iteration >= 2))
            target = tl.where(final, target, target * share)
    nonzero = tl.full((CHUNK,), 0, tl.int32)
    bad = tl.full((CHUNK,), 0, tl.int32)
    moves = tl.full((CHUNK,), 0, tl.int32)
    for chunk in range(0, Q, CHUNK):
        cols = chunk + tl.arange(0, CHUNK)
        valid = cols < Q
        total, power = _group_total(
            partial_sums, exponents, node_stride, size, cols, Q, FROM, CHUNK
        )
        if FROM == _UNSCALED:
            found = _first_scale(total, inverse_power(power), target)
            nonzero += (valid & (found != 0)).to(tl.int32)
        else:
            before = tl.load(v + cols, mask=valid, other=0.0, cache_modifier=".cg")
            found, f = _next_scale(before, total, target)
            if TOL and TRANSPOSED:
                move = tl.where(iteration >= 3, f, tl.div_rn(f, share))
                moves |= (valid & (total != 0) & ((move >= low) & (move <= high) == 0)).to(tl.int32)
        bad |= (valid & ((tl.abs(found) <= LARGEST) == 0)).to(tl.int32)
        tl.debug_barrier()  # all warps that work on the same columns have loaded v and `moved`
        tl.store(v + cols, found, mask=valid)
    if FROM == _UNSCALED:
        tl.store(state + _NONZERO_V, sum_along(nonzero, 0))
    if tl.reduce(bad, 0, tl.standard._elementwise_max) != 0:
        tl.store(nonfinite, 1)
    if TOL and FROM == _SCALED:
        if TRANSPOSED:
            moved = tl.reduce(moves, 0, tl.standard._elementwise_max)
        if moved == 0:
            if iteration >= 2:
                tl.store(state + _CONVERGED, 1)
        if not TRANSPOSED:
            tl.store(state + _MOVED, 0)
