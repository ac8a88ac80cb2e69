r"""The tempered update: row and column sums in turn, squashed by tanh, at the gradient's own size.

It resembles SR-Sinkhorn and is another method. Sums of absolute values take the place of lengths,
what they leave goes through a tanh, and the result has the root-mean-square of the gradient: the
step stays proportional to the gradient, as that of SGD does.

Shapes, everywhere in this file:
    m: rows, the out_features of an ``nn.Linear`` weight
    n: columns, its in_features
    ...: leading batch dimensions, one independent matrix each
"""

import math

import torch
from torch import Tensor

TAU, NUM_ITERS, EPS = 0.1, 5, 1e-8


def temper(
    grad: Tensor, tau: float = TAU, num_iters: int = NUM_ITERS, *, eps: float = EPS
) -> Tensor:
    r"""Return the tempered update of a gradient.

    A matrix is taken ``num_iters`` times through

    .. math::
        v_{ij} \leftarrow \frac{v_{ij}}{\max(\sum_j |v_{ij}|, \epsilon)}, \qquad
        v_{ij} \leftarrow \frac{v_{ij}}{\max(\sum_i |v_{ij}|, \epsilon)}, \qquad
        v_{ij} \leftarrow \tanh(v_{ij} / \tau)

    and then scaled to the root-mean-square that it had. A vector becomes
    :math:`\tanh(v / (\tau \max(\sum |v|, \epsilon)))` and a scalar :math:`\tanh(v / \tau)`. Without
    iterations every shape becomes :math:`v / (\overline{|v|} + \epsilon)`.

    Args:
        grad: ``(..., m, n)``, ``(n,)`` or ``()``, any floating dtype. Not modified.
        tau: Temperature τ, positive: entries well below it keep their proportions, entries above
            become alike.
        num_iters: Iterations, at least 0. A vector or a scalar takes one, whatever they are.
        eps: Floor on a sum, so that zero rows and columns stay zero; at least 0.

    Returns:
        The update, of ``grad``'s shape and dtype; computed in float32, or in float64 for float64.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> temper(torch.tensor([[8.0, 1.0], [-1.0, 2.0]]))  # so few entries: all beyond tau
        tensor([[ 4.1833,  4.1833],
                [-4.1833,  4.1833]])
        >>> temper(torch.tensor([[8.0, 1.0], [-1.0, 2.0]]), tau=10.0, num_iters=1)
        tensor([[ 5.2221,  1.0275],
                [-1.9613,  6.1504]])
    """
    check_tempering(tau, num_iters, eps)
    v = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if num_iters == 0:
        update = v / (_mean(v.abs()) + eps)
    elif v.ndim >= 2:
        update = _temper_matrices(v, tau, num_iters, eps)
    elif v.ndim == 1:
        update = torch.tanh(v / v.abs().sum().clamp(min=eps) / tau)
    else:
        update = torch.tanh(v / tau)
    return update.to(grad.dtype)


def check_tempering(tau: float, num_iters: int, eps: float) -> None:
    """Refuse options out of range.

    Raises:
        ValueError: With the option and its value.
    """
    if not 0 < tau < math.inf:
        raise ValueError(f"tau must be positive and finite, got {tau}")
    if num_iters < 0:
        raise ValueError(f"n_iter must be at least 0, got {num_iters}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, got {eps}")


def _temper_matrices(grad: Tensor, tau: float, num_iters: int, eps: float) -> Tensor:
    v = grad
    for _ in range(num_iters):
        v = v / v.abs().sum(-1, keepdim=True).clamp_(min=eps)
        v /= v.abs().sum(-2, keepdim=True).clamp_(min=eps)
        v = (v / tau).tanh_()
    # A tanh is at most 1, so its squares are in range; those of the gradient may not be.
    size = _mean(v.square()).sqrt()
    peak = grad.abs().amax((-2, -1), keepdim=True)
    own = peak * _mean((grad / torch.where(peak == 0, 1, peak)).square()).sqrt()
    return v.mul_(own / torch.where(size == 0, 1, size))


def _mean(x: Tensor) -> Tensor:
    """Return the mean of each matrix, or of a vector."""
    return x.mean((-2, -1), keepdim=True) if x.ndim >= 2 else x.mean()
