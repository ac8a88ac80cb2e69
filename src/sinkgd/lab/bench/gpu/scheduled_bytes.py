"""Bytes that a step moves from and to a GPU's memory, and its scratch, found from its schedule.

A bucket is a set of matrices that are launched together. A bucket that fits into half of the cache
is read from memory once, and once more if its update waits for other buckets. A larger bucket is
read in alternating directions, so a launch finds in the cache what the previous launch read last.
Partial sums and scales stay in the cache.
"""

from math import prod
from typing import NamedTuple

import torch

from sinkgd.kernels.layout import dense_layout
from sinkgd.kernels.triton.schedule import Bucket, Schedule, schedule_of
from sinkgd.kernels.triton.tables import DescentMatrix, Operand
from sinkgd.lab.bench.contenders import ITERATIONS
from sinkgd.lab.bench.gpu.cases import CACHE_BYTES, matrices_of

_ADAMW_PASSES = 7  # reads and writes per entry, as in sinkgd.lab.bench.contenders
_FLOAT = 4  # bytes of a scale, a partial sum or a counter


class Scratch(NamedTuple):
    """Bytes of scratch, divided by the gradients' bytes."""

    of_bucket: float  # partial sums and scales, in the worst bucket that is more than half full
    of_model: float  # everything that a step allocates


def schedule_of_model(model: str, dtype: torch.dtype = torch.bfloat16) -> Schedule:
    """Return the schedule of a step of a model's hidden matrices on an H100.

    Gradients and parameters are contiguous, and of one type.
    """
    shapes = tuple(map(torch.Size, matrices_of(model)))
    layouts = (dense_layout(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes)
    operands = tuple(Operand(dtype, layout, aligned=True) for layout in layouts)
    return schedule_of(operands, operands, shapes, tuple(range(len(shapes))), CACHE_BYTES)


def bytes_of_step(model: str, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the bytes that a plain step moves, as a multiple of those of fused AdamW."""
    size = dtype.itemsize * sum(map(prod, matrices_of(model)))
    found = schedule_of_model(model, dtype)
    moved = sum(_moved(bucket, found, dtype.itemsize) for bucket in found.buckets)
    return moved / (_ADAMW_PASSES * size)


def _moved(bucket: Bucket, whole: Schedule, itemsize: int) -> int:
    size = sum(matrix.P * matrix.Q for matrix in matrices_in(bucket, whole)) * itemsize
    missed = max(0, size - CACHE_BYTES)  # bytes that a second reading does not find in the cache
    readings = ITERATIONS[0] + 1
    # An update that waits comes after all other buckets, and finds nothing in the cache.
    again = size if bucket.waits else missed
    return size + (readings - 2) * missed + again + 2 * size


def scratch_of_model(model: str, dtype: torch.dtype = torch.bfloat16) -> Scratch:
    """Return the memory that a plain step allocates, as fractions of the gradients' bytes."""
    found = schedule_of_model(model, dtype)
    shares = []
    total = 0
    for bucket in found.buckets:
        matrices = matrices_in(bucket, found)
        size = sum(matrix.P * matrix.Q for matrix in matrices) * dtype.itemsize
        scales = sum(matrix.P + matrix.Q for matrix in matrices)
        partial_sums = max(matrix.partial_sums + _partial(matrix) for matrix in matrices)
        total += size
        if size > CACHE_BYTES // 2:
            shares.append(_FLOAT * (partial_sums + scales) / size)
    allocated = found.partial_sums + found.scales + found.counters + 2 * found.table.numel()
    return Scratch(max(shares), _FLOAT * allocated / total)


def _partial(matrix: DescentMatrix) -> int:
    """Return the size of a matrix's partial sums, in floats.

    Each program writes a float and a byte per column.
    """
    return -(-5 * matrix.programs * matrix.Q // 4)


def matrices_in(bucket: Bucket, whole: Schedule) -> list[DescentMatrix]:
    """Return the matrices of a bucket."""
    width = len(DescentMatrix._fields)
    rows = whole.table[bucket.matrices : bucket.programs].view(-1, width).tolist()
    return [DescentMatrix(*row) for row in rows]
