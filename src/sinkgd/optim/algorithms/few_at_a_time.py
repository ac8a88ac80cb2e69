"""Steps that need scratch for every parameter: a few parameters at a time, to bound it.

On a mesh every run of parameters sends messages of its own. So what needs a copy of a gradient only
between two messages makes it again, for a few at a time, and runs are cut by what must be kept.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from sinkgd.exchange import Computation, Steps, computation
from sinkgd.optim.algorithms.contract import Context, Group, Slot, most_held, on_mesh

Some = TypeVar("Some")

# Beside weights and gradients; a larger parameter goes by itself. Not measured.
SCRATCH_BYTES = 64 << 20
# On a mesh, where every time costs messages of its own: copies of gradients, and vectors alone.
# Groups that step side by side share them.
MESH_SCRATCH_BYTES = 256 << 20
MESH_VECTOR_BYTES = 128 << 20


def few_at_a_time(
    slots: Sequence[Slot],
    step: Callable[[Sequence[Slot]], Computation[Tensor]],
    context: Context,
) -> Computation[Tensor]:
    """Take a step of some slots after the other, and return the flags of all.

    All ranks of a mesh take the same ones together, whatever they hold of them.
    """
    are_on_mesh = any(on_mesh(slot.param) for slot in slots)
    limit = MESH_SCRATCH_BYTES // context.sharers if are_on_mesh else SCRATCH_BYTES
    runs = cut([4 * most_held(slot.param) for slot in slots], limit)
    return in_turn([slots[run] for run in runs], step)


def count_sharers(groups: Iterable[tuple[Group, Sequence[Slot]]]) -> int:
    """Return how many groups on a mesh need scratch for every parameter, or 1 if none does."""
    sharers = [
        group
        for group, slots in groups
        if group.get("deflated_rank") or group.get("nesterov") or group.get("tiny_rows") == "mask"
        if any(on_mesh(slot.param) for slot in slots)
    ]
    return max(1, len(sharers))


@computation
def in_turn(runs: Iterable[Some], step: Callable[[Some], Computation[Tensor]]) -> Steps[Tensor]:
    """Take one step after the other, and return the flags of all."""
    flags: list[Tensor] = []
    for run in runs:
        found = yield step(run)
        flags += [found]
    return torch.cat(flags)


def cut(sizes: Sequence[int], limit: int) -> list[slice]:
    """Cut a sequence into runs whose sizes add up to no more than ``limit``, or of one member.

    >>> cut([3, 4, 9, 1, 1, 5], limit=7)
    [slice(0, 2, None), slice(2, 3, None), slice(3, 6, None)]
    """
    begins, total = [0], 0
    for i, size in enumerate(sizes):
        if total + size > limit and i > begins[-1]:
            begins.append(i)
            total = 0
        total += size
    return [slice(begin, end) for begin, end in zip(begins, [*begins[1:], len(sizes)], strict=True)]
