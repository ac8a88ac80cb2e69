"""Sums along rows and columns of matrices that may lie in pieces.

They are computations for `sinkgd.exchange`. A matrix that lies whole on this device needs no
message, and torch.distributed is not imported.
"""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sinkgd.exchange import Computation, Steps, computation, immediate
from sinkgd.kernels import Backend
from sinkgd.optim.algorithms.parts import Part

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def over_columns(numbers: Sequence[Tensor], parts: Sequence[Part]) -> Computation[list[Tensor]]:
    """Add up what this rank found along its piece of each row, for whole rows.

    Args:
        numbers: One tensor a part, float64, of any shape; used up.
        parts: How they lie. Those that share ranks share a message.
    """
    return _add_up(numbers, [part.place.row_groups if part.place else () for part in parts])


def over_rows(numbers: Sequence[Tensor], parts: Sequence[Part]) -> Computation[list[Tensor]]:
    """Add up what this rank found along its piece of each column, for whole columns."""
    return _add_up(numbers, [part.place.col_groups if part.place else () for part in parts])


@computation
def row_lengths(parts: Sequence[Part], backend: Backend) -> Steps[list[Tensor]]:
    """Return the l2 norm of every row that this rank holds a piece of: ``(..., m, 1)``, float64.

    One reading of the gradients; one message where columns are sharded.
    """
    grads = [part.grad for part in parts]
    columns = sum(prod(grad.shape[:-2]) * grad.shape[-1] for grad in grads)
    weights = torch.ones(columns, dtype=torch.float64, device=grads[0].device)
    squares = torch.split(backend.sums(grads).of_rows(weights), [prod(g.shape[:-1]) for g in grads])
    shaped = [own.view(*grad.shape[:-1], 1) for own, grad in zip(squares, grads, strict=True)]
    totals = yield over_columns(shaped, parts)
    return [total.sqrt() for total in totals]


def _add_up(
    numbers: Sequence[Tensor], groups: Sequence[Sequence["ProcessGroup"]]
) -> Computation[list[Tensor]]:
    if not any(groups):
        return immediate(list(numbers))
    from sinkgd import sharded  # noqa: PLC0415 - it imports torch.distributed

    return sharded.add_up_vectors(numbers, groups)
