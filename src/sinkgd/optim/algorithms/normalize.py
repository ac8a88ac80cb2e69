"""Normalized gradient descent: each parameter by its own l2 norm. No state.

The rule for vectors and scalars where no state at all is wanted; a scalar moves by its sign.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkgd.kernels.eager import descend_
from sinkgd.norms import FrobeniusNorm
from sinkgd.optim.algorithms.contract import Context, Group, Slot, are_finite, decay, descent
from sinkgd.optim.algorithms.rounding import ROUNDING_OPTIONS, check_rounding, draw_keys


class Normalize:
    r"""Update :math:`\sqrt{k}\, g / \lVert g \rVert_2` for k entries: root-mean-square 1."""

    options = ROUNDING_OPTIONS

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range; every shape will do."""
        check_rounding(name, param, group)

    def read(self, slots: Sequence[Slot], group: Group, context: Context) -> "_NormalizeStep":
        """Check the gradients. The update has no scale, so the loss scale does not matter."""
        del context
        return _NormalizeStep(slots, group)


class _NormalizeStep:
    def __init__(self, slots: Sequence[Slot], group: Group) -> None:
        self.slots, self.group = slots, group
        self.finite = are_finite([slot.grad for slot in slots])

    def write(self, allowed: Tensor | None) -> None:
        keys = draw_keys(self.slots, self.group)
        for i, slot in enumerate(self.slots):
            grad = slot.grad.to(torch.promote_types(slot.grad.dtype, torch.float32))
            update = FrobeniusNorm().project(grad.reshape(1, -1)).view_as(grad)
            descend_(
                slot.param,
                update,
                keep=decay(self.group),
                step=descent(self.group),
                allowed=None if allowed is None else allowed[i],
                key=None if keys is None else keys[i],
            )
