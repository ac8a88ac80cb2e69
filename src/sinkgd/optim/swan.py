"""SWAN: descend along the row-normalized and whitened gradient, with no state."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from sinkgd.optim.arguments import suggest_names
from sinkgd.optim.grouped import GroupedOptimizer


class SWAN(GroupedOptimizer):
    r"""Descend along the gradient, normalized to rows of equal length and then whitened.

    .. math::
        W \leftarrow (1 - \eta\lambda)\, W - \eta\, (\hat G \hat G^\top)^{-1/2} \hat G \sqrt{n},
        \qquad \hat G = \sqrt{n}\, Q(G)^{-1} G

    for m rows and n ≥ m columns, where Q is the diagonal matrix of row lengths. If m > n, the
    whitening works on the columns, the shorter side:
    :math:`\hat G (\hat G^\top \hat G)^{-1/2} \sqrt{m}`. SWAN is `MNGD` with a `RowNorm` and a
    `SpectralNorm`. The update has root-mean-square 1. Without momentum, no state is kept for
    matrices. A whitening costs at most about
    ``4 * newton_schulz_steps * min(m, n)**2 * max(m, n)`` flops per matrix. Matrices of one shape
    are whitened together.

    Args:
        params: Groups of ``param_groups(model, matrix_algorithm="swan")``, or matrices: tensors or
            (name, tensor) pairs. Vectors are refused.
        lr: Learning rate η of the groups that do not set their own, at least 0; a float or a tensor
            of one element. Default: 1e-3.
        newton_schulz_steps: Steps of the whitening, at least 1.
        num_iters: Number of times that rows are normalized and the result is whitened, at least 1.
            The paper uses 1.
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
        TypeError: If ``params`` is a model, an option has the wrong type, or a parameter is sharded
            or is not real and floating.

    Examples:
        >>> import torch
        >>> from sinkgd import SWAN
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = SWAN([weight], lr=0.1, newton_schulz_steps=20)
        >>> (weight * torch.tensor([[3.0, 4.0], [0.0, 2.0]])).sum().backward()
        >>> optimizer.step()
        >>> weight.data @ weight.data.T  # lr² · n · I: equal singular values
        tensor([[0.0200, 0.0000],
                [0.0000, 0.0200]])

    References:
        Ma et al., SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training.
        https://arxiv.org/abs/2412.13148
    """

    default_algorithm = "swan"
    usual_call = "SWAN(param_groups(model, matrix_algorithm='swan'))"

    @suggest_names()
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        newton_schulz_steps: int = 5,
        *,
        num_iters: int = 1,
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
            "newton_schulz_steps": newton_schulz_steps,
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
