"""Normalized gradient descent: each parameter by its own l2 norm. No state.

The rule for vectors and scalars where no state at all is wanted; a scalar moves by its sign.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkgd.kernels.eager import descend_
from sinkgd.norms import FrobeniusNorm
from sinkgd.optim.algorithms.contract import (
    Context,
    Group,
    Slot,
    allowed,
    are_finite,
    decay,
    descent,
)
from sinkgd.optim.algorithms.rounding import ROUNDING_OPTIONS, check_rounding, draw_keys


class Normalize:
    r"""Update :math:`\sqrt{k}\, g / \lVert g \rVert_2` for k entries: root-mean-square 1."""

    options = ROUNDING_OPTIONS

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range; every shape will do."""
        check_rounding(name, param, group)

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Tensor:
        """Normalize and update one by one. The update has no scale, so that of the loss is none."""
        finite = are_finite(slots)
        flags, keys = allowed(finite, context), draw_keys(slots, group)
        for i, slot in enumerate(slots):
            grad = slot.grad.to(torch.promote_types(slot.grad.dtype, torch.float32))
            update = FrobeniusNorm().project(grad.reshape(1, -1)).view_as(grad)
            descend_(
                slot.param,
                update,
                keep=decay(group),
                step=descent(group),
                allowed=None if flags is None else flags[i],
                key=None if keys is None else keys[i],
            )
        return finite
