"""SPAM: Adam that cuts spikes of the gradient and begins its moments anew."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from sinkgd.optim.grouped import GroupedOptimizer
from sinkgd.optim.unknown_names import suggest_names


class SPAM(GroupedOptimizer):
    r"""Adam, in which no entry of a gradient counts for more than a spike, nor for long.

    Entry by entry, with v as it was before the step,

    .. math::
        g \leftarrow \operatorname{sign}(g) \sqrt{\theta v} \quad \text{where } g^2 > \theta v,

    and then a step of torch's AdamW. When the moments m and v are ``reset_interval`` steps old they
    begin anew from zero, and ``lr`` rises along a half cosine for ``warmup_steps`` steps.

    Where the paper leaves it open: bias corrections count from the reset, as the moments do. The
    warm-up is of ``lr``, and with it of the weight decay. For ``clip_delay`` steps after a start or
    a reset nothing is cut, as in the authors' code, nor where v is zero, as that entry would stay
    where it is. Steps are counted for each parameter, those that were left out not among them.
    Two numbers of state an entry.

    Args:
        params: Tensors or (name, tensor) pairs, or groups of them; of any shape, whole or sharded.
        lr: Learning rate η of the groups that do not set their own, at least 0; a float or a tensor
            of one element. Default: 1e-3.
        betas: Decay of the first and the second moment a step, in [0, 1).
        eps: Added to the root of the second moment, at least 0.
        weight_decay: Decoupled weight decay λ, at least 0, multiplied by ``lr``. Default: 0.
        theta: Threshold θ, positive, in units of v; None cuts nothing.
        clip_delay: Steps of young moments in which nothing is cut, at least 0.
        reset_interval: Steps between resets, at least 1.
        warmup_steps: Steps in which ``lr`` rises after a reset, at least 0.
        maximize: Ascend instead.
        nonfinite: What a gradient with NaN or infinity does: ``"raise"`` or ``"skip"`` (leave the
            parameter and its moments as they are, and count it in `skipped`).

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
        >>> optimizer.step()  # from zero: this is the first step of new moments
        >>> optimizer.state[weight]["step"].item()
        1.0

    References:
        Huang et al., SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training.
        https://arxiv.org/abs/2501.06842
    """

    default_algorithm = "spam"

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
        maximize: bool = False,
        nonfinite: str = "raise",
    ) -> None:
        arguments: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "theta": theta,
            "clip_delay": clip_delay,
            "reset_interval": reset_interval,
            "warmup_steps": warmup_steps,
            "maximize": maximize,
            "nonfinite": nonfinite,
        }
        super().__init__(params, arguments)
