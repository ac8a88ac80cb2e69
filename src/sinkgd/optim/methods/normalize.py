"""Normalized gradient descent: each gradient is divided by its root-mean-square, with no state.

This is the method for vectors and scalars if no state at all is wanted. A scalar moves by the
learning rate, against the sign of its gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkgd.distributed.all_reduce import all_reduce
from sinkgd.distributed.shards import is_dtensor, local, shard_groups
from sinkgd.exchange import Steps, computation
from sinkgd.norms import FrobeniusNorm
from sinkgd.optim.apply import ROUNDING_OPTIONS, UpdateWriter, check_rounding
from sinkgd.optim.method import Context, Group, Method, Slot, are_finite


class Normalize(Method):
    r"""Update :math:`\sqrt{k}\, g / \lVert g \rVert_2` for k entries: root-mean-square 1."""

    options = ROUNDING_OPTIONS
    is_auxiliary = True

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range; any shape is allowed."""
        check_rounding(name, param, group)

    @computation
    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
        """Update the parameters one by one. The loss scale has no effect on the updates."""
        finite: Tensor = yield are_finite(slots)
        writer = UpdateWriter(slots, finite, group, context)
        sizes = yield _sizes_on_mesh(slots)
        for i, slot in enumerate(slots):
            grad = local(slot.grad)
            grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
            if i in sizes:
                update = grad * torch.where(sizes[i] == 0, 0, 1 / sizes[i]).to(grad.dtype)
            else:
                update = FrobeniusNorm().project(grad.reshape(1, -1)).view_as(grad)
            writer.write_(i, local(slot.param), update)
        return finite


@computation
def _sizes_on_mesh(slots: Sequence[Slot]) -> Steps[dict[int, Tensor]]:
    """Return the root-mean-square of each gradient that is a DTensor, float64, by its index."""
    on_mesh = {i: slot.grad for i, slot in enumerate(slots) if is_dtensor(slot.grad)}
    if not on_mesh:
        return {}
    grads = list(on_mesh.values())
    squares = torch.stack([local(grad).double().square().sum() for grad in grads])
    total = yield all_reduce(squares, [shard_groups(grad) for grad in grads])
    means = torch._foreach_div(total.unbind(), [float(grad.numel()) for grad in grads])
    return dict(zip(on_mesh, torch._foreach_sqrt(means), strict=True))
