"""Optimizers that update one matrix at a time: APOLLO and RACS, with Fira's norm-growth limiter.

Letters:
    m, n: rows and columns of a matrix. APOLLO transposes tall and square matrices, so that m is
        the shorter side, and then calls each column a channel
    r: rank of APOLLO's projection
    q, s: RACS's scales of rows and of columns

References:
    Chen et al., Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?
    https://arxiv.org/abs/2410.01623
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sinkgd.lab.train.recipes.recipe import check_matrices

LARGEST_GROWTH = 1.01  # largest factor by which an update's norm may grow per step


def growth_excess(norm: Tensor, before: Tensor) -> Tensor:
    """Return the factor, at least 1, by which to divide an update to limit its norm's growth.

    Args:
        norm: Norm of the update.
        before: Norm of the previous update, after division; if it is zero, any norm is allowed.

    Examples:
        >>> growth_excess(torch.tensor(3.0), torch.tensor(1.0)) * LARGEST_GROWTH
        tensor(3.)
    """
    return torch.where(before > 0, norm / before / LARGEST_GROWTH, 1.0).clamp_min(1.0)


class PerMatrixOptimizer(Optimizer):
    """Updates every matrix that has a gradient.

    Args:
        params: Matrices: tensors, (name, tensor) pairs, or groups of them.
        defaults: Options of the groups that do not set their own.
        method: Beginning of error messages, e.g. "APOLLO projects matrices".

    Raises:
        ValueError: If a parameter is not a matrix; the message names it.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], method: str) -> None:
        super().__init__(params, defaults)
        check_matrices(self.param_groups, method)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every matrix that has a gradient; return the result of ``closure``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for param in group["params"]:
                number += 1
                if param.grad is not None:
                    self._descend(param, param.grad, group, number)
        return loss

    @abstractmethod
    def _descend(self, param: Tensor, grad: Tensor, group: Mapping[str, Any], number: int) -> None:
        """Update one matrix; ``number`` counts all parameters from 1."""


_PRIME = 1_000_003  # two matrices get different seeds for this many draws of P


class Apollo(PerMatrixOptimizer):
    r"""Descend along the gradient, with each channel scaled as Adam scales its projection.

    .. math::
        R = P G, \quad \tilde R = \text{Adam}(R), \quad
        s_j = \frac{\lVert \tilde R_{:,j} \rVert}{\lVert R_{:,j} \rVert}, \quad
        W \leftarrow W - \eta \sqrt{\alpha}\, G\, \text{diag}(s)

    P is an r×m matrix of independent entries from N(0, 1/r); it changes every
    ``projection_every_steps`` steps. The norm of the update grows by at most a factor of 1.01 per
    step (Fira's limiter). The state is both moments of R, a step count and a norm. P is not stored:
    every step draws it again from its seed.

    Args:
        params: Matrices: tensors, (name, tensor) pairs, or groups of them.
        lr: Learning rate η, at least 0.
        rank: r, at least 1.
        per_channel: Whether each channel has a scale (APOLLO); otherwise each matrix has one
            (APOLLO-Mini).
        scale: α, positive; its square root is a factor of the update.
        projection_every_steps: Steps between two draws of P, at least 1.
        betas: Adam's decay rates.
        eps: Adam's ε, which is added to the denominator.
        weight_decay: Decoupled weight decay, multiplied by ``lr``.
        seed: Seed of the projections.

    Raises:
        ValueError: If a parameter is not a matrix; the message names it.

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

    FLOOR = 1e-8  # added to norms in a denominator, as in the authors' code

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
        excess = growth_excess(norm, state["norm"])
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


class Racs(PerMatrixOptimizer):
    r"""Descend along the gradient divided by the roots of running scales of its rows and columns.

    .. math::
        s \leftarrow \frac{(G \circ G)^\top q}{\lVert q \rVert^2}, \quad
        q \leftarrow \frac{(G \circ G)\, s}{\lVert s \rVert^2}

    These two steps are repeated ``iterations`` times, beginning with q = 1. The product q sᵀ
    converges to the best rank-one approximation of G∘G. Running means of s and q give

    .. math::
        W \leftarrow W - \eta\, \gamma_t\,
        \text{diag}(\bar q)^{-1/2}\, G\, \text{diag}(\bar s)^{-1/2}

    where γₜ ≤ 1 lets the norm of the update grow by at most a factor of 1.01 per step. The means
    start at zero, without a bias correction. The state has m + n + 1 numbers.

    Args:
        params: Matrices: tensors, (name, tensor) pairs, or groups of them.
        lr: Learning rate η, at least 0; it is the paper's product α·η.
        beta: Decay of the running means.
        iterations: Number of fixed-point iterations, at least 1.
        eps: Floor of the scales, relative to the largest.
        weight_decay: Decoupled weight decay, multiplied by ``lr``.

    Raises:
        ValueError: If a parameter is not a matrix; the message names it.

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
        excess = growth_excess(norm, before)
        state["norm"].copy_(norm / excess)
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_((update / excess).to(param.dtype), alpha=-group["lr"])


def rank_one(squares: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Return q, ``(m,)``, and s, ``(n,)``, whose product q sᵀ approximates ``squares``, ``(m, n)``.

    The product converges to the best approximation of rank one. For a matrix of zeros both q and s
    are zero.
    """
    tiny = torch.finfo(squares.dtype).tiny
    largest = squares.max().clamp_min(tiny)
    squares = squares / largest  # so that the squares of q and s do not underflow
    q = squares.new_ones(squares.shape[0])
    s = squares.new_zeros(squares.shape[1])
    for _ in range(iterations):
        s = squares.T @ q / q.square().sum().clamp_min(tiny)
        q = squares @ s / s.square().sum().clamp_min(tiny)
    return q, s * largest
