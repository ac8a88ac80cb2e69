"""Chunks of parameters: a step that needs scratch memory per parameter updates a few at a time.

On a mesh every chunk sends its own messages. So that few chunks are enough, their size is limited
only by what must stay in memory while messages are sent; a copy of a gradient that is needed only
between two messages is created anew each time.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from sinkgd.distributed.shards import is_dtensor, largest_shard_size
from sinkgd.exchange import Computation, Steps, computation
from sinkgd.optim.method import Context, Slot

Some = TypeVar("Some")

# Scratch memory of a chunk, in addition to weights and gradients. A parameter that needs more is a
# chunk by itself. Not measured.
SCRATCH_BYTES = 64 << 20
# The same on a mesh, where every chunk costs messages: for copies of gradients, and for vectors.
# The groups of a step share these bytes.
MESH_SCRATCH_BYTES = 256 << 20
MESH_VECTOR_BYTES = 128 << 20


def step_in_chunks(
    slots: Sequence[Slot],
    step: Callable[[Sequence[Slot]], Computation[Tensor]],
    context: Context,
) -> Computation[Tensor]:
    """Update parameters chunk by chunk, and return the flags of all.

    Chunks are the same on all ranks of a mesh, whichever shards a rank holds.
    """
    are_on_mesh = any(is_dtensor(slot.param) for slot in slots)
    limit = MESH_SCRATCH_BYTES // context.sharers if are_on_mesh else SCRATCH_BYTES
    chunks = chunk_slices([4 * largest_shard_size(slot.param) for slot in slots], limit)
    return in_sequence([slots[chunk] for chunk in chunks], step)


@computation
def in_sequence(
    chunks: Iterable[Some], step: Callable[[Some], Computation[Tensor]]
) -> Steps[Tensor]:
    """Take one step after the other, and return the flags of all."""
    flags: list[Tensor] = []
    for chunk in chunks:
        found = yield step(chunk)
        flags += [found]
    return torch.cat(flags)


def chunk_slices(sizes: Sequence[int], limit: int) -> list[slice]:
    """Cut a sequence into chunks with a sum of at most ``limit``, or with a single member.

    >>> chunk_slices([3, 4, 9, 1, 1, 5], limit=7)
    [slice(0, 2, None), slice(2, 3, None), slice(3, 6, None)]
    """
    begins, total = [0], 0
    for i, size in enumerate(sizes):
        if total + size > limit and i > begins[-1]:
            begins.append(i)
            total = 0
        total += size
    return [slice(begin, end) for begin, end in zip(begins, [*begins[1:], len(sizes)], strict=True)]
