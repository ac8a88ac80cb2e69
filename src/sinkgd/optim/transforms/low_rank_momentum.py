r"""Momentum whose memory has low rank: it is kept as a product of two thin factors.

.. math::
    M = \mu P Q^\top + (1 - \mu) G, \qquad U = \mathrm{orth}(M Q), \qquad
    P Q^\top \leftarrow U U^\top M

M is normalized instead of the gradient. The new memory is the projection of M on the columns of U,
and one step of a subspace iteration finds U. The iteration starts from the last Q, so that it
continues from step to step, and follows a change of the leading directions with a delay. The
entries of each column of Q that is in use have root-mean-square 1; P carries the magnitude of M.

The memory is zero at first, and the first iteration starts from the fixed block Ω of
`sinkgd.deflation`. If the rank of M is below r, the spare columns of P are zero, and those of Q are
columns of Ω again.

The rank of M is not limited: only what is remembered of earlier gradients has low rank. LoRA-Pre
instead keeps the momentum itself as a product of two factors, so that the momentum has low rank.
PowerSGD iterates in the same way to compress gradients.

State, float32 (float64 for float64), with r the least of ``momentum_rank``, and the rows and the
columns of the largest matrix of a parameter: ``state[param]["momentum_left"]``, P, has r numbers
per row, and is sharded like the rows. ``state[param]["momentum_right"]``, Q, has r numbers per
column of each matrix, as `sinkgd.optim.kept_vectors` shapes and shards them. A non-finite
gradient leaves P and Q as they are. Scratch: M, for a few matrices at a time. On a mesh these few
share two messages, or four if both rows and columns are sharded.

Letters, everywhere in this file:
    m, n: rows and columns; ...: leading batch dimensions, one independent matrix each
    r: the rank of the memory
    G: the gradient; M: what is normalized; μ: the decay rate ``low_rank_momentum``
    P, Q: the factors of the memory, (..., m, r) and (..., n, r)

References:
    LoRA-Pre. https://arxiv.org/abs/2602.24283
    Vogels et al., PowerSGD, Algorithm 1. https://arxiv.org/abs/1905.13727
"""

from collections.abc import MutableMapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sinkgd.deflation import LowRank, at_once, invert_root, take_away_
from sinkgd.distributed.all_reduce import sum_over_columns, sum_over_rows
from sinkgd.distributed.shards import ParamMatrix
from sinkgd.exchange import Steps, computation
from sinkgd.matrix_views import dims_of, sizes_of
from sinkgd.newton_schulz import matrix_buffer, or_one
from sinkgd.number_check import check_decay_rate, check_whole_number
from sinkgd.optim.kept_vectors import (
    normalized_block,
    read_vectors,
    shape_of_row_vectors,
    shape_of_vectors,
    view_row_vectors,
    write_vectors_,
    zero_row_vectors,
)
from sinkgd.optim.method import Group, are_finite
from sinkgd.optim.transform import Batch, Scratch, Transform, matrices_of
from sinkgd.optim.transforms.deflate import fixed_blocks, fixed_vectors
from sinkgd.optim.transforms.operator_norm import product

LEFT, RIGHT = "momentum_left", "momentum_right"

# With the columns of M Q scaled to length 1, a column adds no direction if its part orthogonal to
# the columns before it is shorter than this times √r. Products in float32 have errors of this size.
SHORTEST = 2.0**-18


class LowRankMomentum(Transform):
    """An average of the gradients that remembers earlier steps at low rank."""

    options = MappingProxyType[str, object]({"momentum_rank": 0, "low_rank_momentum": 0.95})
    switch = "momentum_rank"
    resizable = MappingProxyType({LEFT: "column", RIGHT: "row"})
    remedy = "a momentum_rank above 0, e.g. momentum_rank=16"

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse a rank or a decay rate out of range."""
        del name, param
        rank = group["momentum_rank"]
        check_whole_number("momentum_rank", rank)
        if rank < 0:
            raise ValueError(f"momentum_rank must be a whole number of at least 0, got {rank!r}")
        check_decay_rate("low_rank_momentum", group["low_rank_momentum"])

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Create P, filled with zeros, and Q, filled with Ω."""
        _prepare(state, param, group, len(matrices_of(param, group)))

    def scratch(self, group: Group, *, packs_vectors: bool, sharded: bool) -> Scratch:
        """Return what is held: M of each matrix."""
        del group, packs_vectors, sharded
        return Scratch(copies=True)

    @computation
    def before(self, batch: Batch) -> Steps[Batch]:
        """Average the gradients, and keep what is remembered of the averages."""
        memories: list[LowRank] = []
        for slot, state, own, _ in batch.owners():
            _prepare(state, slot.param, batch.group, len(own))
            left = _rows_of(state[LEFT], slot.param, batch, own)
            right = read_vectors(state[RIGHT], slot.param, batch.group["layout"], len(own))
            memories += [LowRank(p, q.mT) for p, q in zip(left, right, strict=True)]
        pairs = zip(batch.matrices, memories, strict=True)
        averages = [_averaged(matrix, memory, batch) for matrix, memory in pairs]
        finite, found = yield [
            are_finite(batch.slots),
            remembered(averages, memories, fixed_blocks(batch, batch.group["momentum_rank"])),
        ]
        for slot, state, own, flag in batch._replace(finite=finite).owners():
            for i, kept in zip(own, _rows_of(state[LEFT], slot.param, batch, own), strict=True):
                new = found[i].left
                kept.copy_(new if flag is None else torch.where(flag, new, kept))
            right = [found[i].right.mT for i in own]
            write_vectors_(state[RIGHT], slot.param, batch.group["layout"], right, flag)
        context = batch.context._replace(loss_scale=None)  # the averages contain none
        return batch._replace(matrices=averages, context=context)


def _prepare(state: MutableMapping[str, Any], param: Tensor, group: Group, count: int) -> None:
    """Create the factors of a parameter, if they are absent or have another rank."""
    layout = group["layout"]
    (row_dim,), cols = dims_of(param.ndim, layout)
    columns = prod(param.shape[dim] for dim in cols)
    rows = max(sizes_of(param.shape[row_dim], group["split"]), default=0)
    rank = min(group["momentum_rank"], rows, columns)
    shape = shape_of_vectors(param, layout, count * rank)
    left = shape_of_row_vectors(param, layout, rank)
    if RIGHT in state and ([*state[RIGHT].shape], [*state[LEFT].shape]) == (shape, left):
        return
    dtype = torch.promote_types(param.dtype, torch.float32)
    state[RIGHT] = fixed_vectors(param, layout, rank, count).to(dtype)
    state[LEFT] = zero_row_vectors(param, layout, rank, dtype)


def _rows_of(left: Tensor, param: Tensor, batch: Batch, own: range) -> Sequence[Tensor]:
    """View P of a parameter as one ``(..., m, r)`` per matrix; m counts only this rank's rows."""
    rows = [batch.matrices[i].grad.shape[-2] for i in own]
    return view_row_vectors(left, param, batch.group["layout"], rows)


def _averaged(matrix: ParamMatrix, memory: LowRank, batch: Batch) -> ParamMatrix:
    """Return the matrix with M as its gradient, in float32 or wider; M has no loss scale."""
    mu: float = batch.group["low_rank_momentum"]
    share: float | Tensor = 1 - mu
    if batch.context.loss_scale is not None:
        share = share / batch.context.loss_scale
    dtype = torch.promote_types(matrix.grad.dtype, torch.float32)
    average = matrix_buffer(matrix.grad, dtype).copy_(matrix.grad).mul_(share)
    take_away_(average, memory._replace(left=-mu * memory.left))
    return matrix._replace(grad=average)


@computation
def remembered(
    averages: Sequence[ParamMatrix], memories: Sequence[LowRank], blocks: Sequence[Tensor]
) -> Steps[list[LowRank]]:
    """Return P and Q of the next step.

    Args:
        averages: Matrices whose gradients are M.
        memories: P and Q of each matrix.
        blocks: Ω of each matrix, ``(..., n, k)`` with k at least r.
    """
    ahead = [product(M.grad, own.right) for M, own in zip(averages, memories, strict=True)]
    ahead = yield sum_over_columns(ahead, averages)
    grams = yield sum_over_rows([y.mT @ y for y in ahead], averages)
    roots = [root for root, _ in at_once(_orthonormal, grams)]
    U = [y @ root for y, root in zip(ahead, roots, strict=True)]
    right = [product(M.grad.mT, u) for M, u in zip(averages, U, strict=True)]
    right = yield sum_over_rows(right, averages)
    squares = [q.square().sum(-2, keepdim=True) for q in right]
    squares = yield sum_over_columns(squares, averages)
    found = []
    for M, u, q, square, block in zip(averages, U, right, squares, blocks, strict=True):
        size = (square / M.shape[1]).sqrt()
        found.append(LowRank(u * size, normalized_block(q, size, block)))
    return found


def _orthonormal(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factor that makes vectors orthonormal, given their Gram matrix ``(..., r, r)``.

    Returns:
        The factor, with zeros for vectors that add no direction, and the lengths of the vectors.
    """
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    lengths = or_one((gram * eye).sum(-2, keepdim=True).sqrt())
    # The lengths are roughly proportional to singular values of M, so they may differ much.
    _, root = invert_root(gram / (lengths.mT * lengths), SHORTEST)
    return root / lengths.mT, lengths
