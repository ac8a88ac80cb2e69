"""Descent along SR-Sinkhorn: the algorithm ``sinkgd``.

References:
    Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training,
    Algorithm 4. https://arxiv.org/abs/2502.06742
"""

from collections.abc import Sequence
from types import MappingProxyType

from torch import Tensor

from sinkgd import kernels
from sinkgd.multi_normalize import check_num_iters, check_tol
from sinkgd.optim.algorithms.contract import Context, Group, Slot, allowed, decay, descent
from sinkgd.optim.algorithms.layout import check_layout, matrices_of
from sinkgd.optim.algorithms.rounding import ROUNDING_OPTIONS, check_rounding, draw_keys
from sinkgd.optim.algorithms.warm_start import keep_starts, starts_of


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

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Tensor:
        """Descend along all matrices at once. Their updates do not depend on the loss's scale."""
        matrices = _matrices(slots, group, context)
        found = kernels.select(group["backend"], slots[0].param.device).descend_(
            matrices,
            group["sinkhorn_iterations"],
            keep=decay(group),
            step=descent(group),
            tol=group["tol"],
            overflow=context.overflow,
        )
        if group["warm_start"]:
            flags = allowed(found.finite, context)
            for i, (slot, own) in enumerate(zip(slots, matrices.owners, strict=True)):
                scales = [found.scales[k] for k in own]
                flag = None if flags is None else flags[i]
                keep_starts(context.states[slot.param], scales, flag)
        return found.finite


def _matrices(slots: Sequence[Slot], group: Group, context: Context) -> kernels.Matrices:
    params: list[Tensor] = []
    grads: list[Tensor] = []
    owners: list[range] = []
    layout, split = group["layout"], group["split"]
    for slot in slots:
        first = len(params)
        for param, grad in matrices_of(slot.param, slot.grad, layout=layout, split=split):
            params.append(param)
            grads.append(grad)
        owners.append(range(first, len(params)))
    bare = kernels.Matrices(params, grads, owners)
    starts, keys = _starts(slots, bare, group, context), _keys(slots, bare, group)
    return bare._replace(starts=starts, keys=keys)


def _starts(
    slots: Sequence[Slot], matrices: kernels.Matrices, group: Group, context: Context
) -> list[Tensor | None] | None:
    if not group["warm_start"]:
        return None
    starts: list[Tensor | None] = []
    for slot, own in zip(slots, matrices.owners, strict=True):
        starts += starts_of(context.states[slot.param], [matrices.grads[i] for i in own])
    return starts


def _keys(
    slots: Sequence[Slot], matrices: kernels.Matrices, group: Group
) -> Sequence[Tensor] | None:
    of_slots = draw_keys(slots, group)
    if of_slots is None:
        return None
    keys = []
    for key, own in zip(of_slots, matrices.owners, strict=True):
        entries = 0  # places of the random bits are counted over all parts of a parameter
        for i in own:
            keys.append(key + entries if entries else key)
            entries += matrices.params[i].numel()
    return keys
