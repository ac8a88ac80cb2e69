"""AdamWSPAM: AMSGrad with moments that shrink at spikes of the norm and are regularly reset.

Letters, everywhere in this file:
    m, v: the first and the second moment of a parameter
    N: the l2 norm of all gradients of a group
    z: the threshold; N is a spike if it is more than z standard deviations above the mean of
        earlier norms
"""

import math
from collections.abc import MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sinkgd.contrib.spam import (
    NEEDS_OF_CLIPPING,
    can_read_now,
    check_resets,
    clip_spikes,
    init_resets,
    options_with_resets,
    reset_,
    warmed_up_lr,
)
from sinkgd.distributed.all_reduce import all_reduce
from sinkgd.distributed.shards import local, shard_groups
from sinkgd.exchange import Steps, computation
from sinkgd.optim.apply import allowed
from sinkgd.optim.arguments import suggest_names
from sinkgd.optim.grouped import GroupedOptimizer
from sinkgd.optim.method import Context, Group, Method, Need, Slot, are_finite
from sinkgd.optim.methods.adamw import descend_by_adamw_, refuse_other_dtype

NORM_HISTORY = "norm_history"
FEWEST_NORMS = 10  # a norm is tested only if there are this many earlier norms
# A spike shrinks m and v by these fractions.
SHARE_OF_M, SHARE_OF_V = 0.5, 0.1


class AdamWSPAM(GroupedOptimizer):
    r"""AdamW with AMSGrad and clipping, whose moments shrink at spikes and are regularly reset.

    Let N be the l2 norm of all gradients of a parameter group, after the clipping of entries. A
    step does the following, in order:

    - clip entries of g to :math:`\pm\sqrt{\theta v}`, as `SPAM` does, if ``theta`` is given;
    - if :math:`N > \bar N + z s`, where :math:`\bar N` and s are the mean and the standard
      deviation of the norms of the last ``norm_window`` steps, set :math:`m \leftarrow m / 2` and
      :math:`v \leftarrow 0.9 v`;
    - set :math:`g \leftarrow g \min(1, N_{\max} / (N + 10^{-6}))`, where :math:`N_{\max}` is
      ``max_norm``, as torch clips;
    - take a step of torch's AdamW with ``amsgrad=True``.

    When the moments are ``reset_interval`` steps old, they are reset to zero, and ``lr`` rises
    along a half cosine for ``warmup_steps`` steps.

    This optimizer is the baseline in the ablation of `TemperedSinkGD`. It is not `SPAM`. The
    published description of the baseline leaves some points open. Here a norm is tested only if
    there are at least 10 earlier norms and these are not all equal. Earlier spikes count among
    them. A reset also zeroes the maximum of v, which AMSGrad keeps; a spike leaves that maximum
    unchanged. The bias corrections restart at the reset. The warm-up scales ``lr``, and with it the
    weight decay. N is the norm of one group. To use the norm of the model, put all parameters into
    one group, or clip before the step. Under torch's ZeroRedundancyOptimizer, which gives each rank
    some of the parameters, N is the norm of those. If one gradient is not finite, the whole group
    is left unchanged, and the norm is not remembered.

    State: three numbers per entry. The last norms are saved with the group. A step needs all
    gradients of the group, so `GradientRelease` refuses this optimizer.

    Args:
        params: Tensors or (name, tensor) pairs, or groups of them; of any shape, whole or sharded.
            On each rank, all parameters of a group are on one device.
        lr: Learning rate η of the groups that do not set their own, at least 0; a float or a tensor
            of one element. Default: 1e-3.
        betas: Decay rates of the first and second moments per step, each in [0, 1).
        eps: Added to the root of the second moment, at least 0.
        weight_decay: Decoupled weight decay λ, at least 0, multiplied by ``lr``. Default: 0.
        max_norm: The norm to which a longer gradient is clipped, positive; infinity never clips.
        spike_z: z, positive: a norm is a spike if it is more than z standard deviations above the
            mean.
        norm_window: How many norms are remembered, at least 10. Needs a finite ``spike_z``.
        theta: Threshold θ of single entries, positive, in units of v; None clips nothing.
        clip_delay: Steps after a start or a reset in which no entry is clipped, at least 0.
            Needs ``theta``.
        reset_interval: Steps between resets, at least 1.
        warmup_steps: Steps in which ``lr`` rises after a reset, at least 0.
        cautious_decay: Decay only entries that the update moves toward zero; see `SinkGD`.
        maximize: Ascend instead.
        nonfinite: What a gradient with NaN or infinity does: ``"raise"`` or ``"skip"`` (leave the
            group unchanged, and count the parameter in `skipped`).

    Raises:
        ValueError: If an option is out of range, or the parameters of a group are on several
            devices.
        TypeError: If a parameter is not real and floating.

    Examples:
        >>> import torch
        >>> from sinkgd import AdamWSPAM
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = AdamWSPAM(model.parameters(), lr=3e-4, weight_decay=0.1)
        >>> model(torch.ones(2, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.param_groups[0]["norm_history"].isfinite().sum().item()
        1

    References:
        Huang et al., SPAM. https://arxiv.org/abs/2501.06842
        Reddi et al., On the Convergence of Adam and Beyond. https://openreview.net/forum?id=ryQu7f-RZ
    """

    default_algorithm = "adamw-spam"
    usual_call = "AdamWSPAM(model.parameters())"

    @suggest_names({})
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        *,
        max_norm: float = 1.0,
        spike_z: float = 2.0,
        norm_window: int = 100,
        theta: float | None = None,
        clip_delay: int = 20,
        reset_interval: int = 1000,
        warmup_steps: int = 100,
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
            "max_norm": max_norm,
            "spike_z": spike_z,
            "norm_window": norm_window,
            "theta": theta,
            "clip_delay": clip_delay,
            "reset_interval": reset_interval,
            "warmup_steps": warmup_steps,
            "maximize": maximize,
            "nonfinite": nonfinite,
        }
        super().__init__(params, arguments)


class AdamWSpam(Method):
    """The method ``adamw-spam``: test the norm of a group for a spike, clip, and step as AMSGrad.

    If one gradient is not finite, the whole group is left unchanged.
    """

    # ``norm_history`` holds the last norms, the newest at its end, and NaN for norms to come.
    # `check` creates it, and `step` resizes it if ``norm_window`` was changed. It is saved with the
    # group, so that a resumed run knows the norms.
    counters = frozenset({NORM_HISTORY})
    needs_all_gradients = (
        "the norm of all gradients of the group, and here they come one by one; use "
        "algorithm='spam' or 'adamw' for it, or step without GradientRelease"
    )
    options = MappingProxyType[str, object](
        {
            **options_with_resets(theta=None, reset_interval=1000, warmup_steps=100),
            "max_norm": 1.0,
            "spike_z": 2.0,
            "norm_window": 100,
            NORM_HISTORY: None,
        }
    )
    needs = MappingProxyType(
        {
            **NEEDS_OF_CLIPPING,
            "norm_window": Need("spike_z", math.inf, "a finite spike_z, e.g. spike_z=2.0"),
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
        # A model may have been built on the meta device, where a history has no values.
        if group[NORM_HISTORY] is None or (group[NORM_HISTORY].is_meta and not param.is_meta):
            group[NORM_HISTORY] = torch.full(
                (group["norm_window"],), math.nan, dtype=torch.float64, device=device
            )

    def check_other_dtype(self, name: str, param: Tensor, grad: Tensor, group: Group) -> None:
        """Refuse the gradient, which torch's AdamW does not take."""
        del group
        refuse_other_dtype(name, param, grad)

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Create both moments and the maximum of the second, filled with zeros."""
        init_resets(state, param, group, amsgrad=True)

    @computation
    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
        """Compute the norm of all gradients, then update the parameters one by one."""
        finite: Tensor = yield are_finite(slots)
        flags = allowed(finite, context)
        may_write = None if flags is None else flags.all()
        for slot in slots:
            init_resets(context.states[slot.param], slot.param, group, amsgrad=True)
            reset_(context.states[slot.param], group, may_write)
        norm = yield _joint_norm(slots, group, context)
        spike = _is_spike_(_history_of(group), norm, group["spike_z"], may_write)
        # The same factor as in torch.nn.utils.clip_grads_with_norm_.
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
                lr=warmed_up_lr(state, group),
                held_back=None if may_write is None else ~may_write,
            )
        return finite


def _gradient(slot: Slot, group: Group, context: Context) -> Tensor:
    """Return this rank's shard of a gradient, divided by the loss scale and with spikes clipped."""
    grad = local(slot.grad)
    if context.loss_scale is not None:
        grad = grad / context.loss_scale
    return clip_spikes(grad, context.states[slot.param], group)


@computation
def _joint_norm(slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
    """Return the l2 norm of all gradients, 0-dim float64, the same on all ranks."""
    squares = torch.stack(
        [
            torch.linalg.vector_norm(_gradient(slot, group, context), dtype=torch.float64).square()
            for slot in slots
        ]
    )
    groups = [shard_groups(slot.grad) for slot in slots]
    if any(groups):
        squares = yield all_reduce(squares, groups)
    return squares.sum().sqrt()


def _history_of(group: Group) -> Tensor:
    """Return the last norms of a group; keep the newest if ``norm_window`` was changed."""
    history: Tensor = group[NORM_HISTORY]
    if len(history) != group["norm_window"]:
        newest = history[-group["norm_window"] :]
        missing = newest.new_full((group["norm_window"] - len(newest),), math.nan)
        history = group[NORM_HISTORY] = torch.cat([missing, newest])
    return history


def _is_spike_(history: Tensor, norm: Tensor, z: float, may_write: Tensor | None) -> Tensor:
    """Return whether a norm is a spike, 0-dim bool, and add the norm to the history.

    Args:
        history: Earlier norms, ``(window,)``, NaN for norms to come. Written to.
        norm: The norm of this step, 0-dim.
        z: The threshold in standard deviations above the mean.
        may_write: 0-dim bool; None if it is known to be True. If it is False, the history is left
            unchanged, and the norm counts as no spike.
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
    """Shrink both moments if the norm is a spike."""
    if can_read_now(spike) and not bool(spike):
        return
    for name, share in (("exp_avg", SHARE_OF_M), ("exp_avg_sq", SHARE_OF_V)):
        own = local(state[name])
        own.mul_(1 - share * spike.to(own.dtype))
