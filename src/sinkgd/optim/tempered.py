"""TemperedSinkGD: descend along row- and column-normalized, squashed gradients, with no state."""

from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from sinkgd.optim.grouped import GroupedOptimizer
from sinkgd.optim.unknown_names import suggest_names
from sinkgd.tempered import EPS, NUM_ITERS, TAU


class TemperedSinkGD(GroupedOptimizer):
    r"""Descend along the tempered gradient: sums in turn, a tanh, and the gradient's own size.

    .. math::
        W \leftarrow (1 - \eta\lambda)\, W - \eta\, T_\tau(G)

    with T of `sinkgd.temper`. It is not the paper's method: sums of absolute values take the place
    of lengths, and the step stays proportional to the gradient, so that clipping and the scale of
    the loss matter as they do to SGD. ``state`` stays empty; two matrices of scratch are needed
    for the largest matrix. Of parameters in pieces ranks tell each other sums, two vectors an
    iteration and two numbers for each matrix, all in one message; each needs a float32 copy of all
    its pieces then.

    Args:
        params: Tensors or (name, tensor) pairs, or groups of them; of any shape. Matrices are taken
            as such, vectors and scalars as `sinkgd.temper` says; whole or sharded.
        lr: Learning rate η of the groups that do not set their own, at least 0; a float or a tensor
            of one element. Default: 3e-4.
        weight_decay: Decoupled weight decay λ, at least 0, multiplied by ``lr``. Default: 0.1.
        tau: Temperature τ, positive.
        n_iter: Iterations, at least 0; 0 divides by the mean size of the entries.
        eps: Floor on a sum of absolute values, at least 0.
        maximize: Ascend instead.
        nonfinite: What a gradient with NaN or infinity does: ``"raise"`` or ``"skip"`` (leave the
            parameter as it is, and count it in `skipped`).
        rounding: Of bfloat16 parameters: ``"nearest"``, or ``"stochastic"``.
        seed: Of the stochastic rounding; equal seeds draw equal bits.

    Raises:
        ValueError: If an option is out of range; the message names it.
        TypeError: If a parameter is not real and floating.

    Examples:
        >>> import torch
        >>> from sinkgd import TemperedSinkGD
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = TemperedSinkGD([weight], lr=0.1, weight_decay=0.0)
        >>> (weight * torch.tensor([[3.0, 4.0], [0.0, 2.0]])).sum().backward()
        >>> optimizer.step()
        >>> round(weight.data.square().mean().sqrt().item() / 0.1, 4)  # the gradient's: √(29/4)
        2.6926
    """

    default_algorithm = "tempered"
    none_means = MappingProxyType({"lr": 3e-4, "weight_decay": 0.1})

    @suggest_names({})
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        weight_decay: float | None = None,
        tau: float = TAU,
        n_iter: int = NUM_ITERS,
        eps: float = EPS,
        *,
        maximize: bool = False,
        nonfinite: str = "raise",
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        arguments: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "tau": tau,
            "n_iter": n_iter,
            "eps": eps,
            "maximize": maximize,
            "nonfinite": nonfinite,
            "rounding": rounding,
            "seed": seed,
        }
        super().__init__(params, arguments)
