"""The schedule of a descent: how matrices are cut into panels of rows, and put into buckets.

A bucket has the matrices that are launched together. They are of one `Kind`, and few enough for
their gradients to stay in the cache from the first launch to the update. A matrix that does not fit
into the cache has a bucket of its own. All iterations of a bucket run before the next bucket
begins. So does the update, unless it waits: the matrices of one parameter are written together, so
if they do not share a bucket, their update waits until all scales are found.

A schedule depends only on shapes, strides, types and alignment, so steps share it.

Letters: as in `sinkgd.kernels.triton.tables`, and
    A, B: columns of the two adjacent tiles that a row fills; B is 0 if one tile is enough
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.kernels.triton.half_iterations import AREA, PROGRAMS
from sinkgd.kernels.triton.tables import (
    DescentMatrix,
    DescentState,
    Operand,
    TableBuilder,
    padded,
    scale_offsets,
    vector_width,
)

LONGEST = 1 << 14  # entries of the longest row that a program keeps in registers
FEWEST_THREADS, MOST_THREADS = 64, 512
NARROWEST = 4  # columns of a tile
# The least number of rows of a program, except the last program of a matrix. In bfloat16, 20 rows
# have 40 bytes per column. The program's partial sums have at most an eighth of that: 5 bytes per
# column in the first launch, and 4 in the others.
FEWEST_ROWS = 20
FAN_IN = 8  # programs in a group, and groups in a larger group, whose sums one program adds up
# Entries of a panel for each thread. There are half as many in two cases: if loads are narrow,
# since their addresses take registers; and if a panel has fewer than FEW_ROWS rows, since the
# scales and sums of its columns then take nearly as many registers as its entries.
ENTRIES, FEW_ROWS = 64, 4


class Panel(NamedTuple):
    """BM whole rows in memory, in one tile or two adjacent ones.

    The panel decides the order in which numbers are added, and so the last bits of sums. It depends
    only on the shape of the matrix, so that equal matrices get equal sums.
    """

    BM: int
    A: int
    B: int


def panel_of(P: int, Q: int) -> Panel:
    """Return the panel of a matrix whose rows have at most `LONGEST` entries."""
    A = max(NARROWEST, _next_power_of_two(Q + 1) // 2)
    B = 0
    if Q > A:
        B = max(NARROWEST, A // 16, _next_power_of_two(Q - A))
    if B >= A:
        A, B = 2 * A, 0
    # Two tiles, or narrow loads, take more registers.
    area = AREA if B == 0 and _is_wide(Q) else AREA // 2
    BM = _next_power_of_two(area // (A + B) + 1) // 2
    return Panel(max(1, min(BM, _next_power_of_two(P))), A, B)


def threads_of(panel: Panel, Q: int) -> int:
    """Return how many threads work on a panel."""
    entries = ENTRIES if _is_wide(Q) and panel.BM >= FEW_ROWS else ENTRIES // 2
    whole = _next_power_of_two(panel.BM * (panel.A + panel.B))
    return min(max(FEWEST_THREADS, whole // entries), MOST_THREADS)


def half_panel(panel: Panel, threads: int) -> tuple[Panel, int]:
    """Return half a panel and half its threads, so that each thread can have more registers.

    A panel with the least number of threads is returned as it is. A panel of one row keeps the row.
    """
    if threads <= FEWEST_THREADS:
        return panel, threads
    return panel._replace(BM=max(1, panel.BM // 2)), threads // 2


def row_programs(matrix: int, P: int, panel: Panel) -> Tensor:
    """Divide the rows of a matrix among programs; return the fields of each `RowProgram`.

    A program has enough rows to make its partial sums small compared with its entries. A large
    matrix has enough programs for a whole GPU; a small one shares the GPU with others.
    """
    rows = -(-max(FEWEST_ROWS, P // PROGRAMS) // panel.BM) * panel.BM
    first = torch.arange(0, P, rows, dtype=torch.int64, device="cpu")
    number = torch.arange(len(first), dtype=torch.int64, device="cpu")
    end = (first + rows).clamp(max=P)
    return torch.stack([torch.full_like(first, matrix), number, first, end], dim=1)


def _is_wide(Q: int) -> bool:
    """Whether rows of Q entries can be read in loads of 16 bytes, whatever their dtype.

    Narrower loads need more registers for their addresses.
    """
    return Q % 8 == 0


def _next_power_of_two(x: int) -> int:
    """Return the least power of two that is not below ``x``."""
    return 1 << max(0, x - 1).bit_length()


class Kind(NamedTuple):
    """What kernels are compiled for."""

    dtype: torch.dtype  # of the gradient
    param_dtype: torch.dtype
    panel: Panel
    threads: int
    transposed: bool
    vector: int  # entries in 16 bytes if loads of the gradient are that wide, else 1
    # Entries of the narrower type in 16 bytes if loads of gradient and parameter are wide, else 1
    param_vector: int


class Bucket(NamedTuple):
    """What one launch works on; offsets count entries of the table."""

    kind: Kind
    matrices: int  # offset of its matrices
    programs: int  # offset of its programs
    program_count: int
    waits: bool  # whether its update waits for the scales of other buckets


class Schedule(NamedTuple):
    """Buckets, and the sizes of what they share."""

    buckets: tuple[Bucket, ...]
    table: Tensor  # int64, on the host
    rows: tuple[int, ...]  # for each tensor, the offset of its row scales among all scales
    cols: tuple[int, ...]  # the same for its column scales
    scales: int  # entries of all scales
    partial_sums: int  # entries of the partial sums of the largest bucket
    counters: int  # number of int32 counters: states, flags and numbers of arrivals
    nonfinite: tuple[int, int]  # where the owners' flags begin and end among the counters


class _Found(NamedTuple):
    """A matrix to put into a bucket."""

    kind: Kind
    owner: int
    size: int  # bytes
    matrix: DescentMatrix


@lru_cache(maxsize=64)
def schedule_of(
    grads: tuple[Operand, ...],
    params: tuple[Operand, ...],
    shapes: tuple[torch.Size, ...],
    owners: tuple[int, ...],
    bucket_bytes: int,
) -> Schedule:
    """Schedule a descent, in buckets of up to ``bucket_bytes`` of gradients.

    Args:
        grads: Gradients whose rows in memory fit in a panel.
        params: Their parameters, in the same order in memory; ``grads`` again if only scales are
            wanted.
        shapes: Shapes of the gradients.
        owners: For each gradient, the number of its owner, which is a parameter of the user;
            ascending from 0.
        bucket_bytes: Most bytes of gradients in a bucket; a larger matrix has a bucket of its own.
    """
    rows, cols, entries = scale_offsets(shapes)
    flags = len(DescentState._fields) * sum(len(grad.layout.offsets) for grad in grads)
    end = flags_end = flags + (owners[-1] + 1 if owners else 0)
    found = _find(grads, params, shapes, owners, (rows, cols), flags)
    filled = _fill(found, bucket_bytes)
    homes: dict[int, set[int]] = {}
    for i, members in enumerate(filled):
        for one in members:
            homes.setdefault(one.owner, set()).add(i)
    table = TableBuilder()
    buckets, partial_sums = [], 0
    for members in filled:
        matrices, programs, sums = [], [], 0
        for i, one in enumerate(members):
            P, Q = one.matrix.P, one.matrix.Q
            programs.append(row_programs(i, P, one.kind.panel))
            count = len(programs[-1])
            matrices.append(one.matrix._replace(partial_sums=sums, arrivals=end, programs=count))
            sums += padded(count * padded(Q)) + padded(-(-count * padded(Q) // 4))
            end += _groups(count)
        partial_sums = max(partial_sums, sums)
        for_matrices = table.add(torch.tensor(matrices, dtype=torch.int64, device="cpu"))
        for_programs = table.add(*programs)
        waits = any(len(homes[one.owner]) > 1 for one in members)
        kind = members[0].kind
        buckets.append(
            Bucket(kind, for_matrices.offset, for_programs.offset, for_programs.rows, waits)
        )
    return Schedule(
        tuple(buckets), table.build(), rows, cols, entries, partial_sums, end, (flags, flags_end)
    )


def _find(
    grads: tuple[Operand, ...],
    params: tuple[Operand, ...],
    shapes: tuple[torch.Size, ...],
    owners: tuple[int, ...],
    scales: tuple[tuple[int, ...], tuple[int, ...]],
    flags: int,
) -> list[_Found]:
    """List all matrices.

    Args:
        grads: As for `schedule_of`.
        params: As for `schedule_of`.
        shapes: As for `schedule_of`.
        owners: As for `schedule_of`.
        scales: Offsets of the row scales and of the column scales of each tensor.
        flags: Offset of the owners' flags.
    """
    found: list[_Found] = []
    rows, cols = scales
    for tensor, (grad, param, shape) in enumerate(zip(grads, params, shapes, strict=True)):
        P, Q, ld, transposed, offsets = grad.layout
        u, v = (cols[tensor], rows[tensor]) if transposed else (rows[tensor], cols[tensor])
        entry_steps = (1, shape[-1]) if transposed else (shape[-1], 1)
        panel = panel_of(P, Q)
        itemsizes = grad.dtype.itemsize, param.dtype.itemsize
        for i, (at, to) in enumerate(zip(offsets, param.layout.offsets, strict=True)):
            vector = vector_width(16 // itemsizes[0], (grad, at))
            param_vector = vector_width(16 // min(itemsizes), (grad, at), (param, to))
            threads = threads_of(panel, Q)
            kind = Kind(grad.dtype, param.dtype, panel, threads, transposed, vector, param_vector)
            matrix = DescentMatrix(
                tensor, at, P, Q, ld, u + i * P, v + i * Q, i * shape[-1],
                len(found) * len(DescentState._fields), flags + owners[tensor],
                to, param.layout.ld, i * P * Q, *entry_steps,
            )  # fmt: skip
            found.append(_Found(kind, owners[tensor], P * Q * itemsizes[0], matrix))
    return found


def _fill(found: Iterable[_Found], bucket_bytes: int) -> list[list[_Found]]:
    """Put matrices of one kind together, in order; those of one owner in one bucket if they fit."""
    units: dict[tuple[Kind, int], list[_Found]] = {}
    for one in found:
        units.setdefault((one.kind, one.owner), []).append(one)
    buckets: list[list[_Found]] = []
    open_: dict[Kind, tuple[list[_Found], int]] = {}
    for (kind, _), unit in units.items():
        whole = sum(one.size for one in unit) <= bucket_bytes
        for some in [unit] if whole else [[one] for one in unit]:
            size = sum(one.size for one in some)
            bucket, full = open_.get(kind, ([], 0))
            if not bucket or full + size > bucket_bytes:
                bucket, full = [], 0
                buckets.append(bucket)
            bucket.extend(some)
            open_[kind] = bucket, full + size
    return buckets


def _groups(programs: int) -> int:
    """Return the number of groups, each of up to `FAN_IN` programs or groups, on all levels."""
    groups = 0
    while True:
        programs = -(-programs // FAN_IN)
        groups += programs
        if programs == 1:
            return groups
