r"""Lower a matrix's leading singular values to the others', for a few readings of the matrix.

No singular value is computed. Two rounds of a block power iteration, from a fixed block Ω, find an
orthonormal basis Q of k leading directions. In it the leading part of the matrix is B = Qᵀ X, whose
rows are nearly orthogonal and nearly as long as singular values:

.. math::
    Q = \mathrm{orth}(X \Omega), \quad Q \leftarrow \mathrm{orth}(X X^\top Q), \qquad
    B = Q^\top X, \qquad X \leftarrow X - Q\, \mathrm{diag}(1 - \ell / b)\, B

brings those of a length b above ℓ to ℓ, the root-mean-square of the other singular values,

.. math::
    \ell^2 = \frac{\lVert X \rVert_F^2 - \lVert B \rVert_F^2}{\min(m, n) - k}.

Letters, everywhere in this file:
    m, n: rows and columns; ...: leading batch dimensions, one independent matrix each
    k: directions, fewer than either side
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sinkgd.newton_schulz import largest_entry, matrix_buffer, or_one

Sum = Callable[[list[Tensor]], list[Tensor]]  # of float64 numbers, one tensor a matrix

# Nothing is lowered to less than this part of the longest row of B: where a matrix has no more than
# k directions, the others are rounding errors, and must not come to count.
LEAST_LEVEL = 2.0**-10
# Added to the products of k vectors, relative, so that they have a Cholesky factor in any case.
_RIDGE = 2.0**-48
# The golden ratio's fraction is far from all fractions, so that the sines of its multiples by the
# squares 1, 4, 9, … repeat nothing.
_IRRATIONAL = 0.6180339887498949


def deflate(x: Tensor, rank: int) -> Tensor:
    """Lower the ``rank`` leading singular values of ``x`` to the root-mean-square of the others.

    It takes about 10 kmn flops for k = ``rank``; whitening takes 4 min(m, n) mn for each
    Newton–Schulz step.

    Args:
        x: ``(..., m, n)``, float32 or wider. Not modified, and not differentiated.
        rank: Directions k, at least 1. Where a side is no longer, all but one are lowered.

    Returns:
        ``(..., m, n)``. A zero matrix stays zero. Needs two matrices of scratch.

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
    size = or_one(largest_entry(x.detach(), (-2, -1)))
    torch.div(x.detach(), size, out=result)
    deflate_whole_(result, rank)
    return result.mul_(size)


def check_rank(rank: int) -> None:
    """Refuse a ``rank`` that leaves nothing to do."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")


def deflate_whole_(x: Tensor, rank: int) -> None:
    """Lower the leading singular values of each matrix of ``(..., m, n)``, not empty, in place.

    Its entries are to be of a size whose square is in range.
    """
    m, n = x.shape[-2:]
    k = min(rank, m - 1, n - 1)
    if k > 0:
        deflate_([x], [fixed_block((n, k), x.device)], [(m, n)], _as_they_are, _as_they_are)


def deflate_(
    xs: Sequence[Tensor],
    blocks: Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    over_rows: Sum,
    over_columns: Sum,
) -> list[Tensor]:
    """Lower the leading singular values of matrices that may lie in pieces, in place.

    Args:
        xs: Matrices, or this rank's pieces of them, in float32 or float64; each as `matrix_buffer`
            makes them.
        blocks: Ω of each, ``(..., n, k)`` float64: its rows for the columns that this rank has.
        shapes: m and n of the whole matrices; k is less than both.
        over_rows: Adds up what ranks found along their pieces of columns.
        over_columns: Adds up what they found along their pieces of rows.

    Returns:
        The square of the Frobenius norm of each that is left, ``(..., 1, 1)`` float64.
    """
    norms = [torch.linalg.vector_norm(x, dim=-1, keepdim=True).double() for x in xs]
    squares = [norm.square().sum(-2, keepdim=True) for norm in norms]
    wholes = over_columns(over_rows(squares))
    basis = _orthonormal(over_columns(_products(xs, blocks)), over_rows)
    ahead = over_rows(_products([x.mT for x in xs], basis))
    basis = _orthonormal(over_columns(_products(xs, ahead)), over_rows)
    rows = over_rows(_products([x.mT for x in xs], basis))  # of B, as columns: (..., n, k)
    lengths = over_columns([b.square().sum(-2, keepdim=True) for b in rows])  # b², (..., 1, k)
    left = []
    for x, q, b, length, whole, (m, n) in zip(
        xs, basis, rows, lengths, wholes, shapes, strict=True
    ):
        rest = (whole - length.sum(-1, keepdim=True)).clamp_(min=0) / (min(m, n) - q.shape[-1])
        level = torch.maximum(rest, LEAST_LEVEL**2 * length.amax(-1, keepdim=True))
        gone = (1 - (level / or_one(length)).sqrt_()).clamp_(min=0)  # 1 - ℓ / b
        _take_away_(x, (q * gone).to(x.dtype), b.to(x.dtype))
        left.append(whole - (length * (1 - (1 - gone).square())).sum(-1, keepdim=True))
    return left


def fixed_block(shape: Sequence[int], device: torch.device) -> Tensor:
    """Return entries of all signs without a pattern, the same at every step, in float64."""
    places = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64, device=device)
    return places.square_().mul_(_IRRATIONAL).sin_().view(*shape)


def _products(xs: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """Multiply each matrix with k vectors, in its own dtype; return float64."""
    return [(x @ own.to(x.dtype)).double() for x, own in zip(xs, vectors, strict=True)]


def _orthonormal(vectors: Sequence[Tensor], over_rows: Sum) -> list[Tensor]:
    """Return orthonormal vectors that span the same, by Cholesky's decomposition of products.

    Where there are fewer directions than vectors, some come out shorter than 1.
    """
    grams = over_rows([y.mT @ y for y in vectors])
    found = []
    for y, gram in zip(vectors, grams, strict=True):
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        # The trace; inductor warns of a view of the diagonal.
        size = or_one((gram * eye).sum((-2, -1), keepdim=True))
        factor = torch.linalg.cholesky_ex(gram / size + _RIDGE * eye).L
        unit = y / size.sqrt()
        found.append(torch.linalg.solve_triangular(factor.mT, unit, upper=True, left=False))
    return found


def _take_away_(x: Tensor, left: Tensor, right: Tensor) -> None:
    """Subtract the matrices ``left @ right.mT``, without making them."""
    own, left, right = (y.unsqueeze(0).flatten(0, -3) for y in (x, left, right))
    own.baddbmm_(left, right.mT, alpha=-1)


def _as_they_are(numbers: list[Tensor]) -> list[Tensor]:
    return numbers
