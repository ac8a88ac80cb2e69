"""Normalized gradient descent: each parameter by its own l2 norm. No state.

The rule for vectors and scalars where no state at all is wanted; a scalar moves by its sign.
"""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sinkgd.exchange import Steps, computation
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
    local,
    on_mesh,
)
from sinkgd.optim.algorithms.rounding import ROUNDING_OPTIONS, check_rounding, draw_keys


class Normalize:
    r"""Update :math:`\sqrt{k}\, g / \lVert g \rVert_2` for k entries: root-mean-square 1."""

    options = ROUNDING_OPTIONS

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range; every shape will do."""
        check_rounding(name, param, group)

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """There is none."""

    @computation
    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
        """Normalize and update one by one. The update has no scale, so that of the loss is none."""
        finite: Tensor = yield are_finite(slots)
        flags, keys = allowed(finite, context), draw_keys(slots, group)
        lengths = yield _lengths_on_mesh(slots)
        for i, slot in enumerate(slots):
            grad = local(slot.grad)
            grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
            if i in lengths:
                update = grad * torch.where(lengths[i] == 0, 0, 1 / lengths[i]).to(grad.dtype)
            else:
                update = FrobeniusNorm().project(grad.reshape(1, -1)).view_as(grad)
            descend_(
                local(slot.param),
                update,
                keep=decay(group),
                step=descent(group),
                allowed=None if flags is None else flags[i],
                key=None if keys is None else keys[i],
            )
        return finite


@computation
def _lengths_on_mesh(slots: Sequence[Slot]) -> Steps[dict[int, Tensor]]:
    """Return the root-mean-square of gradients that lie in pieces, float64, by their slot."""
    on_meshes = {i: slot.grad for i, slot in enumerate(slots) if on_mesh(slot.grad)}
    if not on_meshes:
        return {}
    from sinkgd import sharded  # noqa: PLC0415 - it imports torch.distributed

    grads = list(on_meshes.values())
    squares = torch.stack([local(grad).double().square().sum() for grad in grads])
    total = yield sharded.add_up(squares, [sharded.groups_of(grad) for grad in grads])
    means = torch._foreach_div(total.unbind(), [float(grad.numel()) for grad in grads])
    return dict(zip(on_meshes, torch._foreach_sqrt(means), strict=True))
