r"""Steps that keep the Frobenius norm of each weight matrix: Hyperball.

.. math::
    W \leftarrow R\, \frac{W - \eta R\, u / \lVert u \rVert}{\lVert W - \eta R\, u / \lVert u \rVert
    \rVert}

where u is the update that all other options give, η the learning rate, and R the norm of W before
its first step. So the learning rate is relative: the root-mean-square change of a weight, divided
by the root-mean-square of the weights. Weight decay could not shrink W, and is refused.

A matrix of zeros has no norm to keep. If W is zero before its first step, it gets the plain rule,
W ← W − η u, in this and in all later steps. A matrix whose update is zero stays as it is.

The new weight is W − ηX for another update X, a sum of W and u whose coefficients follow from the
products W·W, W·u and u·u. X takes the place of u, so that a backend writes the weight once, and
rounds it once.

State: ``state[param]["norm"]``, float32, R of each matrix; -1 before the first step. It has the
parameter's shape, but its row dimension has one entry for each matrix of the parameter, and its
column dimensions have one entry. Scratch: the same as in
`sinkgd.optim.transforms.weight_projection`. On a mesh the transform costs one message, or two if
both rows and columns are sharded.

References:
    Hyperball, https://arxiv.org/abs/2606.16899
"""

from collections.abc import MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sinkgd import kernels
from sinkgd.distributed.all_reduce import sum_over_columns, sum_over_rows
from sinkgd.distributed.shards import from_local, param_matrices, shard_except
from sinkgd.exchange import Steps, computation
from sinkgd.matrix_views import dims_of
from sinkgd.newton_schulz import or_one
from sinkgd.optim.apply import step_factor
from sinkgd.optim.kept_vectors import read_vectors, write_vectors_
from sinkgd.optim.method import Context, Group, Slot
from sinkgd.optim.transform import Batch, Scratch, Transform, matrices_of
from sinkgd.optim.transforms.weight_projection import row_products

NORM = "norm"
UNKNOWN = -1.0


class ConstantNorm(Transform):
    """Keep the Frobenius norm of each weight matrix."""

    options = MappingProxyType[str, object]({"constant_norm": False})
    switch = "constant_norm"

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse weight decay."""
        del param
        if group["constant_norm"] and group["weight_decay"] != 0:
            raise ValueError(
                f"constant_norm=True keeps the norm of {name!r}, so weight_decay="
                f"{group['weight_decay']} could not shrink it; set weight_decay=0 for this group"
            )

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Create the norms, which the first step measures."""
        _norms_of(state, param, group["layout"], len(matrices_of(param, group)))

    def scratch(self, group: Group, *, packs_vectors: bool, sharded: bool) -> Scratch:
        """Return what is held: copies of the updates, until all messages have come."""
        del group, packs_vectors
        return Scratch(copies=not sharded, late_copies=1)

    @computation
    def after(self, batch: Batch) -> Steps[Batch]:
        """Change the updates so that the weights keep their norms."""
        updates = batch.updates()
        batch = yield _hold_(batch, updates)
        return batch.with_updates(updates)


@computation
def hold_norms_(
    slots: Sequence[Slot],
    updates: Sequence[Tensor],
    finite: Tensor,
    group: Group,
    context: Context,
) -> Steps[Tensor]:
    """Change updates in place so that the weights keep their norms.

    Each update is that of a whole parameter, for example an average of earlier updates. Updates of
    vectors stay as they are.

    Args:
        slots: The parameters.
        updates: This rank's entries of each update, float32 or wider, in the parameter's memory
            order.
        finite: ``(slots,)`` bool: which updates are finite.
        group: The group of the parameters.
        context: The context of the step.

    Returns:
        ``(slots,)`` bool: which updates are finite, also after the change.
    """
    flags = [*finite.unbind()]
    own = [i for i, slot in enumerate(slots) if slot.param.ndim > 1]
    if not own:
        return finite
    some = [slots[i]._replace(grad=from_local(slots[i].param, updates[i])) for i in own]
    matrices, ranges = param_matrices(some, layout=group["layout"], split=group["split"])
    batch = Batch(
        some,
        group,
        context,
        kernels.select(group["backend"], slots[0].param.device),
        matrices,
        ranges,
        keys=None,
        finite=torch.stack([flags[i] for i in own]),
    )
    batch = yield _hold_(batch, [matrix.grad for matrix in matrices])
    assert batch.finite is not None
    for i, flag in zip(own, batch.finite.unbind(), strict=True):
        flags[i] = flag
    return torch.stack(flags)


@computation
def _hold_(batch: Batch, updates: Sequence[Tensor]) -> Steps[Batch]:
    """Change the update of each matrix in place, and store the norms."""
    matrices, layout = batch.matrices, batch.group["layout"]
    norms: list[Tensor] = []
    for slot, state, own, _ in batch.owners():
        kept = _norms_of(state, slot.param, layout, len(own))
        norms += read_vectors(kept, slot.param, layout, len(own))
    products = [
        row_products(x, matrix.param).sum(-2, keepdim=True)
        for x, matrix in zip(updates, matrices, strict=True)
    ]
    products = yield sum_over_columns(products, matrices)
    products = yield sum_over_rows(products, matrices)
    for i, own in enumerate(products):
        norms[i] = torch.where(norms[i] == UNKNOWN, own[..., 2:].sqrt().float(), norms[i])
        _retract_(updates[i], matrices[i].param, own, norms[i], step_factor(batch.group))
    batch = batch.only_if([own.isfinite().all() for own in products])
    for slot, state, own, flag in batch.owners():
        write_vectors_(state[NORM], slot.param, layout, [norms[i] for i in own], flag)
    return batch


def _retract_(u: Tensor, W: Tensor, products: Tensor, norm: Tensor, step: float | Tensor) -> None:
    """Overwrite u by the X for which ``W + step * X`` has the norm R; leave u if R is 0.

    X is 0 if u or ``step`` is 0, or if the step would end at 0.

    Args:
        u: The update, ``(..., m, n)``.
        W: The weight.
        products: u·u, u·W and W·W: ``(..., 1, 3)``, float64.
        norm: R, ``(..., 1, 1)``.
        step: As `sinkgd.optim.apply.step_factor` returns it.
    """
    R = norm.double()
    uu, uW, WW = torch.split(products, 1, dim=-1)
    share = R / or_one(uu).sqrt()
    length = (WW + 2 * step * share * uW + (step * R).square()).clamp(min=0).sqrt()
    back = R / or_one(length)
    moves = (R > 0) & (length > 0) & (step * step * uu > 0)
    of_W = torch.where(moves, (back - 1) / step, 0)
    of_u = torch.where(R == 0, 1, torch.where(moves, back * share, 0))
    u.mul_(of_u.to(u.dtype)).addcmul_(W.to(u.dtype), of_W.to(u.dtype))


def _norms_of(state: MutableMapping[str, Any], param: Tensor, layout: str, count: int) -> Tensor:
    """Return the norms of the ``count`` matrices of a parameter; create them if absent."""
    if NORM not in state:
        (row_dim,), col_dims = dims_of(param.ndim, layout)
        shape = [1 if dim in col_dims else size for dim, size in enumerate(param.shape)]
        shape[row_dim] = count
        unknown = torch.full(shape, UNKNOWN, dtype=torch.float32, device=param.device)
        state[NORM] = shard_except(param, (row_dim, *col_dims), unknown)
    norms: Tensor = state[NORM]
    return norms
