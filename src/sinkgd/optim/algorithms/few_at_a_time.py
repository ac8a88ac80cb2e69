"""Steps that need scratch for every parameter: a few parameters at a time, to bound it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sinkgd.optim.algorithms.contract import Slot, most_held, on_mesh

# Beside weights and gradients; a larger parameter goes by itself. Not measured.
SCRATCH_BYTES = 64 << 20
# On a mesh, where every time costs messages of its own.
MESH_SCRATCH_BYTES = 256 << 20


def few_at_a_time(slots: Sequence[Slot], step: Callable[[Sequence[Slot]], Tensor]) -> Tensor:
    """Take a step of some slots after the other, and return the flags of all.

    All ranks of a mesh take the same ones together, whatever they hold of them.
    """
    limit = MESH_SCRATCH_BYTES if any(on_mesh(slot.param) for slot in slots) else SCRATCH_BYTES
    runs: list[list[Slot]] = []
    room = 0
    for slot in slots:
        size = 4 * most_held(slot.param)
        if size > room or not runs:
            runs.append([])
            room = limit
        runs[-1].append(slot)
        room -= size
    return torch.cat([step(run) for run in runs])
