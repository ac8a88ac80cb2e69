"""APOLLO: gradients scaled as Adam would scale their random projections.

Letters, everywhere in this file:
    m, n: rows and columns of a matrix, the shorter side first; a tall one is looked at transposed
    r: rank of the projection
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sinkgd.lab.train.recipes.one_by_one import OneByOne, excess_of

_PRIME = 1_000_003  # keeps the seeds of matrices apart for as many projections


class Apollo(OneByOne):
    r"""Descend along the gradient, each channel scaled as Adam scales its projection.

    .. math::
        R = P G, \quad \tilde R = \text{Adam}(R), \quad
        s_j = \frac{\lVert \tilde R_{:,j} \rVert}{\lVert R_{:,j} \rVert}, \quad
        W \leftarrow W - \eta \sqrt{\alpha}\, G\, \text{diag}(s)

    P is an r×m matrix of independent N(0, 1/r), drawn anew every so many steps. The norm of the
    update grows by a factor of 1.01 a step at most (Fira's limiter). State: both moments of R, and
    a norm; P is drawn again from its seed at every step.

    Args:
        params: Matrices: tensors, (name, tensor) pairs, or groups of them.
        lr: Learning rate η, at least 0.
        rank: r, at least 1.
        per_channel: Whether each channel has a scale (APOLLO); otherwise each matrix has one
            (APOLLO-Mini).
        scale: α, positive; it enters as its square root.
        projection_every_steps: Steps between two draws of P, at least 1.
        betas: Adam's decay rates.
        eps: Adam's floor.
        weight_decay: Decoupled weight decay, multiplied by ``lr``.
        seed: Of the projections.

    Raises:
        ValueError: If a parameter is no matrix; the message names it.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(2, 8))
        >>> optimizer = Apollo([weight], lr=0.1, rank=1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> {name: tuple(x.shape) for name, x in optimizer.state[weight].items()}
        {'step': (), 'exp_avg': (1, 8), 'exp_avg_sq': (1, 8), 'norm': ()}

    References:
        Zhu et al., APOLLO: SGD-like Memory, AdamW-level Performance, algorithm 1.
        https://arxiv.org/abs/2412.05270
    """

    FLOOR = 1e-8  # of norms that are divided by, as in the authors' code

    def __init__(  # noqa: PLR0913  keyword-only, as in torch.optim
        self,
        params: Any,
        lr: float,
        *,
        rank: int,
        per_channel: bool = True,
        scale: float = 1.0,
        projection_every_steps: int = 200,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "rank": rank,
            "per_channel": per_channel,
            "scale": scale,
            "projection_every_steps": projection_every_steps,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "seed": seed,
        }
        super().__init__(params, defaults, "APOLLO projects matrices")

    def _descend(self, param: Tensor, grad: Tensor, group: Mapping[str, Any], number: int) -> None:
        state = self.state[param]
        tall = grad.shape[0] >= grad.shape[1]
        if tall:
            grad = grad.T
        if not state:
            shape = (group["rank"], grad.shape[1])
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["exp_avg"], state["exp_avg_sq"] = grad.new_zeros(shape), grad.new_zeros(shape)
            state["norm"] = grad.new_zeros(())
        period = int(state["step"]) // group["projection_every_steps"]
        low = _projection(grad, group["rank"], group["seed"] + _PRIME * number + period) @ grad
        state["step"] += 1
        adam = _adam(low, state, group)
        dim = 0 if group["per_channel"] else None
        lengths = torch.linalg.vector_norm(low, dim=dim)
        update = grad * (torch.linalg.vector_norm(adam, dim=dim) / (lengths + self.FLOOR))
        update *= math.sqrt(group["scale"])
        norm = torch.linalg.vector_norm(update)
        excess = excess_of(norm, state["norm"])
        state["norm"].copy_(norm / excess)
        update /= excess
        param.add_(update.T if tall else update, alpha=-_step_size(state, group))
        param.mul_(1 - group["lr"] * group["weight_decay"])


def _projection(grad: Tensor, rank: int, seed: int) -> Tensor:
    device = grad.device
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    size = (rank, grad.shape[0])
    drawn = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
    projection: Tensor = drawn.div_(math.sqrt(rank)).to(grad.dtype)
    return projection


def _adam(low: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> Tensor:
    beta1, beta2 = group["betas"]
    state["exp_avg"].lerp_(low, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(low, low, value=1 - beta2)
    floor: float = group["eps"]
    return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + floor)


def _step_size(state: Mapping[str, Tensor], group: Mapping[str, Any]) -> float:
    beta1, beta2 = group["betas"]
    steps = int(state["step"])
    return float(group["lr"] * math.sqrt(1 - beta2**steps) / (1 - beta1**steps))
