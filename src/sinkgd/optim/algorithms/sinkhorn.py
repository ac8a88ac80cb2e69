"""Descent along SR-Sinkhorn: the algorithm ``sinkgd``.

References:
    Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training,
    Algorithm 4. https://arxiv.org/abs/2502.06742
"""

from collections.abc import Callable, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sinkgd import kernels
from sinkgd.multi_normalize import check_num_iters, check_tol
from sinkgd.optim.algorithms.contract import (
    Context,
    Group,
    Slot,
    allowed,
    decay,
    descent,
    on_mesh,
    step_by,
)
from sinkgd.optim.algorithms.layout import check_layout
from sinkgd.optim.algorithms.parts import Part, parts_of
from sinkgd.optim.algorithms.rounding import ROUNDING_OPTIONS, check_rounding, draw_keys
from sinkgd.optim.algorithms.warm_start import init_starts, keep_starts, starts_of


class Sinkhorn:
    """Matrices by SR-Sinkhorn. No state, unless ``warm_start``; the scratch of the backend."""

    options = MappingProxyType(
        {
            "sinkhorn_iterations": 5,
            "backend": "auto",
            "layout": "auto",
            "split": 1,
            "tol": None,
            "warm_start": False,
            **ROUNDING_OPTIONS,
        }
    )

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse what is no matrix, options out of range, and a backend unknown or absent."""
        check_num_iters(group["sinkhorn_iterations"])
        check_tol(group["tol"])
        kernels.select(group["backend"], param.device)
        check_layout(name, param, layout=group["layout"], split=group["split"])
        check_rounding(name, param, group)
        if on_mesh(param):
            from sinkgd.optim.algorithms.pieces import check_pieces  # noqa: PLC0415 - see parts_of

            check_pieces(name, param, group)

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Make the start of a warm start: ones."""
        if not group["warm_start"]:
            return
        slot = Slot("", 0, param.detach(), param.detach())
        parts, _ = parts_of([slot], layout=group["layout"], split=group["split"])
        init_starts(state, [part.grad for part in parts])

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Tensor:
        """Descend along all matrices at once. Their updates do not depend on the loss's scale."""
        return step_by(
            lambda slot: on_mesh(slot.param), slots, lambda _, own: _step(own, group, context)
        )


def _step(slots: Sequence[Slot], group: Group, context: Context) -> Tensor:
    """Step along parameters of which all or none lie on a mesh."""
    parts, owners = parts_of(slots, layout=group["layout"], split=group["split"])
    matrices = kernels.Matrices(
        params=[part.param for part in parts],
        grads=[part.grad for part in parts],
        owners=owners,
        starts=_starts(slots, parts, owners, context) if group["warm_start"] else None,
        keys=_keys(slots, parts, owners, group),
    )
    found = _descend_(slots[0].param.device, parts, group)(
        matrices,
        group["sinkhorn_iterations"],
        keep=decay(group),
        step=descent(group),
        tol=group["tol"],
        overflow=context.overflow,
    )
    if group["warm_start"]:
        flags = allowed(found.finite, context)
        for i, (slot, own) in enumerate(zip(slots, owners, strict=True)):
            scales = [found.scales[k] for k in own]
            flag = None if flags is None else flags[i]
            keep_starts(context.states[slot.param], scales, flag)
    finite: Tensor = found.finite
    return finite


def _descend_(
    device: torch.device, parts: Sequence[Part], group: Group
) -> Callable[..., kernels.Descent]:
    """Return what takes the step of matrices: a backend, or ranks together."""
    backend = kernels.select(group["backend"], device)
    places = [part.place for part in parts if part.place is not None]
    if not places:
        return backend.descend_
    from sinkgd import sharded  # noqa: PLC0415 - it imports torch.distributed

    return sharded.OnMesh(backend, places).descend_


def _starts(
    slots: Sequence[Slot], parts: Sequence[Part], owners: Sequence[range], context: Context
) -> list[Tensor | None]:
    starts: list[Tensor | None] = []
    for slot, own in zip(slots, owners, strict=True):
        starts += starts_of(context.states[slot.param], [parts[i].grad for i in own])
    return starts


def _keys(
    slots: Sequence[Slot], parts: Sequence[Part], owners: Sequence[range], group: Group
) -> Sequence[Tensor] | None:
    of_slots = draw_keys(slots, group)
    if of_slots is None:
        return None
    keys = [key for key, own in zip(of_slots, owners, strict=True) for _ in own]
    return [
        key + part.first_entry if part.first_entry else key
        for key, part in zip(keys, parts, strict=True)
    ]
