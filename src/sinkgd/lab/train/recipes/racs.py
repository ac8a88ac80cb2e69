"""RACS: row and column scaled SGD.

Letters, everywhere in this file:
    m, n: rows and columns of a matrix
    q, s: scales of its rows and of its columns
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sinkgd.lab.train.recipes.one_by_one import OneByOne, excess_of


class Racs(OneByOne):
    r"""Descend along the gradient divided by running scales of its rows and columns.

    .. math::
        s \leftarrow \frac{(G \circ G)^\top q}{\lVert q \rVert^2}, \quad
        q \leftarrow \frac{(G \circ G)\, s}{\lVert s \rVert^2}

    from q = 1, five times: the best rank-one q sᵀ for G∘G. Running means of s and q give

    .. math::
        W \leftarrow W - \eta\, \gamma_t\,
        \text{diag}(\bar q)^{-1/2}\, G\, \text{diag}(\bar s)^{-1/2}

    where γₜ ≤ 1 lets the norm of the update grow by a factor of 1.01 a step at most. The means
    start at zero and are not corrected for it. State: m + n + 1 numbers.

    Args:
        params: Matrices: tensors, (name, tensor) pairs, or groups of them.
        lr: Learning rate η, the paper's α·η, at least 0.
        beta: Decay of the running means.
        iterations: Of the fixed point, at least 1.
        eps: Floor of the scales, relative to the largest.
        weight_decay: Decoupled weight decay, multiplied by ``lr``.

    Raises:
        ValueError: If a parameter is no matrix; the message names it.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> optimizer = Racs([weight], lr=0.1, beta=0.0)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # a gradient of rank one becomes its signs
        >>> weight.data
        tensor([[0.9000, 0.9000, 0.9000],
                [0.9000, 0.9000, 0.9000]])

    References:
        Gong et al., Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation
        with a Low-Rank Extension. https://arxiv.org/abs/2502.07752
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        beta: float = 0.9,
        iterations: int = 5,
        eps: float = 1e-16,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "iterations": iterations,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, "RACS scales rows and columns")

    def _descend(self, param: Tensor, grad: Tensor, group: Mapping[str, Any], _: int) -> None:
        state = self.state[param]
        if not state:
            state["row_scale"] = grad.new_zeros(grad.shape[0])
            state["col_scale"] = grad.new_zeros(grad.shape[1])
            state["norm"] = grad.new_zeros(())
        q, s = rank_one(grad.float().square(), group["iterations"])
        state["row_scale"].lerp_(q.to(grad.dtype), 1 - group["beta"])
        state["col_scale"].lerp_(s.to(grad.dtype), 1 - group["beta"])
        rows, columns = (
            scale.clamp_min(group["eps"] * scale.max()).clamp_min(torch.finfo(scale.dtype).tiny)
            for scale in (state["row_scale"].float(), state["col_scale"].float())
        )
        update = grad.float() * rows.rsqrt()[:, None] * columns.rsqrt()
        norm, before = torch.linalg.vector_norm(update), state["norm"].float()
        excess = excess_of(norm, before)
        state["norm"].copy_(norm / excess)
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_((update / excess).to(param.dtype), alpha=-group["lr"])


def rank_one(squares: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Return q and s, ``(m,)`` and ``(n,)``, of the best rank-one q sᵀ for ``squares``, ``(m, n)``.

    A matrix of zeros has zeros.
    """
    tiny = torch.finfo(squares.dtype).tiny
    largest = squares.max().clamp_min(tiny)
    squares = squares / largest  # so that no square of a square vanishes
    q = squares.new_ones(squares.shape[0])
    s = squares.new_zeros(squares.shape[1])
    for _ in range(iterations):
        s = squares.T @ q / q.square().sum().clamp_min(tiny)
        q = squares @ s / s.square().sum().clamp_min(tiny)
    return q, s * largest
