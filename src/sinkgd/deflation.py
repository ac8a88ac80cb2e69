"""Lower a matrix's leading singular values to the others', for a few readings of the matrix.

No singular value is computed. A block power iteration finds an orthonormal basis Q of the leading
directions. In it the leading part of the matrix is Qᵀ X, whose rows are nearly orthogonal and
nearly as long as singular values, so that rows of one length mean singular values of one size.

Letters, everywhere in this file:
    m, n: rows and columns; ...: leading batch dimensions, one independent matrix each
    s, l: the shorter and the longer side; X: the matrix, seen as s × l
    k: directions, below s; Q: their basis, s × k
    B: Qᵀ X, k × l; b: lengths of its rows; c: the length that they get; their squares are
       ``squares`` and ``level``
"""

import torch
from torch import Tensor

from sinkgd.newton_schulz import largest_entry, matrix_buffer, or_one, sum_of_matrix

# Rows of B get no less than this part of the longest: where a matrix has no more than k directions,
# the others are rounding errors, and must not come to count.
LEAST_LEVEL = 2.0**-10
# The golden ratio's fraction is far from all fractions, so that the sines of its multiples by the
# squares 1, 4, 9, … repeat nothing.
_IRRATIONAL = 0.6180339887498949


def deflate(x: Tensor, rank: int) -> Tensor:
    r"""Lower the ``rank`` leading singular values of ``x`` to the root-mean-square of the others.

    .. math::
        Q \leftarrow \mathrm{qr}(X \Omega), \quad Q \leftarrow \mathrm{qr}(X X^\top Q), \quad
        B = Q^\top X, \qquad X \leftarrow X - Q\, \mathrm{diag}(1 - c / b)\, B,
        \qquad c^2 = \frac{\lVert X \rVert_F^2 - \lVert B \rVert_F^2}{s - k}

    with :math:`b_i` the length of a row of B, and :math:`\Omega` a fixed block that no gradient
    knows of. What is below c already stays. With k = ``rank`` it takes about 10 kmn flops, in five
    readings of X; whitening takes 4 min(m, n) mn for each Newton–Schulz step.

    Args:
        x: ``(..., m, n)``, float32 or wider. Not modified, and not differentiated.
        rank: Directions k, at least 1. Where a side is no longer, all but one are lowered.

    Returns:
        ``(..., m, n)``. A zero matrix stays zero. Needs one matrix of scratch.

    Raises:
        ValueError: If ``rank`` is below 1.

    Example:
        >>> x = deflate(torch.diag(torch.tensor([300.0, 20.0, 1.0, 1.0, 1.0])), rank=2)
        >>> torch.linalg.svdvals(x).round(decimals=1)
        tensor([1., 1., 1., 1., 1.])
    """
    check_rank(rank)
    if x.numel() == 0:
        return x.clone()
    result = matrix_buffer(x)
    size = deflate_into(x.detach(), rank, result, matrix_buffer(x))
    return result.mul_(size)


def check_rank(rank: int) -> None:
    """Refuse a ``rank`` that leaves nothing to do."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")


def deflate_into(x: Tensor, rank: int, result: Tensor, spare: Tensor) -> Tensor:
    """Write what `deflate` returns, divided by the largest entry of ``x``, to ``result``.

    Args:
        x: ``(..., m, n)``, not empty. It may be ``result``; otherwise it is only read.
        rank: Directions, at least 1.
        result: A `matrix_buffer` of ``x``.
        spare: Another one, in the same order of memory, which is used up.

    Returns:
        The divisor, ``(..., 1, 1)``; 1 for a zero matrix.
    """
    size = or_one(largest_entry(x, (-2, -1)))
    torch.div(x, size, out=result)
    tall = result.shape[-2] > result.shape[-1]
    X, room = (result.mT, spare.mT) if tall else (result, spare)
    s = X.shape[-2]
    if (k := min(rank, s - 1)) > 0:
        Q = _leading_directions(X, k)
        B = Q.mT @ X
        squares = B.square().sum(-1, keepdim=True)
        whole = sum_of_matrix(torch.mul(X, X, out=room))
        level = (whole - squares.sum(-2, keepdim=True)).clamp_(min=0) / (s - k)
        level = torch.maximum(level, LEAST_LEVEL**2 * squares.amax(-2, keepdim=True))
        B *= (1 - (level / or_one(squares)).sqrt_()).clamp_(min=0)
        X -= torch.matmul(Q, B, out=room)
    return size


def _leading_directions(X: Tensor, k: int) -> Tensor:
    """Return an orthonormal basis ``(..., s, k)`` of nearly the leading left singular vectors."""
    Q = torch.linalg.qr(X @ _block(X, k)).Q
    better: Tensor = torch.linalg.qr(X @ (X.mT @ Q)).Q
    return better


def _block(X: Tensor, k: int) -> Tensor:
    """Return Ω, ``(l, k)``: entries of all signs without a pattern, the same at every step."""
    count = X.shape[-1] * k
    places = torch.arange(1, count + 1, dtype=torch.float64, device=X.device)
    return places.square_().mul_(_IRRATIONAL).sin_().to(X.dtype).view(-1, k)
