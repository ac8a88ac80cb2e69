"""What SPAM adds to Adam: moments that begin anew, a warm-up after it, and spikes that are cut.

Letters, everywhere in this file:
    m, v: the first and the second moment; v is the moving average as it is, its bias not corrected
    t: steps of a parameter since its moments began, as torch counts them for bias corrections
"""

import math
from collections.abc import Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sinkgd.optim.algorithms.adamw import ADAMW_OPTIONS, MOMENTS, check_adamw, init_moments
from sinkgd.optim.algorithms.contract import Group, learning_rate, local

# How often the moments of a parameter have begun anew. Its place in the state is kept by name.
RESETS = "resets"


def options_of(*, theta: float | None, reset_interval: int, warmup_steps: int) -> Mapping[str, Any]:
    """Return the group options of Adam with resets, with these defaults."""
    return MappingProxyType(
        {
            **ADAMW_OPTIONS,
            "theta": theta,
            "clip_delay": 20,
            "reset_interval": reset_interval,
            "warmup_steps": warmup_steps,
        }
    )


def check_resets(param: Tensor, group: Group) -> None:
    """Refuse options out of range.

    Raises:
        ValueError: With the option and its value.
    """
    check_adamw(param, group)
    theta = group["theta"]
    if theta is not None and not 0 < theta < math.inf:
        raise ValueError(f"theta must be positive and finite, or None to cut nothing, got {theta}")
    if group["reset_interval"] < 1:
        raise ValueError(f"reset_interval must be at least 1 step, got {group['reset_interval']}")
    for option in ("clip_delay", "warmup_steps"):
        if group[option] < 0:
            raise ValueError(f"{option} must be at least 0 steps, got {group[option]}")


def begin(
    state: MutableMapping[str, Any], param: Tensor, group: Group, *, amsgrad: bool = False
) -> None:
    """Make the state of a parameter where there is none."""
    init_moments(state, param, fused=group["fused"], amsgrad=amsgrad)
    if RESETS not in state:
        state[RESETS] = torch.zeros_like(state["step"])


def reset_(state: MutableMapping[str, Any], group: Group) -> None:
    """Begin the moments anew, and their bias corrections, once they are ``reset_interval`` old."""
    due = state["step"] >= group["reset_interval"]
    if is_known(due) and not bool(due):
        return
    state[RESETS].add_(due)
    for name in ("step", *MOMENTS):
        if name in state:
            own = local(state[name])
            own.masked_fill_(due.to(own.device), 0)


def warmed(state: Mapping[str, Any], group: Group) -> float | Tensor:
    r"""Return the learning rate of the coming step: lr times a half cosine after a reset.

    .. math::
        \eta\, \frac{1 - \cos(\pi (t + 1) / (W + 1))}{2}, \qquad t < W
    """
    lr, length, t = learning_rate(group), group["warmup_steps"], state["step"]
    # The kernels of accelerators take a learning rate in float32 alone.
    t = t.to(torch.float64 if t.is_cpu else torch.float32)
    share = (1 - torch.cos(math.pi * (t + 1) / (length + 1))) / 2
    factor = torch.where((state[RESETS] > 0) & (t < length), share, 1)
    if is_known(factor) and factor == 1:
        return lr
    return factor * lr


def cut_spikes(grad: Tensor, state: Mapping[str, Any], group: Group) -> Tensor:
    r"""Return this rank's piece of a gradient, where no entry is beyond :math:`\sqrt{\theta v}`.

    Entries keep their sign. For ``clip_delay`` steps from where the moments began nothing is cut,
    nor where v is zero: there is nothing that an entry could be a spike against, and cut to zero it
    would keep v at zero.

    Args:
        grad: Finite. Not modified; returned itself where there is nothing to do.
        state: Of the parameter.
        group: With ``theta`` and ``clip_delay``.
    """
    if group["theta"] is None:
        return grad
    ready = state["step"] >= group["clip_delay"]
    if is_known(ready) and not bool(ready):
        return grad
    v = local(state["exp_avg_sq"])
    limit = v.sqrt() * math.sqrt(group["theta"])
    limit = torch.where(ready.to(v.device) & (v > 0), limit, math.inf)
    return grad.clamp(-limit, limit)


def is_known(number: Tensor) -> bool:
    """Whether a number can be read without waiting for a device."""
    return number.is_cpu and not torch.compiler.is_compiling()
