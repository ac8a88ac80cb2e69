"""Updates ``row * grad * col`` made in memory, to be multiplied and lowered by torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkgd.deflation import LowRank, StoredProducts, take_away_
from sinkgd.kernels.backend import Lowered, Scales, Stack
from sinkgd.newton_schulz import matrix_buffer


def eager_products(stacks: Sequence[Stack]) -> StoredProducts:
    """Return the products of updates; all of these are made, and kept."""
    return StoredProducts([_made_together(*stack) for stack in stacks])


def made(grad: Tensor, scales: Scales | Lowered) -> Tensor:
    """Return ``row * grad * col`` less what is taken, in float32 or wider."""
    if not isinstance(scales, Lowered):
        return (grad.to(scales.row.dtype) * scales.row).mul_(scales.col)
    together = _made_together([grad], [scales])
    take_away_(together, LowRank(*(x.unsqueeze(0) for x in scales.taken)))
    return together[0]


def nothing_to_take(
    grads: Sequence[Tensor], scales: Sequence[Scales | Lowered]
) -> tuple[list[Tensor], list[Scales]]:
    """Return gradients with scales alone: updates that are lowered, and ones, in the place of some.

    Each of them takes a float32 copy.
    """
    found_grads: list[Tensor] = []
    found_scales: list[Scales] = []
    for grad, own in zip(grads, scales, strict=True):
        if isinstance(own, Lowered):
            found_grads.append(made(grad, own))
            found_scales.append(Scales(torch.ones_like(own.row), torch.ones_like(own.col)))
        else:
            found_grads.append(grad)
            found_scales.append(own)
    return found_grads, found_scales


def _made_together(grads: Sequence[Tensor], scales: Sequence[Scales | Lowered]) -> Tensor:
    """Return ``row * grad * col`` of gradients that lie alike, as `matrix_buffer` makes them."""
    first, dtype = grads[0], scales[0].row.dtype
    updates = matrix_buffer(first.expand(len(grads), *first.shape), dtype)
    for update, grad, own in zip(updates, grads, scales, strict=True):
        torch.mul(grad, own.row, out=update).mul_(own.col)
        if isinstance(own, Lowered) and own.factor is not None:
            update.mul_(own.factor)
    return updates
