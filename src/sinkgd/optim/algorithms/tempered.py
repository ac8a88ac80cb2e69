"""Descent along the tempered gradient, matrices, vectors and scalars by one rule. No state."""

from collections.abc import MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from sinkgd.kernels.eager import descend_
from sinkgd.optim.algorithms.contract import (
    Context,
    Group,
    Slot,
    allowed,
    are_finite,
    check_whole,
    decay,
    descent,
    local,
)
from sinkgd.optim.algorithms.layout import check_layout, matrices_of
from sinkgd.optim.algorithms.rounding import ROUNDING_OPTIONS, check_rounding, draw_keys
from sinkgd.tempered import EPS, NUM_ITERS, TAU, check_tempering, temper


class Tempered:
    """`temper` of each gradient, which keeps its size: a loss scale is divided out first."""

    options = MappingProxyType[str, object](
        {
            "tau": TAU,
            "n_iter": NUM_ITERS,
            "eps": EPS,
            "layout": "auto",
            "split": 1,
            **ROUNDING_OPTIONS,
        }
    )

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range, and tensors in pieces."""
        check_tempering(group["tau"], group["n_iter"], group["eps"])
        check_whole(name, param, "the tempered update needs")
        if param.ndim >= 2:
            check_layout(name, param, layout=group["layout"], split=group["split"])
        check_rounding(name, param, group)

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """There is none."""

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Tensor:
        """Look through the gradients; then temper and write one by one."""
        finite = are_finite(slots)
        flags, keys = allowed(finite, context), draw_keys(slots, group)
        for i, slot in enumerate(slots):
            first_entry = 0
            for param, grad in _parts(slot, group):
                wide = grad if context.loss_scale is None else grad.float() / context.loss_scale
                update = temper(wide.float(), group["tau"], group["n_iter"], eps=group["eps"])
                descend_(
                    param,
                    update,
                    keep=decay(group),
                    step=descent(group),
                    allowed=None if flags is None else flags[i],
                    key=None if keys is None else keys[i] + first_entry,
                )
                first_entry += param.numel()
        return finite


def _parts(slot: Slot, group: Group) -> list[tuple[Tensor, Tensor]]:
    param, grad = local(slot.param), local(slot.grad)
    if param.ndim < 2:
        return [(param, grad)]
    return matrices_of(param, grad, layout=group["layout"], split=group["split"])
