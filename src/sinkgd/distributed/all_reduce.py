"""Sums over the ranks that share a parameter.

All functions return computations for `sinkgd.exchange`. Computations that run side by side share
the messages of a process group. Numbers that no group shares need no message. If there are only
such numbers, torch.distributed is not imported.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sinkgd.distributed.shards import ParamMatrix
from sinkgd.exchange import Computation, Steps, computation, immediate, sums_in_turn
from sinkgd.kernels import Backend

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    Groups = Sequence[Sequence[ProcessGroup]]  # the groups of each number or tensor


def all_reduce(numbers: Tensor, groups: "Groups") -> Computation[Tensor]:
    """Return the sums over ranks of numbers ``(k,)``, each over its own groups.

    Args:
        numbers: This rank's terms of the sums. Not modified.
        groups: For each number, the process groups over which it is added up.
    """
    indices: dict[tuple[ProcessGroup, ...], list[int]] = {}
    for i, own in enumerate(groups):
        indices.setdefault(tuple(own), []).append(i)
    if len(indices) == 1:
        return _sum(numbers.clone(), next(iter(indices)))
    return _sum_by_groups(numbers, indices)


@computation
def _sum_by_groups(
    numbers: Tensor, indices: "Mapping[tuple[ProcessGroup, ...], Sequence[int]]"
) -> Steps[Tensor]:
    each = numbers.unbind()  # an index would have to be copied to the device
    found = yield [_sum(torch.stack([each[i] for i in own]), of) for of, own in indices.items()]
    totals: dict[int, Tensor] = {}
    for own, sums in zip(indices.values(), found, strict=True):
        totals.update(zip(own, sums.unbind(), strict=True))
    return torch.stack([totals[i] for i in range(len(numbers))])


@computation
def all_reduce_tensors(tensors: Sequence[Tensor], groups: "Groups") -> Steps[list[Tensor]]:
    """Return the sums over ranks of tensors of one dtype and any shapes.

    Args:
        tensors: This rank's terms of the sums. Their memory is reused.
        groups: For each tensor, the process groups over which it is added up.
    """
    flat = [tensor.flatten() for tensor in tensors]
    found = yield [_sum(own, of) for own, of in zip(flat, groups, strict=True)]
    return [total.view(tensor.shape) for total, tensor in zip(found, tensors, strict=True)]


@computation
def all_ranks_agree(flags: Tensor, groups: "Groups") -> Steps[Tensor]:
    """Return which flags ``(k,)`` are True on every rank of their groups."""
    bad: Tensor = yield all_reduce((~flags).double(), groups)
    return bad == 0


def sum_over_columns(
    numbers: Sequence[Tensor], matrices: Sequence[ParamMatrix]
) -> Computation[list[Tensor]]:
    """Return sums along whole rows, given the sums over each rank's own columns.

    Args:
        numbers: A float64 tensor of any shape for each matrix. Their memory is reused.
        matrices: The matrices, which say how they are sharded.
    """
    return _sum_if_shared(
        numbers, [x.sharding.groups_over_cols if x.sharding else () for x in matrices]
    )


def sum_over_rows(
    numbers: Sequence[Tensor], matrices: Sequence[ParamMatrix]
) -> Computation[list[Tensor]]:
    """Return sums along whole columns, given the sums over each rank's own rows."""
    return _sum_if_shared(
        numbers, [x.sharding.groups_over_rows if x.sharding else () for x in matrices]
    )


@computation
def row_lengths(matrices: Sequence[ParamMatrix], backend: Backend) -> Steps[list[Tensor]]:
    """Return the l2 norms of the whole rows of which this rank holds entries, float64.

    Each tensor has shape ``(..., m, 1)``. Compiled backends read the gradients once. Sends one
    message to each process group that shards columns.
    """
    grads = [matrix.grad for matrix in matrices]
    columns = sum(prod(grad.shape[:-2]) * grad.shape[-1] for grad in grads)
    weights = torch.ones(columns, dtype=torch.float64, device=grads[0].device)
    squares = torch.split(backend.sums(grads).of_rows(weights), [prod(g.shape[:-1]) for g in grads])
    shaped = [own.view(*grad.shape[:-1], 1) for own, grad in zip(squares, grads, strict=True)]
    totals = yield sum_over_columns(shaped, matrices)
    return [total.sqrt() for total in totals]


def _sum_if_shared(numbers: Sequence[Tensor], groups: "Groups") -> Computation[list[Tensor]]:
    if not any(groups):
        return immediate(list(numbers))
    return all_reduce_tensors(numbers, groups)


@computation
def _sum(numbers: Tensor, groups: "Sequence[ProcessGroup]") -> Steps[Tensor]:
    yield from sums_in_turn(numbers, groups)
    return numbers
