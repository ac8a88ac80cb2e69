"""AdamWSPAM: AMSGrad whose moments shrink when the gradient's norm spikes, and begin anew."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from sinkgd.optim.grouped import GroupedOptimizer
from sinkgd.optim.unknown_names import suggest_names


class AdamWSPAM(GroupedOptimizer):
    r"""AdamW with AMSGrad, a clipped norm, and moments that a spike shrinks and time resets.

    With N the l2 norm of all gradients of a parameter group, in this order:

    - entries of g beyond :math:`\sqrt{\theta v}` are cut to it, if ``theta`` is given (`SPAM`);
    - where :math:`N > \bar N + z s`, with the mean and the standard deviation of the norms of the
      last ``norm_window`` steps before, :math:`m \leftarrow m / 2` and :math:`v \leftarrow 0.9 v`;
    - :math:`g \leftarrow g \min(1, N_{\max} / (N + 10^{-6}))`, as torch clips;
    - a step of torch's AdamW with ``amsgrad=True``.

    When the moments are ``reset_interval`` steps old they begin anew from zero, and ``lr`` rises
    along a half cosine for ``warmup_steps`` steps.

    It is the control of the ablation of `TemperedSinkGD`, and not `SPAM`. Where its description is
    silent: a norm is tested when there are 10 before it, which a spike joins, too; the maximum of v
    that AMSGrad keeps begins anew with v, and a spike leaves it; bias corrections count from the
    reset; the warm-up is of ``lr``, and with it of the weight decay. The norm is that of one group:
    put all parameters into one, or clip before the step, where it is to be that of the model. A
    gradient that is not finite holds back its group, and leaves no norm.

    Three numbers of state an entry. The last norms are saved with the group. A step needs all
    gradients of the group, so `GradientRelease` refuses it.

    Args:
        params: Tensors or (name, tensor) pairs, or groups of them; of any shape, whole or sharded.
            Those of a group are on one device, or one on each rank.
        lr: Learning rate η of the groups that do not set their own, at least 0; a float or a tensor
            of one element. Default: 1e-3.
        betas: Decay of the first and the second moment a step, in [0, 1).
        eps: Added to the root of the second moment, at least 0.
        weight_decay: Decoupled weight decay λ, at least 0, multiplied by ``lr``. Default: 0.
        max_norm: To which a longer gradient is clipped, positive; infinity clips none.
        spike_z: z, positive: standard deviations above the mean from which on a norm is a spike.
        norm_window: Norms that are remembered, at least 10.
        theta: Threshold θ of single entries, positive, in units of v; None cuts nothing. 50 there.
        clip_delay: Steps of young moments in which no entry is cut, at least 0.
        reset_interval: Steps between resets, at least 1.
        warmup_steps: Steps in which ``lr`` rises after a reset, at least 0.
        maximize: Ascend instead.
        nonfinite: What a gradient with NaN or infinity does: ``"raise"`` or ``"skip"`` (leave the
            group as it is, and count the parameter in `skipped`).

    Raises:
        ValueError: If an option is out of range, or a group lies on several devices.
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
        maximize: bool = False,
        nonfinite: str = "raise",
    ) -> None:
        arguments: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
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
