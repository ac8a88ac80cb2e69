r"""Lower a matrix's leading singular values to the next one, in two passes over the matrix.

No singular value is computed. A block power iteration finds k + 1 orthonormal directions. The first
pass computes :math:`X^\top X \Omega` for a fixed block Ω; an orthonormal basis of the result is V.
The second pass computes :math:`Z = X V` and :math:`X^\top Z`. With :math:`Z = Q R`, where Q has
orthonormal columns and R is triangular, :math:`B = X^\top Q` follows from :math:`X^\top Z`, and no
third pass is needed. A pass is a product with X and one with Xᵀ. For both, compiled kernels can
read the matrix once, and plain torch reads it twice:

.. math::
    V = \mathrm{orth}(X^\top X \Omega), \qquad Z = X V, \qquad C = X^\top Z, \qquad
    Z = Q R, \qquad B = C R^{-1}

The columns of B are nearly orthogonal, and their lengths :math:`b_1, …, b_{k+1}` are close to the
leading singular values if these are well apart, and within a factor of 3 if they are not. The
first k directions are lowered to the level ℓ of the next one:

.. math::
    X \leftarrow X - \sum_{i \le k} \max(0, 1 - \ell / b_i)\, q_i b_i^\top, \qquad
    \ell^2 = \max\left(b_{k+1}^2,\;
    \frac{\lVert X \rVert_F^2 - \sum_{i \le k} b_i^2}{\min(m, n) - k},\;
    (2^{-6} \max_i b_i)^2\right)

Each term has a reason:

- :math:`b_{k+1}` keeps the order of the directions: none is lowered below direction k + 1.
- The second term is the mean square of the other singular values, which is never more than the
  square of the largest of them. This term matters if Ω happens to miss the next direction.
- The third term matters if the rank of X is at most k. The other directions then consist of
  rounding errors, which must not be amplified.

Letters, everywhere in this file:
    m, n: rows and columns; ...: leading batch dimensions, one independent matrix each
    k: the number of directions that are lowered, less than m and n
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sinkgd.exchange import Computation, Steps, computation, immediate, run
from sinkgd.newton_schulz import largest_entry, matrix_buffer, or_one
from sinkgd.number_check import check_whole_number
from sinkgd.precision import in_full_precision

# A function that returns a computation for `sinkgd.exchange`. The computation adds up float64
# tensors over ranks, in place or not.
Sum = Callable[[list[Tensor]], Computation[list[Tensor]]]

# No direction is lowered below this fraction of the longest one. Entries of bfloat16 gradients have
# relative rounding errors of up to 2^-9. With this limit, the sum of the squares of these errors
# stays below 1 % of the sum of the squares of the result's entries.
LEAST_LEVEL = 2.0**-6
# Added to the Gram matrix of k vectors, relative to its trace, so that it always has a Cholesky
# factor.
_RIDGE = 2.0**-48
# A direction of Z that is shorter than this fraction of Z's Frobenius norm counts as zero. For
# k < 63, such a direction is below the least level. Its column of B would be a column of C divided
# by the direction's length. This division would multiply the rounding errors of float32 products,
# 2^-24 of the longest column, by 2^9 or more.
_SHORTEST = 2.0**-9
# The fractional part of the golden ratio. No two of its products with 1, 4, 9, … differ by a
# multiple of 2π, so that their sines do not repeat.
_IRRATIONAL = 0.6180339887498949


class LowRank(NamedTuple):
    """A matrix of low rank, ``left @ right.mT``."""

    left: Tensor  # (..., m, k)
    right: Tensor  # (..., n, k)

    @property
    def mT(self) -> "LowRank":  # noqa: N802 - named like `Tensor.mT`
        """The same with rows and columns exchanged."""
        return LowRank(self.right, self.left)


class Leading(NamedTuple):
    """The part of a matrix that deflation subtracts, and the size of what remains."""

    taken: LowRank  # float64
    square: Tensor  # square of the Frobenius norm of what remains, (..., 1, 1) float64
    right: Tensor  # B, (..., n, k + 1) float64; 0 in columns of directions that count as zero
    lengths: Tensor  # b² of each column of B, added up over all ranks, (..., 1, k + 1)


class Packed(NamedTuple):
    """k vectors for each of many matrices, stored in blocks of equal size.

    The blocks of a matrix are consecutive, and are padded with zeros.
    """

    blocks: Tensor  # (blocks, entries, k) float64
    owners: Tensor  # (blocks,) int64: the matrix of each block
    counts: Tensor  # (matrices,) int64: the number of blocks of each matrix

    def times(self, factors: Tensor) -> "Packed":
        """Multiply the vectors of matrix i by ``factors[i]``, of shape ``(k, l)``."""
        return self._replace(blocks=self.blocks @ factors[self.owners])

    def grams(self) -> Tensor:
        """Return the products of each matrix's vectors with each other, ``(matrices, k, k)``."""
        return self._replace(blocks=self.blocks.mT @ self.blocks).sums()

    def sums(self) -> Tensor:
        """Add up the blocks of each matrix, in their order: ``(matrices, entries, k)``."""
        return torch.segment_reduce(self.blocks, "sum", lengths=self.counts, axis=0, unsafe=True)


class PackedProducts(Protocol):
    """Products of matrices with packed vectors; a tensor may contain several of the matrices."""

    shorter_side: Tensor  # of each matrix, (matrices, 1, 1) float64
    entries: Tensor  # the number of entries of each matrix, (matrices, 1, 1) float64

    def of_both(self, vectors: Tensor | None = None) -> tuple[Packed, Packed]:
        """Return X V and Xᵀ X V of each matrix.

        Args:
            vectors: V, the blocks of all matrices; None for the fixed block Ω, which all
                matrices share.
        """
        ...

    def squares(self) -> Tensor:
        """Return the square of each Frobenius norm, ``(matrices, 1, 1)`` float64."""
        ...

    def by_tensor(self, vectors: Tensor, *, of_rows: bool) -> list[Tensor]:
        """Group vectors by tensor: ``(..., m, k)`` each if ``of_rows``, else ``(..., n, k)``."""
        ...

    def numbers_by_tensor(self, numbers: Tensor) -> list[Tensor]:
        """Group one number per matrix by tensor: ``(...)`` for a tensor ``(..., m, n)``."""
        ...

    def all_by_tensor(self, flags: Tensor) -> list[Tensor]:
        """Return a 0-dim bool for each tensor: whether the flags of all its matrices are True."""
        ...


class Products(Protocol):
    """Products of tensors X ``(..., m, n)`` with k vectors each, computed repeatedly.

    Arguments and results are float64, one tensor for each X.
    """

    def of_rows(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return X V of each V ``(..., n, k)``."""
        ...

    def of_cols(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return Xᵀ Y of each Y ``(..., m, k)``."""
        ...

    def of_both(self, blocks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return X V and Xᵀ X V of each V ``(..., n, k)``."""
        ...

    def squares(self) -> list[Tensor]:
        """Return the square of each Frobenius norm, ``(..., 1, 1)``.

        Call it after `of_both`, or after both `of_rows` and `of_cols`.
        """
        ...


class StoredProducts:
    """Products of stored matrices, computed by torch.

    Args:
        xs: ``(..., m, n)``, float32 or float64, each with the memory layout of `matrix_buffer`.
    """

    def __init__(self, xs: Sequence[Tensor]) -> None:
        self.xs = xs

    def of_rows(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return X V of each matrix."""
        return [(x @ v.to(x.dtype)).double() for x, v in zip(self.xs, blocks, strict=True)]

    def of_cols(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return Xᵀ Y of each matrix."""
        return [(x.mT @ y.to(x.dtype)).double() for x, y in zip(self.xs, blocks, strict=True)]

    def of_both(self, blocks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return X V and Xᵀ X V of each matrix."""
        rows = self.of_rows(blocks)
        return rows, self.of_cols(rows)

    def squares(self) -> list[Tensor]:
        """Return the square of each Frobenius norm."""
        norms = [torch.linalg.vector_norm(x, dim=-1, keepdim=True).double() for x in self.xs]
        return [norm.square().sum(-2, keepdim=True) for norm in norms]


@in_full_precision
def deflate(x: Tensor, rank: int) -> Tensor:
    """Lower the ``rank`` leading singular values of ``x`` to about the next singular value.

    This takes about 10 (k + 1) mn flops. For comparison, `sinkgd.newton_schulz.orthogonalize` takes
    4 min(m, n) mn flops for each step.

    Args:
        x: ``(..., m, n)``, float32 or wider. Not modified, and not differentiated.
        rank: Directions k to lower, at least 1. A matrix with no more than k rows or columns has
            all but one of its directions lowered.

    Returns:
        ``(..., m, n)``. No singular value grows. The level is at least 2^-6 of the longest column
        of B. The length of this column approximates the largest singular value, as described at the
        top of this module. A zero matrix stays zero. Needs scratch memory, besides the result, for
        a few blocks of k + 1 float64 vectors.

    Raises:
        TypeError: If ``rank`` is not an integer.
        ValueError: If ``rank`` is below 1.

    Examples:
        >>> x = deflate(torch.diag(torch.tensor([40.0, 20.0, 4.0, 0.5, 0.1])), rank=2)
        >>> torch.linalg.svdvals(x).round(decimals=1)  # 40 and 20 are now close to 4
        tensor([4.4000, 4.0000, 3.7000, 0.5000, 0.1000])
    """
    check_rank(rank)
    if x.numel() == 0:
        return x.clone()
    result = matrix_buffer(x)
    size = or_one(largest_entry(x.detach(), (-2, -1)))
    torch.div(x.detach(), size, out=result)
    deflate_(result, rank)
    return result.mul_(size)


def check_rank(rank: int) -> None:
    """Refuse a ``rank`` below 1."""
    check_whole_number("rank", rank)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")


def deflate_(x: Tensor, rank: int) -> None:
    """Lower the leading singular values of each matrix of ``(..., m, n)`` in place.

    ``x`` must not be empty, the squares of its entries must be in range, and its memory layout must
    be that of `matrix_buffer`.
    """
    m, n = x.shape[-2:]
    k = min(rank, m - 1, n - 1)
    if k > 0:
        block = fixed_block((n, k + 1), x.device).expand(*x.shape[:-2], n, k + 1)
        products = StoredProducts([x])
        (leading,) = run(find_leading(products, [block], [(m, n)], immediate))
        take_away_(x, leading.taken)


@computation
def find_leading(
    products: Products,
    blocks: Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    over_rows: Sum,
    over_columns: Sum | None = None,
) -> Steps[list[Leading]]:
    """Find the part to subtract from each matrix; the matrices may be sharded.

    Args:
        products: Products of the matrices, or of this rank's shards of them. The squares of their
            entries must be in range.
        blocks: Ω of each matrix, ``(..., n, k + 1)`` float64, where n counts only this rank's
            columns.
        shapes: m and n of the whole matrices; k is less than both.
        over_rows: Adds up the sums of ranks that hold different rows.
        over_columns: Adds up the sums of ranks that hold different columns; None if no rank holds
            only a part of a row.
    """
    _, ahead = yield _of_both(products, blocks, over_columns)
    ahead, squares = _halves((yield over_rows([*ahead, *products.squares()])))
    grams = [y.mT @ y for y in ahead]
    if over_columns is not None:
        grams, squares = _halves((yield over_columns([*grams, *squares])))
    # Vectors of many matrices need much memory, so none outlives its use.
    basis = _times(ahead, [inverse for inverse, _ in at_once(invert_root, grams)])
    rows, columns = yield _of_both(products, basis, over_columns)
    del basis
    columns, grams = _halves((yield over_rows([*columns, *(z.mT @ z for z in rows)])))
    roots = at_once(invert_root, grams)
    left = _times(rows, [inverse for inverse, _ in roots])
    right = _times(columns, [known for _, known in roots])
    lengths = [b.square().sum(-2, keepdim=True) for b in right]  # b², (..., 1, k + 1)
    if over_columns is not None:
        lengths = yield over_columns(lengths)
    others = [
        torch.full_like(square, min(shape) - length.shape[-1] + 1)
        for square, length, shape in zip(squares, lengths, shapes, strict=True)
    ]
    lowered = at_once(_lowering, lengths, squares, others)
    return [
        Leading(LowRank(q[..., :-1] * taken, b[..., :-1]), square, b, length)
        for q, b, length, (taken, square) in zip(left, right, lengths, lowered, strict=True)
    ]


class PackedLeading(NamedTuple):
    """What deflation subtracts from many matrices, and the size of what remains.

    From each matrix, ``taken @ factors @ right.mT`` is subtracted.
    """

    taken: Packed  # k + 1 vectors of each matrix
    factors: Tensor  # (matrices, k + 1, k + 1); the last column is zero
    right: Packed
    square: Tensor  # square of the Frobenius norm of what remains, (matrices, 1, 1)


def find_packed_leading(products: PackedProducts) -> PackedLeading:
    """Do what `find_leading` does, for whole matrices, with a fixed number of torch calls."""
    _, ahead = products.of_both()
    inverse, _ = invert_root(ahead.grams())
    rows, columns = products.of_both(ahead.times(inverse).blocks.flatten(0, 1))
    del ahead
    inverse, known = invert_root(rows.grams())
    right = columns.times(known)
    lengths = right._replace(blocks=right.blocks.square().sum(1, keepdim=True)).sums()
    others = products.shorter_side - (lengths.shape[-1] - 1)
    taken, square = _lowering(lengths, products.squares(), others)
    return PackedLeading(rows, inverse * nn.functional.pad(taken, (0, 1)), right, square)


def fixed_block(shape: Sequence[int], device: torch.device) -> Tensor:
    """Return entries of both signs without a pattern, the same at every step, in float64."""
    places = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64, device=device)
    return places.square_().mul_(_IRRATIONAL).sin_().view(*shape)


def take_away_(x: Tensor, taken: LowRank) -> None:
    """Subtract a low-rank matrix from ``x``, which is laid out like a `matrix_buffer`."""
    left, right = (y.to(x.dtype) for y in taken)
    own, left, right = (y.unsqueeze(0).flatten(0, -3) for y in (x, left, right))
    own.baddbmm_(left, right.mT, alpha=-1)


@computation
def _of_both(
    products: Products, blocks: Sequence[Tensor], over_columns: Sum | None
) -> Steps[tuple[list[Tensor], list[Tensor]]]:
    """Return X V for this rank's rows, and what these rows add to Xᵀ X V."""
    if over_columns is None:
        return products.of_both(blocks)
    rows = yield over_columns(products.of_rows(blocks))
    return rows, products.of_cols(rows)


def _times(vectors: list[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """Multiply the members of two lists pair by pair, and empty the first list."""
    vectors.reverse()
    return [vectors.pop() @ factor for factor in factors]


def _halves(numbers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Split the content of a message into the first and the second quantity of all matrices.

    Empties the list, so that its tensors can be freed.
    """
    half = len(numbers) // 2
    halves = numbers[:half], numbers[half:]
    numbers.clear()
    return halves


def at_once(
    function: Callable[..., tuple[Tensor, Tensor]], *numbers: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Apply a function of small matrices to lists of them, with one call per width.

    Args:
        function: Takes one tensor ``(..., a, b)`` from each list, and returns two such tensors.
        numbers: Lists of equal length; the first one determines the width b.
    """
    kinds: dict[int, list[int]] = {}
    for i, x in enumerate(numbers[0]):
        kinds.setdefault(x.shape[-1], []).append(i)
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for own in kinds.values():
        if len(own) == 1:
            results[own[0]] = function(*(x[own[0]] for x in numbers))
            continue
        batches = [numbers[0][i].shape[:-2] for i in own]
        found = function(*(torch.cat([_one_batch(x[i]) for i in own]) for x in numbers))
        counts = [batch.numel() for batch in batches]
        parts = zip(*(torch.split(x, counts) for x in found), strict=True)
        for i, batch, (one, other) in zip(own, batches, parts, strict=True):
            results[i] = _in_batches(one, batch), _in_batches(other, batch)
    return [results[i] for i in range(len(numbers[0]))]


def _one_batch(x: Tensor) -> Tensor:
    return x if x.ndim == 3 else x.reshape(-1, *x.shape[-2:])


def _in_batches(x: Tensor, batch: torch.Size) -> Tensor:
    return x if len(batch) == 1 else x.view(*batch, *x.shape[-2:])


def invert_root(gram: Tensor, shortest: float = _SHORTEST) -> tuple[Tensor, Tensor]:
    """Invert the upper Cholesky factor R of the Gram matrix ``(..., k, k)`` of k vectors.

    If the vectors span k directions, the vectors times R⁻¹ are orthonormal; otherwise, some of the
    products are shorter than 1.

    Returns:
        R⁻¹, and a copy of R⁻¹ with zero columns for directions no longer than ``shortest`` times
        the Frobenius norm of the vectors.
    """
    # Products with it extract the diagonal; inductor warns about a view of the diagonal.
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    size = or_one((gram * eye).sum((-2, -1), keepdim=True))
    root = torch.linalg.cholesky_ex(gram / size + _RIDGE * eye).L.mT
    lengths = (root * eye).sum(-2, keepdim=True)  # their squares add up to 1, or less
    inverse = torch.linalg.solve_triangular(root, eye.expand_as(root), upper=True)
    inverse = inverse / size.sqrt()
    return inverse, inverse * (lengths > shortest)


def _lowering(lengths: Tensor, square: Tensor, others_count: Tensor) -> tuple[Tensor, Tensor]:
    """Find how much to subtract, to lower the leading directions to the level of the next one.

    Args:
        lengths: b², ``(..., 1, k + 1)``.
        square: Square of the Frobenius norm of X, ``(..., 1, 1)``.
        others_count: min(m, n) − k, ``(..., 1, 1)``.

    Returns:
        The fraction of each direction to subtract, ``(..., 1, k)``; and the square of the norm of
        what remains, ``(..., 1, 1)``.
    """
    leading, following = lengths[..., :-1], lengths[..., -1:]
    others = (square - leading.sum(-1, keepdim=True)).clamp_(min=0)
    level = torch.maximum(following, others / others_count)
    level = torch.maximum(level, LEAST_LEVEL**2 * lengths.amax(-1, keepdim=True))
    kept = (level / or_one(leading)).sqrt_().clamp_(max=1)  # ℓ / b
    return 1 - kept, others + (leading * kept.square()).sum(-1, keepdim=True)
