"""Momentum around any algorithm: of the gradient before it is normalized, or of the update after.

Letters, everywhere in this file:
    G: the gradient; X: the update of the algorithm inside
    B: the average that is kept; μ: its decay rate

The average is exponential, B ← μB + (1 − μ)G. A normalized step does not know a factor of its
gradient, so before the normalization it equals the sum μB + G that is usual.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sinkgd.exchange import Computation, Steps, computation
from sinkgd.kernels.eager import descend_
from sinkgd.number_check import check_decay_rate
from sinkgd.optim.algorithms.contract import (
    Algorithm,
    Context,
    Group,
    Slot,
    allowed,
    are_finite,
    decay,
    descent,
    local,
)
from sinkgd.optim.algorithms.few_at_a_time import few_at_a_time
from sinkgd.optim.algorithms.parts import first_entry_of, lying_as
from sinkgd.optim.algorithms.rounding import draw_keys

MOMENTUM = "momentum_buffer"
PLACES = ("before", "after")
MOMENTUM_OPTIONS = MappingProxyType[str, object](
    {"momentum": 0.0, "nesterov": False, "momentum_place": "before"}
)


class WithMomentum:
    r"""An algorithm, and momentum where a group asks for it.

    ``"before"``: B averages the gradients, and B (with ``nesterov``, μB + (1 − μ)G) is normalized.
    ``"after"``: B averages the updates, and the step goes along B (or μB + (1 − μ)X); it is
    shorter than an update where updates disagree, and in the first steps, as B begins at zero.

    State: ``state[param]["momentum_buffer"]``, which lies as the parameter does: float32, 4 bytes
    an entry (float64 for float64), as an average in bfloat16 would lose small gradients. Scratch:
    one parameter in float32 at a time; Nesterov's directions are as large, `few_at_a_time`. A
    gradient that is not finite leaves B as it was. On a mesh ``"before"`` costs a message a group.

    Args:
        inner: What normalizes.
    """

    def __init__(self, inner: Algorithm) -> None:
        self._inner = inner
        self.options: Mapping[str, Any] = MappingProxyType({**inner.options, **MOMENTUM_OPTIONS})

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse a decay rate or a place out of range, and what the algorithm inside refuses."""
        momentum, place = group["momentum"], group["momentum_place"]
        check_decay_rate("momentum", momentum)
        if place not in PLACES:
            raise ValueError(f"momentum_place must be one of {PLACES}, got {place!r}")
        if group["nesterov"] and momentum == 0:
            raise ValueError("nesterov=True needs a momentum above 0, e.g. momentum=0.95")
        self._inner.check(name, param, group)

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Make B, zero, beside what the algorithm inside keeps."""
        self._inner.init_state(param, group, state)
        if group["momentum"]:
            _buffer(state, param.detach())

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Computation[Tensor]:
        """Step as the algorithm inside does, with momentum before or after it."""
        if not group["momentum"]:
            return self._inner.step(slots, group, context)
        take = self._before if group["momentum_place"] == "before" else self._after
        if not group["nesterov"]:
            return take(slots, group, context)
        return few_at_a_time(slots, lambda own: take(own, group, context), context)

    @computation
    def _before(self, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
        finite: Tensor = yield are_finite(slots)
        flags = allowed(finite, context)
        directed = []
        for i, slot in enumerate(slots):
            flag = None if flags is None else flags[i]
            buffer = _buffer(context.states[slot.param], slot.param)
            _average_(local(buffer), slot, group, context, flag)
            if group["nesterov"]:
                ahead = local(buffer).clone()
                _average_(ahead, slot, group, context, flag)
                buffer = lying_as(slot.param, ahead)
            directed.append(
                slot._replace(grad=buffer, finite=finite[i], is_scratch=bool(group["nesterov"]))
            )
        inner = self._inner.step(directed, group, context._replace(loss_scale=None))
        taken: Tensor = yield inner
        return taken

    @computation
    def _after(self, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
        states, mu = context.states, group["momentum"]
        buffers = [_buffer(states[slot.param], slot.param) for slot in slots]
        before = [local(b).clone() for b in buffers] if group["nesterov"] else None
        finite: Tensor = yield self._inner.step(
            [slot._replace(param=b) for slot, b in zip(slots, buffers, strict=True)],
            # It then sets B to (1 − lr) B + lr X.
            {**group, "lr": 1 - mu, "weight_decay": 1.0, "maximize": True, "rounding": "nearest"},
            context._replace(
                states={b: states[slot.param] for slot, b in zip(slots, buffers, strict=True)}
            ),
        )
        flags, keys = allowed(finite, context), draw_keys(slots, group)
        for i, (slot, buffer) in enumerate(zip(slots, buffers, strict=True)):
            if before is None:
                along = local(buffer).clone()
            else:  # μB + (1 − μ)X, as X is (B − μ · B before) / (1 − μ)
                along = before[i].mul_(-mu).add_(local(buffer), alpha=1 + mu)
            first = first_entry_of(slot.param, group.get("layout", "auto"))
            descend_(
                local(slot.param),
                along,
                keep=decay(group),
                step=descent(group),
                allowed=None if flags is None else flags[i],
                key=None if keys is None else keys[i] + first,
            )
        return finite


def _buffer(state: MutableMapping[str, Any], param: Tensor) -> Tensor:
    """Return B, made anew where it is absent or has lost the parameter's order in memory."""
    kept: Tensor | None = state.get(MOMENTUM)
    here = local(param)
    if kept is not None and local(kept).stride() == here.stride():
        return kept
    dtype = torch.promote_types(param.dtype, torch.float32)
    own = torch.empty_strided(here.shape, here.stride(), dtype=dtype, device=here.device)
    if kept is None:
        own.zero_()
    else:
        own.copy_(local(kept))
    state[MOMENTUM] = lying_as(param, own)
    buffer: Tensor = state[MOMENTUM]
    return buffer


def _average_(B: Tensor, slot: Slot, group: Group, context: Context, flag: Tensor | None) -> None:
    """Set B to μB + (1 − μ)G, where G is divided by the scale of the loss; not where False."""
    share: float | Tensor = 1 - group["momentum"]
    if context.loss_scale is not None:
        share = share / context.loss_scale
    grad = local(slot.grad).to(B.dtype, copy=True)
    descend_(B, grad, keep=group["momentum"], step=share, allowed=flag)
