"""Bytes that a step moves from and to a GPU's memory, and its scratch, by the step's own schedule.

What is counted follows from the launches: a bucket that fits into its part of the cache comes from
memory once; of a larger one, which is walked in alternating direction, a launch finds what the
launch before read last. Partial sums and scales stay in the cache.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch

from sinkgd.kernels.layout import dense_layout
from sinkgd.kernels.triton.fields import Block
from sinkgd.kernels.triton.places import Source
from sinkgd.kernels.triton.schedule import Bucket, Schedule, schedule_of
from sinkgd.lab.bench.contenders import ITERATIONS
from sinkgd.lab.bench.gpu.models import CACHE_BYTES, matrices_of
from sinkgd.lab.bench.workloads import Shape

_ADAMW_PASSES = 7  # over an entry, as in sinkgd.lab.bench.contenders
_FLOAT = 4  # bytes of a scale, of a partial sum, of a number


class Scratch(NamedTuple):
    """Bytes of scratch as parts of the gradients' bytes."""

    of_bucket: float  # partial sums and scales of the worst bucket that is more than half full
    of_model: float  # everything that a step allocates


def schedule_of_model(model: str, dtype: torch.dtype = torch.bfloat16) -> Schedule:
    """Return the schedule of a step of a model's hidden matrices on an H100."""
    return schedule(matrices_of(model), dtype)


def schedule(shapes: Sequence[Shape], dtype: torch.dtype) -> Schedule:
    """Return the schedule of contiguous gradients and parameters of one type."""
    sizes = tuple(map(torch.Size, shapes))
    layouts = (dense_layout(torch.empty(size, dtype=dtype, device="meta")) for size in sizes)
    sources = tuple(Source(dtype, layout, aligned=True) for layout in layouts)
    return schedule_of(sources, sources, sizes, tuple(range(len(sizes))), CACHE_BYTES)


def bytes_of_step(model: str, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the bytes that a plain step moves, as a multiple of what fused AdamW's moves."""
    size = dtype.itemsize * sum(map(prod, matrices_of(model)))
    found = schedule_of_model(model, dtype)
    moved = sum(_moved(bucket, found, dtype.itemsize) for bucket in found.buckets)
    return moved / (_ADAMW_PASSES * size)


def _moved(bucket: Bucket, whole: Schedule, itemsize: int) -> int:
    size = sum(block.P * block.Q for block in blocks_of(bucket, whole)) * itemsize
    missed = max(0, size - CACHE_BYTES)  # of a reading that follows another
    readings = ITERATIONS[0] + 1
    again = size if bucket.waits else missed  # the update comes after all other buckets
    return size + (readings - 2) * missed + again + 2 * size


def scratch_of_model(model: str, dtype: torch.dtype = torch.bfloat16) -> Scratch:
    """Return what a plain step needs beside gradients and parameters."""
    found = schedule_of_model(model, dtype)
    shares = []
    total = 0
    for bucket in found.buckets:
        blocks = blocks_of(bucket, found)
        size = sum(block.P * block.Q for block in blocks) * dtype.itemsize
        scales = sum(block.P + block.Q for block in blocks)
        parts = max(block.parts + _partial(block) for block in blocks)
        total += size
        if size > CACHE_BYTES // 2:
            shares.append(_FLOAT * (parts + scales) / size)
    allocated = found.partial + found.scales + found.numbers + 2 * found.table.numel()
    return Scratch(max(shares), _FLOAT * allocated / total)


def _partial(block: Block) -> int:
    """Return the floats of a matrix's partial sums: a float and a byte for each column."""
    return -(-5 * block.programs * block.Q // 4)


def blocks_of(bucket: Bucket, whole: Schedule) -> list[Block]:
    """Return the matrices of a bucket."""
    width = len(Block._fields)
    rows = whole.table[bucket.blocks : bucket.walks].view(-1, width).tolist()
    return [Block(*row) for row in rows]


def launches_of_bucket() -> int:
    """Return the launches that a bucket takes in a plain step."""
    from sinkgd.lab.bench.gpu.launches import step_of, taken_down

    with taken_down() as launches:
        step_of([(2048, 2048)] * 2)
    return len(launches)
