"""Start the iterations of SR-Sinkhorn from the column scales of the step before.

These are close to the scales of this step, so that fewer iterations are enough. Unlike momentum,
this does not mix the gradients of several steps: with enough iterations, every start leads to the
same update. With ``last="row"`` the iterations run on the transpose, whose columns are the rows.

State: ``state[param]["col_scale"]``, float32: the n column scales of each matrix of the parameter,
matrix after matrix. The columns are in the order of the parameter's dimensions, even if its memory
has another order. With ``last="row"`` it is ``"row_scale"``, the m row scales; if ``last`` is
changed, the scales of the other side are forgotten.
"""

from collections.abc import MutableMapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sinkgd.distributed.shards import is_dtensor, local, sharding_of
from sinkgd.exchange import Computation, immediate
from sinkgd.matrix_views import columns_from_memory, columns_to_memory, dims_of
from sinkgd.optim.method import Group
from sinkgd.optim.transform import Batch, Transform, matrices_of
from sinkgd.optim.transforms.half_step import SMALLEST_START

# By the last side.
SCALES = MappingProxyType({"column": "col_scale", "row": "row_scale"})


class WarmStart(Transform):
    """Start from the column scales of the last step; from ones at first."""

    options = MappingProxyType[str, object]({"warm_start": False})
    switch = "warm_start"

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse a parameter whose starts would be sharded."""
        if not (group["warm_start"] and is_dtensor(param)):
            return
        sharding = sharding_of(param, *dims_of(param.ndim, group["layout"]))
        side = "row" if group["last"] == "column" else "column"
        kept = sharding if side == "row" else sharding.mT
        if kept.groups_over_cols:
            raise ValueError(
                f"warm_start=True needs whole {side}s, and those of {name!r} are sharded "
                f"({param.placements}); leave it off for this group"
            )

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Start each matrix from ones, as without a warm start."""
        grads = [matrix.grad for matrix in matrices_of(param, group)]
        ends_with_rows = group["last"] == "row"
        shapes = [_start_shape(grad.mT if ends_with_rows else grad) for grad in grads]
        entries = sum(map(prod, shapes))
        key = SCALES[group["last"]]
        state[key] = torch.ones(entries, dtype=torch.float32, device=param.device)

    def before(self, batch: Batch) -> Computation[Batch]:
        """Start from what was kept."""
        iterated, starts = batch.iterated, list[Tensor | None]()
        last = batch.group["last"]
        for slot, state, own, _ in batch.owners():
            found = _kept_starts(state, SCALES[last], [iterated[i].grad for i in own])
            if last == "column":
                param, layout = local(slot.param), batch.group["layout"]
                found = [x if x is None else columns_to_memory(x, param, layout) for x in found]
            starts += found
        return immediate(batch._replace(starts=starts))

    def after(self, batch: Batch) -> Computation[Batch]:
        """Keep the scales of parameters with finite gradients for the next step."""
        for slot, state, own, flag in batch.owners():
            if batch.group["last"] == "column":
                param, layout = local(slot.param), batch.group["layout"]
                cols = [columns_from_memory(batch.scales[i].col, param, layout) for i in own]
            else:
                cols = [batch.scales[i].row.mT for i in own]
            _keep(state, batch.group["last"], cols, flag)
        return immediate(batch)


def _start_shape(grad: Tensor) -> tuple[int, ...]:
    return (*grad.shape[:-2], 1, grad.shape[-1])


def _kept_starts(
    state: MutableMapping[str, Any], key: str, grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return a start ``(..., 1, n)`` for each matrix of a parameter; None if none is kept."""
    if key not in state:
        return [None] * len(grads)
    shapes = [_start_shape(grad) for grad in grads]
    parts = state[key].split([prod(shape) for shape in shapes])
    return [
        part.view(shape).to(torch.promote_types(grad.dtype, torch.float32))
        for part, shape, grad in zip(parts, shapes, grads, strict=True)
    ]


def _keep(
    state: MutableMapping[str, Any], last: str, cols: Sequence[Tensor], allowed: Tensor | None
) -> None:
    """Keep the column scales of each matrix of a parameter, unless ``allowed`` is False."""
    state.pop(SCALES["row" if last == "column" else "column"], None)
    key, found = SCALES[last], torch.cat([_start(col).flatten() for col in cols])
    if key not in state:
        state[key] = torch.ones_like(found)
    if allowed is not None:
        found = torch.where(allowed, found, state[key])
    state[key].copy_(found)


def _start(col: Tensor) -> Tensor:
    """Return column scales relative to the largest, in (0, 1]; 1 for a zero column."""
    unit = col.float() / col.amax(dim=-1, keepdim=True).float()
    return torch.where(unit > 0, unit.clamp(min=SMALLEST_START), 1)  # unit is NaN if all are zero
