"""AdamW for the parameters that no matrix norm fits; the arithmetic is torch's own."""

from collections.abc import MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sinkgd.exchange import Computation, Steps, computation, immediate, run
from sinkgd.number_check import check_betas
from sinkgd.optim.algorithms.contract import (
    Context,
    Group,
    Slot,
    allowed,
    are_finite,
    learning_rate,
    local,
    on_mesh,
)
from sinkgd.optim.algorithms.layout import are_dense, lie_alike
from sinkgd.optim.algorithms.parts import lying_as

# Where torch has the fused kernel: torch/utils/_foreach_utils.py,
# _get_fused_kernels_supported_devices.
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia")

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

ADAMW_OPTIONS = MappingProxyType[str, object]({"betas": (0.9, 0.999), "eps": 1e-8, "fused": None})


class AdamW:
    """Decoupled weight decay and Adam (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101).

    Two numbers of state an entry. One non-finite gradient holds back the whole group. As in torch,
    entries of the gradient must stay below 1e19, whose squares are within float32's range; clip
    larger ones.
    """

    options = ADAMW_OPTIONS

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range; choose the fused kernel where it runs."""
        del name
        check_adamw(param, group)

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Make both moments, zero."""
        init_moments(state, param, fused=group["fused"])

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Computation[Tensor]:
        """Look through the gradients, then update as torch does."""
        if any(on_mesh(slot.param) for slot in slots):
            return self._step_on_mesh(slots, group, context)
        # torch's fused kernel breaks a compiled graph, which is better not done in `exchange`.
        finite = run(are_finite(slots))
        self._descend_(slots, finite, group, context)
        return immediate(finite)

    @computation
    def _step_on_mesh(self, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
        finite: Tensor = yield are_finite(slots)
        self._descend_(slots, finite, group, context)
        return finite

    def _descend_(
        self, slots: Sequence[Slot], finite: Tensor, group: Group, context: Context
    ) -> None:
        flags = allowed(finite, context)
        states = [context.states[slot.param] for slot in slots]
        for slot, state in zip(slots, states, strict=True):
            init_moments(state, slot.param, fused=group["fused"])
        descend_by_adamw_(
            [local(slot.param) for slot in slots],
            [local(slot.grad) for slot in slots],
            states,
            group,
            lr=learning_rate(group),
            held_back=None if flags is None else ~flags.all(),
            grad_scale=context.loss_scale,
        )


def check_adamw(param: Tensor, group: Group) -> None:
    """Refuse options of AdamW out of range; choose its fused kernel where it runs."""
    check_averages(group)
    if group["fused"] is None:
        group["fused"] = param.device.type in _FUSED_DEVICES


def check_averages(group: Group) -> None:
    """Refuse ``betas`` and ``eps`` out of range."""
    check_betas("betas", group["betas"])
    if not group["eps"] >= 0:
        raise ValueError(f"eps must be at least 0, got {group['eps']}")


def descend_by_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    states: Sequence[MutableMapping[str, Any]],
    group: Group,
    *,
    lr: float | Tensor,
    held_back: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """Take torch's AdamW step of this rank's pieces; AMSGrad's where the states have its maximum.

    The fused kernel walks through memory and does not look at strides. What it is given is
    therefore dense, and lies as the parameter does: gradients and parameters are copied where they
    do not, and moments are laid out anew, once.

    Args:
        params: Written to.
        grads: Of the parameters' dtype; left as they are.
        states: From `init_moments`.
        group: Whose ``betas``, ``eps``, ``weight_decay``, ``maximize`` and ``fused`` are taken.
        lr: Learning rate.
        held_back: 0-dim bool: whether nothing may be written.
        grad_scale: 0-dim: what the gradients are still multiplied by.
    """
    fused = group["fused"]
    if not fused:
        # Only the fused kernel takes these two along on the device.
        if held_back is not None and bool(held_back):
            return
        if grad_scale is not None:
            grads = [grad / grad_scale for grad in grads]
        held_back = grad_scale = None
    written = params
    moments = [local(state[name]) for state in states for name in MOMENTS if name in state]
    if fused and not all(x.is_contiguous() for x in (*params, *grads, *moments)):
        params = [_dense(param) for param in params]
        grads = [_lying_as(param, grad) for param, grad in zip(params, grads, strict=True)]
        for param, state in zip(params, states, strict=True):
            _lay_out_moments(state, param)
    beta1, beta2 = group["betas"]
    maxima = [local(state["max_exp_avg_sq"]) for state in states if "max_exp_avg_sq" in state]
    adamw(
        params,
        grads,
        [local(state["exp_avg"]) for state in states],
        [local(state["exp_avg_sq"]) for state in states],
        maxima,
        [state["step"] for state in states],
        fused=fused,
        grad_scale=grad_scale,
        found_inf=None if held_back is None else held_back.float(),
        amsgrad=bool(maxima),
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    for own, param in zip(written, params, strict=True):
        if own is not param:
            own.copy_(param)


def _dense(param: Tensor) -> Tensor:
    """Return a parameter itself if its entries fill a stretch of memory, and a copy if not."""
    if are_dense(param):
        return param
    return torch.empty_like(param, memory_format=torch.preserve_format).copy_(param)


def _lying_as(param: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` itself if its entries lie in memory as the parameter's do, and a copy if not."""
    if lie_alike(param, x):
        return x
    return torch.empty_like(param, dtype=x.dtype, memory_format=torch.preserve_format).copy_(x)


def _lay_out_moments(state: MutableMapping[str, Any], param: Tensor) -> None:
    """Copy moments to the parameter's order in memory where they have another."""
    for name in MOMENTS:
        if name in state and not lie_alike(param, local(state[name])):
            state[name] = lying_as(state[name], _lying_as(param, local(state[name])))


def init_moments(
    state: MutableMapping[str, Any], param: Tensor, *, fused: bool, amsgrad: bool = False
) -> None:
    """Make the moments of a parameter, zero, where there are none.

    Moments of a parameter that has changed its dtype, as by ``model.bfloat16()``, change theirs.
    """
    if state:
        for name in MOMENTS:
            if name in state and state[name].dtype != param.dtype:
                state[name] = state[name].to(param.dtype)
        return
    # Names, shapes and devices as in torch.optim.AdamW, so that its checkpoints load here.
    state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if fused else "cpu")
    for name in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ())):
        state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
