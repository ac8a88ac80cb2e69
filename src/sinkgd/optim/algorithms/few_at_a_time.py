"""Steps that need scratch for every parameter: a few parameters at a time, to bound it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sinkgd.optim.algorithms.contract import Slot, on_mesh

# Beside weights and gradients; a larger parameter goes by itself. Not measured.
SCRATCH_BYTES = 64 << 20


def few_at_a_time(slots: Sequence[Slot], step: Callable[[Sequence[Slot]], Tensor]) -> Tensor:
    """Take a step of some slots after the other, and return the flags of all.

    Parameters on a mesh go all at once, as their messages do: the scratch is then one float32 for
    every entry that this rank holds of the group.
    """
    if any(on_mesh(slot.param) for slot in slots):
        return step(slots)
    runs: list[list[Slot]] = []
    room = 0
    for slot in slots:
        size = 4 * slot.param.numel()
        if size > room:
            runs.append([])
            room = SCRATCH_BYTES
        runs[-1].append(slot)
        room -= size
    return torch.cat([step(run) for run in runs])
