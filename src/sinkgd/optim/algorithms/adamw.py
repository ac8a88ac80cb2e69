"""AdamW for the parameters that no matrix norm fits; the arithmetic is torch's own."""

from collections.abc import MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sinkgd.optim.algorithms.contract import Context, Group, Slot, allowed, are_finite, local

# Where torch has the fused kernel: torch/utils/_foreach_utils.py,
# _get_fused_kernels_supported_devices.
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia")


class AdamW:
    """Decoupled weight decay and Adam (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101).

    Two numbers of state an entry. One non-finite gradient holds back the whole group.
    """

    options = MappingProxyType({"betas": (0.9, 0.999), "eps": 1e-8, "fused": None})

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range; choose the fused kernel where it runs."""
        del name
        beta1, beta2 = group["betas"]
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"betas must lie in [0, 1), got {group['betas']}")
        if not group["eps"] >= 0:
            raise ValueError(f"eps must be at least 0, got {group['eps']}")
        if group["fused"] is None:
            group["fused"] = param.device.type in _FUSED_DEVICES

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Make both moments, zero."""
        _state(state, param, fused=group["fused"])

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Tensor:
        """Look through the gradients, then update as torch does."""
        finite = are_finite(slots)
        flags = allowed(finite, context)
        held_back = None if flags is None else (~flags.all()).float()
        fused, grad_scale = group["fused"], context.loss_scale
        grads = [local(slot.grad) for slot in slots]
        if not fused:
            # Only the fused kernel takes these two along on the device.
            if held_back is not None and bool(held_back):
                return finite
            if grad_scale is not None:
                grads = [grad / grad_scale for grad in grads]
            held_back = grad_scale = None
        states = [_state(context.states[slot.param], slot.param, fused=fused) for slot in slots]
        beta1, beta2 = group["betas"]
        adamw(
            [local(slot.param) for slot in slots],
            grads,
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=fused,
            grad_scale=grad_scale,
            found_inf=held_back,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        return finite


def _state(
    state: MutableMapping[str, Any], param: Tensor, *, fused: bool
) -> MutableMapping[str, Any]:
    # Names, shapes and devices as in torch.optim.AdamW, so that its checkpoints load here.
    if not state:
        state["step"] = torch.zeros((), device=param.device if fused else "cpu")
        state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return state
