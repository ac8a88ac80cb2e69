"""MNGD: multi-normalized gradient descent with norms of your choice."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from sinkgd.norms import Norm, as_norms
from sinkgd.optim.arguments import suggest_names
from sinkgd.optim.grouped import GroupedOptimizer


class MNGD(GroupedOptimizer):
    r"""Descend along the gradient normalized by several norms in turn.

    .. math::
        W \leftarrow (1 - \eta\lambda)\, W - \eta\, \text{MultiNorm}(G; g_1 \dots g_K, L)

    With the norms of this package, the update has root-mean-square 1 (or less if rows, columns or
    entries of the gradient are zero), so ``lr`` is the root-mean-square change of a weight in one
    step. Without momentum, no state is kept for matrices.

    Matrices may be sharded on a mesh of devices if all norms are row, column, Frobenius or sign
    norms. In each iteration, a process group then gets at most one message for each norm, or two
    for a Frobenius norm if the group shards rows of some matrices and columns of others. One more
    message per process group tells which gradients are not finite. Other norms need whole matrices.

    Args:
        params: Groups of ``param_groups(model, matrix_algorithm="mngd")``, or matrices: tensors or
            (name, tensor) pairs. Vectors are refused.
        lr: Learning rate η of the groups that do not set their own, at least 0; a float or a tensor
            of one element. Default: 1e-3.
        norms: The norms g₁ … g_K, in the order of their projections; at least one for the groups
            that do not set their own.
        num_iters: Iterations L, at least 1.
        weight_decay: Decoupled weight decay λ, at least 0, multiplied by ``lr``. Default: 0.
        cautious_decay: Decay only entries that the update moves toward zero; see `SinkGD`.
        maximize: Ascend instead.
        nonfinite: What a gradient with NaN or infinity does: ``"raise"`` or ``"skip"`` (leave the
            parameter unchanged, and count it in `skipped`).
        rounding: How bfloat16 parameters, and the bfloat16 moments of AdamW's groups, are rounded:
            ``"nearest"``, or ``"stochastic"`` (up or down at random, so that small updates count
            on average).
        seed: Seed of the stochastic rounding; equal seeds draw equal bits.
        momentum: Decay rate μ of an exponential average B of the gradients, in [0, 1). B is
            normalized instead of the gradient. Keeps one float32 per entry; 0 keeps nothing.
        nesterov: Normalize μB + (1 − μ)G instead of B. Needs ``momentum``.
        momentum_place: ``"before"``: B averages the gradients, as described for ``momentum``; or
            ``"after"``: B averages the normalized updates X, and the step goes along B (with
            ``nesterov``, along μB + (1 − μ)X). The root-mean-square change of a weight is then
            below ``lr``. Needs ``momentum``.

    Raises:
        ValueError: If an option is out of range or has no effect, or a parameter is not a matrix;
            the message names the option or the parameter.
        TypeError: If ``params`` is a model, an option has the wrong type, a parameter is not real
            and floating, a norm has no ``project``, or the norms need whole matrices and a
            parameter is sharded.

    Examples:
        >>> import torch
        >>> from sinkgd import MNGD, ColumnNorm, RowNorm
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = MNGD([weight], lr=0.1, norms=[RowNorm(), ColumnNorm()])
        >>> (weight * torch.tensor([[8.0, 1.0], [-1.0, 2.0]])).sum().backward()
        >>> optimizer.step()
        >>> weight.data.square().mean().sqrt()  # the root-mean-square of the step is lr
        tensor(0.1000)

    References:
        Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training,
        Algorithm 2. https://arxiv.org/abs/2502.06742
    """

    default_algorithm = "mngd"
    usual_call = "MNGD(param_groups(model, matrix_algorithm='mngd'), norms=[...])"

    @suggest_names()
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        norms: Sequence[Norm] = (),
        num_iters: int = 5,
        *,
        weight_decay: float | None = None,
        cautious_decay: bool = False,
        maximize: bool = False,
        nonfinite: str = "raise",
        rounding: str = "nearest",
        seed: int = 0,
        momentum: float = 0.0,
        nesterov: bool = False,
        momentum_place: str = "before",
    ) -> None:
        arguments: dict[str, Any] = {
            "lr": lr,
            "norms": as_norms(norms),
            "num_iters": num_iters,
            "weight_decay": weight_decay,
            "cautious_decay": cautious_decay,
            "maximize": maximize,
            "nonfinite": nonfinite,
            "rounding": rounding,
            "seed": seed,
            "momentum": momentum,
            "nesterov": nesterov,
            "momentum_place": momentum_place,
        }
        super().__init__(params, arguments)
