"""Column scales that are carried from one step to the next, so that fewer iterations are enough.

The scales of a gradient are close to those of the step before. One vector a parameter is kept,
``state[param]["col_scale"]``: float32, the n column scales of each of its matrices, one after the
other. It is a starting point and no average: iterated long enough, every start ends at the same
update.
"""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sinkgd.kernels import Descent, Scales
from sinkgd.optim.algorithms.contract import Context, Slot, allowed

COL_SCALE = "col_scale"
# The smallest start, in units of the largest. Its square times that of an entry stays in float32.
SMALLEST = 2.0**-40


def starts_of(state: MutableMapping[str, Any], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """Return where the iterations of each matrix of a parameter begin: ``(..., 1, n)``, or None."""
    if COL_SCALE not in state:
        return [None] * len(grads)
    shapes = [(*grad.shape[:-2], 1, grad.shape[-1]) for grad in grads]
    parts = state[COL_SCALE].split([torch.Size(shape).numel() for shape in shapes])
    return [
        part.view(shape).to(torch.promote_types(grad.dtype, torch.float32))
        for part, shape, grad in zip(parts, shapes, grads, strict=True)
    ]


def init_starts(state: MutableMapping[str, Any], grads: Sequence[Tensor]) -> None:
    """Begin the iterations of each matrix of a parameter from ones, as without a start."""
    entries = sum(grad[..., 0, :].numel() for grad in grads)
    state[COL_SCALE] = torch.ones(entries, dtype=torch.float32, device=grads[0].device)


def keep_starts(
    state: MutableMapping[str, Any], scales: Sequence[Scales], allowed: Tensor | None
) -> None:
    """Keep the column scales of each matrix of a parameter; not where ``allowed`` is False."""
    found = torch.cat([_start(col).flatten() for _, col in scales])
    if COL_SCALE not in state:
        state[COL_SCALE] = torch.ones_like(found)
    if allowed is not None:
        found = torch.where(allowed, found, state[COL_SCALE])
    state[COL_SCALE].copy_(found)


def starts_of_slots(
    slots: Sequence[Slot], grads: Sequence[Tensor], owners: Sequence[range], context: Context
) -> list[Tensor | None]:
    """Return where the iterations of each matrix of some parameters begin."""
    starts: list[Tensor | None] = []
    for slot, own in zip(slots, owners, strict=True):
        starts += starts_of(context.states[slot.param], [grads[i] for i in own])
    return starts


def keep_starts_of_slots(
    slots: Sequence[Slot], owners: Sequence[range], found: Descent, context: Context
) -> None:
    """Keep what a step found, for the next one, where gradients are finite."""
    flags = allowed(found.finite, context)
    for i, (slot, own) in enumerate(zip(slots, owners, strict=True)):
        flag = None if flags is None else flags[i]
        keep_starts(context.states[slot.param], [found.scales[k] for k in own], flag)


def _start(col: Tensor) -> Tensor:
    """Column scales in units of the largest, so that they are in (0, 1]; 1 for a zero column."""
    unit = col.float() / col.amax(dim=-1, keepdim=True).float()
    return torch.where(unit > 0, unit.clamp(min=SMALLEST), 1)  # where all are zero they are NaN
