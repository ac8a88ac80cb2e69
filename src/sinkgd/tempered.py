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
from collections.abc import Generator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sinkgd.number_check import check_number, check_whole_number
from sinkgd.precision import in_full_precision

TAU, NUM_ITERS, EPS = 0.1, 5, 1e-8


@in_full_precision
def temper(
    grad: Tensor, tau: float = TAU, num_iters: int = NUM_ITERS, *, eps: float = EPS
) -> Tensor:
    r"""Return the tempered update of a gradient.

    A matrix is taken ``num_iters`` times through

    .. math::
        v_{ij} \leftarrow \frac{v_{ij}}{\max(\sum_j |v_{ij}|, \epsilon)}, \qquad
        v_{ij} \leftarrow \frac{v_{ij}}{\max(\sum_i |v_{ij}|, \epsilon)}, \qquad
        v_{ij} \leftarrow \tanh(v_{ij} / \tau)

    and then scaled to the root-mean-square that it had; an entry that would leave the range of its
    type by that stops at its end. A vector becomes
    :math:`\tanh(v / (\tau \max(\sum |v|, \epsilon)))` and a scalar :math:`\tanh(v / \tau)`. Without
    iterations every shape becomes :math:`v / (\overline{|v|} + \epsilon)`.

    Args:
        grad: ``(..., m, n)``, ``(n,)`` or ``()``, any floating dtype. Not modified.
        tau: Temperature τ, positive, 0.1 by default: entries well below it keep their proportions,
            entries above become alike.
        num_iters: Iterations, at least 0, 5 by default. A vector or a scalar takes one, whatever
            they are.
        eps: Floor on a sum, so that zero rows and columns stay zero; at least 0, 1e-8 by default.

    Returns:
        The update, of ``grad``'s shape and dtype; computed in float32, or in float64 for float64.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> temper(torch.tensor([[8.0, 1.0], [-1.0, 2.0]]))  # so few entries: all beyond tau
        tensor([[ 4.1833,  4.1833],
                [-4.1833,  4.1833]])
        >>> temper(torch.tensor([[8.0, 1.0], [-1.0, 2.0]]), tau=10.0, num_iters=1)
        tensor([[ 5.2221,  1.0275],
                [-1.9613,  6.1504]])
    """
    check_tempering(tau, num_iters, eps)
    steps = tempering(grad, tau, num_iters, eps=eps)
    try:
        sums = next(steps)
        while True:
            sums = steps.send(sums.numbers)
    except StopIteration as end:
        update: Tensor = end.value
        return update.to(grad.dtype)


class Sums(NamedTuple):
    """Sums over what is at hand of a matrix or vector, which may be a piece of it."""

    numbers: Tensor
    over: Literal["row", "column", "all"]  # what they are the sums of, entry by entry


def tempering(
    grad: Tensor, tau: float, num_iters: int, *, eps: float
) -> Generator[Sums, Tensor, Tensor]:
    """Temper a gradient, or a piece of one: the definition of `temper`, which asks for its sums.

    Yields:
        Sums over the piece, `Sums`; to be sent back as those over the whole.

    Returns:
        The update of the piece, in float32 or float64.
    """
    v = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if num_iters == 0:
        mean = yield from _mean_size(v)
        return v / torch.where(mean == 0, 1, mean + eps).to(v.dtype)
    if v.ndim >= 2:
        return (yield from _temper_matrices(v, tau, num_iters, eps))
    if v.ndim == 1:
        total = yield Sums(v.abs().sum(dtype=torch.float64), "all")
        return torch.tanh(_divided(v, total, eps) / tau)
    return torch.tanh(v / tau)


def check_tempering(tau: float, num_iters: int, eps: float, iterations: str = "num_iters") -> None:
    """Refuse options out of range; ``iterations`` is what the caller calls ``num_iters``.

    Raises:
        TypeError: With the option and its value.
        ValueError: With the option and its value.
    """
    check_number("tau", tau, least=None)
    check_whole_number(iterations, num_iters)
    check_number("eps", eps, least=None)
    if not 0 < tau < math.inf:
        raise ValueError(f"tau must be positive and finite, got {tau}")
    if num_iters < 0:
        raise ValueError(f"{iterations} must be at least 0, got {num_iters}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, got {eps}")


def _temper_matrices(
    grad: Tensor, tau: float, num_iters: int, eps: float
) -> Generator[Sums, Tensor, Tensor]:
    v = grad
    for _ in range(num_iters):
        row_sums = yield Sums(v.abs().sum(-1, keepdim=True, dtype=torch.float64), "row")
        v = _divided(v, row_sums, eps)
        column_sums = yield Sums(v.abs().sum(-2, keepdim=True, dtype=torch.float64), "column")
        v = _divided(v, column_sums, eps)
        v = v.div_(tau).tanh_()
    squares = yield Sums(torch.stack([_squares(grad), _squares(v)]), "all")
    # In float64 entries above 1e154 have squares beyond its range, and a shorter update.
    own, now = squares.clamp(max=torch.finfo(torch.float64).max).unbind()
    factor = (own / torch.where(now == 0, 1, now)).sqrt()
    # The factor may be out of range.
    unit = torch.ones_like(factor).masked_fill_(factor > 1, 2.0**64)
    limit = torch.finfo(v.dtype).max
    return v.mul_((factor / unit).to(v.dtype)).mul_(unit.to(v.dtype)).clamp_(-limit, limit)


def _divided(v: Tensor, sums: Tensor, eps: float) -> Tensor:
    """Return ``v`` divided by sums in float64, which may be beyond the range of its type."""
    sums = torch.where(sums == 0, 1, sums.clamp(min=eps))
    # A power of two: it changes no rounding.
    unit = torch.ones_like(sums).masked_fill_(sums > torch.finfo(v.dtype).max, 2.0**-64)
    return (v * unit.to(v.dtype)).div_((sums * unit).to(v.dtype))


def _squares(x: Tensor) -> Tensor:
    """Return the sum of squares of each matrix, float64 ``(..., 1, 1)``."""
    if x.numel() == 0:
        return x.new_zeros((*x.shape[:-2], 1, 1), dtype=torch.float64)
    # Those of a gradient in float32 may be out of its range.
    peak = x.abs().amax((-2, -1), keepdim=True)
    squares = (x / torch.where(peak == 0, 1, peak)).square().sum((-2, -1), keepdim=True)
    return squares.double() * peak.double().square()


def _mean_size(v: Tensor) -> Generator[Sums, Tensor, Tensor]:
    """Return the mean size of the entries of each matrix, or of a vector."""
    dims = (-2, -1) if v.ndim >= 2 else ()
    sizes = v.abs().sum(dims, keepdim=v.ndim >= 2, dtype=torch.float64)
    count = v.shape[-2:].numel() if v.ndim >= 2 else v.numel()
    sums = yield Sums(torch.stack([sizes, torch.full_like(sizes, count)]), "all")
    return sums[0] / sums[1]
