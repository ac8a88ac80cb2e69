"""Momentum for methods that normalize: gradients are averaged before, or updates after.

Letters, everywhere in this file:
    G: the gradient; X: the update of the method
    B: the average that is kept; μ: its decay rate

The average is exponential, B ← μB + (1 − μ)G. A normalized step does not depend on the scale of
what is normalized, so normalizing this average gives the same step as the usual sum μB + G.

``"before"``: B averages the gradients, and B (with ``nesterov``, μB + (1 − μ)G) is normalized.
``"after"``: B averages the updates, and the step goes along B (or μB + (1 − μ)X). B is shorter than
an update if updates disagree, and in the first steps, since it begins at zero.

State: ``state[param]["momentum_buffer"]``, sharded like the parameter: float32, 4 bytes per entry
(float64 for float64), since an average in bfloat16 would lose small gradients. With
``momentum_bits=8``, ``"after"`` keeps one byte for each entry b of B instead: the nearest integer
to ±127 √(|b|/4), so that codes are closer together near zero. No scales are kept with the bytes,
since an average of updates has a root-mean-square of at most 1; entries beyond ±4 become ±4. An
entry without an update, such as one of an expert without tokens, is rounded toward zero: the
nearest code could be the one that it had, and the average would never fade. PowerStep keeps the
momentum of another normalized update in int8.

Scratch: one parameter in float32 at a time. Directions of Nesterov's rule, averages of updates for
``constant_norm``, and averages decoded from 8 bits are as large as the gradients, and computed in
chunks. A non-finite gradient leaves B unchanged. On a mesh ``"before"`` adds one message to each
process group.

References:
    PowerStep: https://arxiv.org/abs/2605.10335
"""

from collections.abc import MutableMapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sinkgd.distributed.shards import first_entry_of, from_local, local
from sinkgd.exchange import Computation, Steps, computation
from sinkgd.kernels.eager import apply_update_
from sinkgd.matrix_views import dense_strides
from sinkgd.number_check import check_decay_rate
from sinkgd.optim.apply import UpdateWriter, allowed
from sinkgd.optim.method import Context, Group, Slot, are_finite
from sinkgd.optim.transform import Scratch, Step, Transform, step_in_chunks
from sinkgd.optim.transforms.constant_norm import hold_norms_

MOMENTUM = "momentum_buffer"
PLACES = ("before", "after")
BITS = (8, 32)
LARGEST = 4.0  # absolute value of an entry of B in 8 bits
ROUNDING = 2.0**-20  # relative; more than the errors of a step in float32


class Momentum(Transform):
    """An average of the gradients, or of the updates. Vectors have momentum, too."""

    options = MappingProxyType[str, object](
        {"momentum": 0.0, "nesterov": False, "momentum_place": "before", "momentum_bits": 32}
    )
    switch = "momentum"
    remedy = "a momentum above 0, e.g. momentum=0.95"
    takes_vectors = True

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options that are out of range or do not combine."""
        del param
        momentum, place = group["momentum"], group["momentum_place"]
        check_decay_rate("momentum", momentum)
        if place not in PLACES:
            raise ValueError(f"momentum_place must be one of {PLACES}, got {place!r}")
        bits = group["momentum_bits"]
        if bits not in BITS:
            raise ValueError(f"momentum_bits must be one of {BITS}, got {bits!r}")
        if bits == 8 and momentum and place == "before":
            raise ValueError(
                f"momentum_bits=8 needs an average of updates, and the group of {name!r} averages "
                "gradients: set momentum_place='after', or momentum_bits=32 for this group"
            )

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Create B, filled with zeros."""
        _keep(state, param, _buffer(state, param.detach()), group)

    def scratch(self, group: Group, *, packs_vectors: bool, sharded: bool) -> Scratch:
        """Return what is held: directions, or averages decoded from 8 bits."""
        del packs_vectors, sharded
        return Scratch(copies=_copies(group))

    def around(
        self, step: Step, slots: Sequence[Slot], group: Group, context: Context
    ) -> Computation[Tensor]:
        """Take a step along B, or average the updates of a step into B and then go along B.

        Momentum needs this hook for two reasons: methods without scales take momentum, too, and
        the step itself can write its update into B, as if B were the parameter.
        """
        take = _before if group["momentum_place"] == "before" else _after
        if _copies(group):
            return step_in_chunks(partial(take, step), slots, group, context)
        return take(step, slots, group, context)


@computation
def _before(step: Step, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
    finite: Tensor = yield are_finite(slots)
    flags = allowed(finite, context)
    directed = []
    for i, slot in enumerate(slots):
        flag = None if flags is None else flags[i]
        buffer = _buffer(context.states[slot.param], slot.param)
        _keep(context.states[slot.param], slot.param, buffer, group)
        _average_(local(buffer), slot, group, context, flag)
        if group["nesterov"]:
            ahead = local(buffer).clone()
            _average_(ahead, slot, group, context, flag)
            buffer = from_local(slot.param, ahead)
        directed.append(
            slot._replace(grad=buffer, finite=finite[i], is_scratch=bool(group["nesterov"]))
        )
    without = {**group, "momentum": 0.0}
    taken: Tensor = yield step(directed, without, context._replace(loss_scale=None))
    return taken


@computation
def _after(step: Step, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
    states, mu = context.states, group["momentum"]
    buffers = [_buffer(states[slot.param], slot.param) for slot in slots]
    before = [local(b).clone() for b in buffers] if group["nesterov"] else None
    finite: Tensor = yield step(
        [slot._replace(param=b, weight=slot.param) for slot, b in zip(slots, buffers, strict=True)],
        # With these options the step sets B to (1 − lr) B + lr X.
        {
            **group,
            "momentum": 0.0,
            "lr": 1 - mu,
            "weight_decay": 1.0,
            "cautious_decay": False,
            "maximize": True,
            "rounding": "nearest",
            "constant_norm": False,
        },
        context._replace(
            states={b: states[slot.param] for slot, b in zip(slots, buffers, strict=True)}
        ),
    )
    for slot, buffer in zip(slots, buffers, strict=True):
        _keep(states[slot.param], slot.param, buffer, group)

    def direction(i: int) -> Tensor:
        if before is None:
            return local(buffers[i]).clone()
        # μB + (1 − μ)X, as X is (B − μ · B before) / (1 − μ)
        return before[i].mul_(-mu).add_(local(buffers[i]), alpha=1 + mu)

    held: list[Tensor] | None = None
    if group.get("constant_norm"):
        held = [direction(i) for i in range(len(slots))]
        finite = yield hold_norms_(slots, held, finite, group, context)
    writer = UpdateWriter(slots, finite, group, context)
    for i, slot in enumerate(slots):
        along = direction(i) if held is None else held[i]
        first = first_entry_of(slot.param, group.get("layout", "auto"))
        writer.write_(i, local(slot.param), along, first)
    return finite


def _copies(group: Group) -> bool:
    """Whether the directions, or the decoded averages, of all parameters are held at once."""
    holds = group.get("constant_norm", False) and group["momentum_place"] == "after"
    return bool(group["nesterov"] or holds or group["momentum_bits"] == 8)


def _buffer(state: MutableMapping[str, Any], param: Tensor) -> Tensor:
    """Return B: zeros if absent, a copy if B is in 8 bits or lost the parameter's memory order.

    B is dense, even if there are gaps between the entries of the parameter.
    """
    kept: Tensor | None = state.get(MOMENTUM)
    here = local(param)
    dtype = torch.promote_types(param.dtype, torch.float32)
    strides = dense_strides(here)
    if kept is not None and (kept.dtype, local(kept).stride()) == (dtype, strides):
        return kept
    own = torch.empty_strided(here.shape, strides, dtype=dtype, device=here.device)
    if kept is None:
        own.zero_()
    else:
        own.copy_(_from_int8(local(kept)) if kept.dtype == torch.int8 else local(kept))
    return from_local(param, own)


def _keep(state: MutableMapping[str, Any], param: Tensor, buffer: Tensor, group: Group) -> None:
    """Keep B in as many bits as the group asks for."""
    if group["momentum_bits"] == 8:
        kept: Tensor | None = state.get(MOMENTUM)
        was = _from_int8(local(kept)) if kept is not None and kept.dtype == torch.int8 else None
        buffer = from_local(param, _to_int8(local(buffer), was, group["momentum"]))
    state[MOMENTUM] = buffer


def _to_int8(x: Tensor, was: Tensor | None, mu: float) -> Tensor:
    """Encode B, given what it was before the step; entries that only faded go toward zero."""
    size = (x.abs() / LARGEST).sqrt_().mul_(127)
    nearest = size.round()
    if was is not None:
        only_faded = (x - mu * was).abs() <= ROUNDING * mu * was.abs()
        nearest = torch.where(only_faded, size.floor_(), nearest)
    return nearest.clamp_(max=127).copysign_(x).to(torch.int8)


def _from_int8(code: Tensor) -> Tensor:
    x = code.float() / 127
    return x * x.abs() * LARGEST


def _average_(B: Tensor, slot: Slot, group: Group, context: Context, flag: Tensor | None) -> None:
    """Set B to μB + (1 − μ)G, with G divided by the loss scale, unless ``flag`` is False."""
    share: float | Tensor = 1 - group["momentum"]
    if context.loss_scale is not None:
        share = share / context.loss_scale
    grad = local(slot.grad).to(B.dtype, copy=True)
    apply_update_(B, grad, keep=group["momentum"], step=share, allowed=flag)
