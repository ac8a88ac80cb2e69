"""SPAM: Adam that clips spikes of the gradient and resets its moments.

Letters, everywhere in this file:
    m, v: the first and the second moment; v is the moving average without bias correction
    t: steps of a parameter since its moments were last zero, as torch counts them for bias
        corrections

References:
    Huang et al., SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training.
    https://arxiv.org/abs/2501.06842
"""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sinkgd.distributed.shards import local
from sinkgd.exchange import Steps, computation
from sinkgd.optim.apply import allowed, learning_rate
from sinkgd.optim.arguments import suggest_names
from sinkgd.optim.grouped import GroupedOptimizer
from sinkgd.optim.method import Context, Group, Method, Need, Slot, are_finite
from sinkgd.optim.methods.adamw import (
    ADAMW_OPTIONS,
    MOMENTS,
    check_adamw,
    descend_by_adamw_,
    init_moments,
    refuse_other_dtype,
)

# The state entry that counts the resets of a parameter.
RESETS = "resets"


class SPAM(GroupedOptimizer):
    r"""Adam that clips spikes of single entries, and resets its moments from time to time.

    Each entry is clipped with v as it was before the step,

    .. math::
        g \leftarrow \operatorname{sign}(g) \sqrt{\theta v} \quad \text{where } g^2 > \theta v,

    and torch's AdamW steps along the result. When the moments m and v are ``reset_interval`` steps
    old, they are reset to zero, and ``lr`` rises along a half cosine for ``warmup_steps`` steps.

    The paper leaves some points open. Here the bias corrections restart at the reset, together with
    the moments. The warm-up scales ``lr``, and with it the weight decay. As in the authors' code,
    nothing is clipped for ``clip_delay`` steps after a start or a reset. An entry whose v is zero
    is not clipped: it would be clipped to zero, and v would stay zero. Each parameter counts the
    steps that updated it. State: two numbers per entry.

    Args:
        params: Tensors or (name, tensor) pairs, or groups of them; of any shape, whole or sharded.
        lr: Learning rate η of the groups that do not set their own, at least 0; a float or a tensor
            of one element. Default: 1e-3.
        betas: Decay rates of the first and second moments per step, each in [0, 1).
        eps: Added to the root of the second moment, at least 0.
        weight_decay: Decoupled weight decay λ, at least 0, multiplied by ``lr``. Default: 0.
        theta: Threshold θ, positive, in units of v; None clips nothing.
        clip_delay: Steps after a start or a reset in which nothing is clipped, at least 0. Needs
            ``theta``.
        reset_interval: Steps between resets, at least 1.
        warmup_steps: Steps in which ``lr`` rises after a reset, at least 0.
        cautious_decay: Decay only entries that the update moves toward zero; see `SinkGD`.
        maximize: Ascend instead.
        nonfinite: What a gradient with NaN or infinity does: ``"raise"`` or ``"skip"`` (leave the
            parameter unchanged, and count it in `skipped`).

    Raises:
        ValueError: If an option is out of range; the message names it.
        TypeError: If a parameter is not real and floating.

    Examples:
        >>> import torch
        >>> from sinkgd import SPAM
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> optimizer = SPAM([weight], lr=0.1)
        >>> for _ in range(500):
        ...     weight.grad = torch.tensor([1.0, -2.0, 0.0])
        ...     optimizer.step()
        >>> optimizer.state[weight]["step"].item()
        500.0
        >>> optimizer.step()  # the moments were reset
        >>> optimizer.state[weight]["step"].item()
        1.0

    References:
        Huang et al., SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training.
        https://arxiv.org/abs/2501.06842
    """

    default_algorithm = "spam"
    usual_call = "SPAM(model.parameters())"

    @suggest_names({})
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        *,
        theta: float | None = 5000.0,
        clip_delay: int = 20,
        reset_interval: int = 500,
        warmup_steps: int = 150,
        cautious_decay: bool = False,
        maximize: bool = False,
        nonfinite: str = "raise",
    ) -> None:
        arguments: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "cautious_decay": cautious_decay,
            "theta": theta,
            "clip_delay": clip_delay,
            "reset_interval": reset_interval,
            "warmup_steps": warmup_steps,
            "maximize": maximize,
            "nonfinite": nonfinite,
        }
        super().__init__(params, arguments)


def options_with_resets(
    *, theta: float | None, reset_interval: int, warmup_steps: int
) -> Mapping[str, Any]:
    """Return the group options of an Adam with resets, with the arguments as their defaults."""
    return MappingProxyType(
        {
            **ADAMW_OPTIONS,
            "theta": theta,
            "clip_delay": 20,
            "reset_interval": reset_interval,
            "warmup_steps": warmup_steps,
        }
    )


# Without a threshold no spike is clipped, from the first step on.
NEEDS_OF_CLIPPING = MappingProxyType(
    {"clip_delay": Need("theta", None, "theta, e.g. theta=5000.0")}
)


def check_resets(param: Tensor, group: Group) -> None:
    """Refuse options out of range.

    Raises:
        ValueError: If an option is out of range; the message gives the option and its value.
    """
    check_adamw(param, group)
    theta = group["theta"]
    if theta is not None and not 0 < theta < math.inf:
        raise ValueError(f"theta must be positive and finite, or None to clip nothing, got {theta}")
    if group["reset_interval"] < 1:
        raise ValueError(f"reset_interval must be at least 1 step, got {group['reset_interval']}")
    for option in ("clip_delay", "warmup_steps"):
        if group[option] < 0:
            raise ValueError(f"{option} must be at least 0 steps, got {group[option]}")


def init_resets(
    state: MutableMapping[str, Any], param: Tensor, group: Group, *, amsgrad: bool = False
) -> None:
    """Create the moments and the count of resets of a parameter, unless they exist."""
    init_moments(state, param, fused=group["fused"], amsgrad=amsgrad)
    if RESETS not in state:
        state[RESETS] = torch.zeros_like(state["step"])


def reset_(state: MutableMapping[str, Any], group: Group, may_write: Tensor | None) -> None:
    """Reset the moments and their bias corrections once they are ``reset_interval`` steps old.

    Args:
        state: The state of a parameter.
        group: Its group.
        may_write: 0-dim bool: whether this step may change the state; None if it may.
    """
    due = state["step"] >= group["reset_interval"]
    if may_write is not None:
        due = due & may_write.to(due.device)
    if can_read_now(due) and not bool(due):
        return
    state[RESETS].add_(due)
    for name in ("step", *MOMENTS):
        if name in state:
            own = local(state[name])
            own.masked_fill_(due.to(own.device), 0)


def warmed_up_lr(state: Mapping[str, Any], group: Group) -> float | Tensor:
    r"""Return the learning rate of the next step: lr times a half cosine after a reset.

    .. math::
        \eta\, \frac{1 - \cos(\pi (t + 1) / (W + 1))}{2}, \qquad t < W

    where W is ``warmup_steps``. The rate is η for larger t, and before the first reset.
    """
    lr, length, t = learning_rate(group), group["warmup_steps"], state["step"]
    # Kernels of accelerators take a learning rate in float32 only.
    t = t.to(torch.float64 if t.is_cpu else torch.float32)
    share = (1 - torch.cos(math.pi * (t + 1) / (length + 1))) / 2
    factor = torch.where((state[RESETS] > 0) & (t < length), share, 1)
    if can_read_now(factor) and factor == 1:
        return lr
    return factor * lr


def clip_spikes(grad: Tensor, state: Mapping[str, Any], group: Group) -> Tensor:
    r"""Clip the entries of this rank's shard of a gradient to :math:`\pm\sqrt{\theta v}`.

    Nothing is clipped for ``clip_delay`` steps after the moments were last zero. An entry whose v
    is zero is not clipped either: v does not tell whether the entry is a spike, and if the entry
    were clipped to zero, v would stay zero.

    Args:
        grad: A gradient whose entries are all finite. It is not modified; if nothing is clipped, it
            may be returned as it is.
        state: The state of the parameter.
        group: A group with ``theta`` and ``clip_delay``.
    """
    if group["theta"] is None:
        return grad
    ready = state["step"] >= group["clip_delay"]
    if can_read_now(ready) and not bool(ready):
        return grad
    v = local(state["exp_avg_sq"])
    limit = v.sqrt() * math.sqrt(group["theta"])
    limit = torch.where(ready.to(v.device) & (v > 0), limit, math.inf)
    return grad.clamp(-limit, limit)


def can_read_now(number: Tensor) -> bool:
    """Whether Python can read a number now: it is on the CPU, and torch.compile is not tracing."""
    return number.is_cpu and not torch.compiler.is_compiling()


class Spam(Method):
    """The method ``spam``. It copies the gradient of one parameter at a time.

    A parameter with a non-finite gradient is left unchanged.
    """

    is_elementwise = True
    options = options_with_resets(theta=5000.0, reset_interval=500, warmup_steps=150)
    needs = NEEDS_OF_CLIPPING

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range. Parameters of any shape are accepted, whole or sharded."""
        del name
        check_resets(param, group)

    def check_other_dtype(self, name: str, param: Tensor, grad: Tensor, group: Group) -> None:
        """Refuse the gradient, which torch's AdamW does not take."""
        del group
        refuse_other_dtype(name, param, grad)

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Create both moments, filled with zeros, and the count of resets."""
        init_resets(state, param, group)

    @computation
    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
        """Check the gradients; then clip the spikes of each and take the step of torch's AdamW."""
        finite: Tensor = yield are_finite(slots)
        flags = allowed(finite, context)
        for i, slot in enumerate(slots):
            state = context.states[slot.param]
            init_resets(state, slot.param, group)
            reset_(state, group, None if flags is None else flags[i])
            grad = local(slot.grad)
            if context.loss_scale is not None:
                grad = grad / context.loss_scale
            descend_by_adamw_(
                [local(slot.param)],
                [clip_spikes(grad, state, group)],
                [state],
                group,
                lr=warmed_up_lr(state, group),
                held_back=None if flags is None else ~flags[i],
            )
        return finite
