"""AMSGrad that watches the norm of all gradients: the algorithm ``adamw-spam``.

Letters, everywhere in this file:
    m, v: the first and the second moment of a parameter
    z: how many standard deviations a norm lies above the mean of those before it
"""

import math
from collections.abc import MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sinkgd.exchange import Steps, computation
from sinkgd.optim.algorithms.adamw import descend_by_adamw_
from sinkgd.optim.algorithms.contract import (
    Context,
    Group,
    Slot,
    allowed,
    are_finite,
    local,
    on_mesh,
)
from sinkgd.optim.algorithms.resets import (
    begin,
    check_resets,
    cut_spikes,
    is_known,
    options_of,
    reset_,
    warmed,
)

NORM_HISTORY = "norm_history"
FEWEST_NORMS = 10  # that a mean is taken of
# The share of both moments that a spike takes.
SHARE_OF_M, SHARE_OF_V = 0.5, 0.1


class AdamWSpam:
    """Test the norm of a group's gradients for a spike, clip it, and update as AMSGrad does.

    One non-finite gradient holds back the whole group, and its norm is not remembered.
    """

    # ``norm_history`` holds the last norms, the newest at its end, NaN for those to come; it is
    # made here and saved with the group, so that a run that goes on knows them.
    options = MappingProxyType[str, object](
        {
            **options_of(theta=None, reset_interval=1000, warmup_steps=100),
            "max_norm": 1.0,
            "spike_z": 2.0,
            "norm_window": 100,
            NORM_HISTORY: None,
        }
    )

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range, and a group on several devices; begin the history."""
        check_resets(param, group)
        for option in ("max_norm", "spike_z"):
            if not group[option] > 0:
                raise ValueError(f"{option} must be positive, or inf for none, got {group[option]}")
        if group["norm_window"] < FEWEST_NORMS:
            raise ValueError(
                f"norm_window must be at least {FEWEST_NORMS} norms, got {group['norm_window']}"
            )
        device = group["params"][0].device
        if param.device != device:
            raise ValueError(
                f"{name!r} is on {param.device} and others of its group on {device}; adamw-spam "
                "takes the norm of a group on one device, so give each device a group of its own"
            )
        # One on the meta device, such as of a model that was made there, holds nothing.
        if group[NORM_HISTORY] is None or (group[NORM_HISTORY].is_meta and not param.is_meta):
            group[NORM_HISTORY] = torch.full(
                (group["norm_window"],), math.nan, dtype=torch.float64, device=device
            )

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Make both moments and the maximum of the second, zero."""
        begin(state, param, group, amsgrad=True)

    @computation
    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
        """Take the norm of all gradients, then update one by one."""
        finite: Tensor = yield are_finite(slots)
        flags = allowed(finite, context)
        for slot in slots:
            begin(context.states[slot.param], slot.param, group, amsgrad=True)
            reset_(context.states[slot.param], group)
        norm = yield _joint_norm(slots, group, context)
        may_write = None if flags is None else flags.all()
        spike = _is_spike_(group[NORM_HISTORY], norm, group["spike_z"], may_write)
        # As torch.nn.utils.clip_grads_with_norm_.
        share = (group["max_norm"] / (norm + 1e-6)).clamp(max=1.0)
        for slot in slots:
            state = context.states[slot.param]
            grad = _gradient(slot, group, context)
            grad = grad * share.to(grad.dtype)
            _soften_(state, spike)
            descend_by_adamw_(
                [local(slot.param)],
                [grad],
                [state],
                group,
                lr=warmed(state, group),
                held_back=None if may_write is None else ~may_write,
            )
        return finite


def _gradient(slot: Slot, group: Group, context: Context) -> Tensor:
    """Return this rank's piece of a gradient, without the loss's scale and without spikes."""
    grad = local(slot.grad)
    if context.loss_scale is not None:
        grad = grad / context.loss_scale
    return cut_spikes(grad, context.states[slot.param], group)


@computation
def _joint_norm(slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
    """Return the l2 norm of all gradients, 0-dim float64, the same on all ranks."""
    squares = torch.stack(
        [
            torch.linalg.vector_norm(_gradient(slot, group, context), dtype=torch.float64).square()
            for slot in slots
        ]
    )
    if any(on_mesh(slot.grad) for slot in slots):
        from sinkgd import sharded  # noqa: PLC0415 - it imports torch.distributed

        groups = [sharded.groups_of(x.grad) if on_mesh(x.grad) else () for x in slots]
        squares = yield sharded.add_up(squares, groups)
    return squares.sum().sqrt()


def _is_spike_(history: Tensor, norm: Tensor, z: float, may_write: Tensor | None) -> Tensor:
    """Return whether a norm is a spike, 0-dim bool, and remember it; not where nothing is written.

    Args:
        history: Earlier norms, ``(window,)``, NaN for those that there are not yet. Written to.
        norm: 0-dim.
        z: From which on it is a spike.
        may_write: 0-dim bool, if it is not known to be True.
    """
    known = history.isfinite()
    count = known.sum()
    mean = torch.where(known, history, 0).sum() / count
    deviation = (torch.where(known, history - mean, 0).square().sum() / count).sqrt()
    spike = (count >= FEWEST_NORMS) & (deviation > 0) & (norm - mean > z * deviation)
    remembered = torch.cat([history[1:], norm.reshape(1)])
    if may_write is None:
        history.copy_(remembered)
        return spike
    history.copy_(torch.where(may_write, remembered, history))
    return spike & may_write


def _soften_(state: MutableMapping[str, Any], spike: Tensor) -> None:
    """Take from both moments what a spike takes."""
    if is_known(spike) and not bool(spike):
        return
    for name, share in (("exp_avg", SHARE_OF_M), ("exp_avg_sq", SHARE_OF_V)):
        own = local(state[name])
        own.mul_(1 - share * spike.to(own.dtype))
