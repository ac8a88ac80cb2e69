r"""The norms to normalize by, each as its projection.

The projection of a norm :math:`g` sends ``x`` to the point of the unit ball of :math:`g` that
points most along it, :math:`P_g(x) = \arg\max_{g(z) = 1} \langle x, z \rangle`. Each one here is
scaled so that its result has Frobenius norm :math:`\sqrt{mn}`, whatever ``x``: its entries then
have root-mean-square 1, and projections can take turns (Assumption 3.3 of the paper).

Shapes, everywhere in this file:
    m: rows, the out_features of an ``nn.Linear`` weight
    n: columns, its in_features
    ...: leading batch dimensions, one independent matrix each

A zero row, column or matrix has no direction and stays zero; NaN and infinity come out as NaN.
Projections compute in the dtype they are given; `multi_normalize` hands them float32 or float64.

References:
    Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training,
    sections 3.1 and 3.2. https://arxiv.org/abs/2502.06742
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from sinkgd.newton_schulz import orthogonalize


@runtime_checkable
class Norm(Protocol):
    """What `multi_normalize` needs of a norm; any class with this method is one.

    Example:
        >>> class HeadNorm:
        ...     '''Every attention head, 64 rows of a query weight, to root-mean-square 1.'''
        ...
        ...     def project(self, x: Tensor) -> Tensor:
        ...         heads = x.unflatten(-2, (-1, 64))
        ...         return FrobeniusNorm().project(heads).flatten(-3, -2)
        >>> isinstance(HeadNorm(), Norm)
        True
    """

    def project(self, x: Tensor) -> Tensor:
        """Map ``(..., m, n)`` to the same shape, with Frobenius norm √(mn)."""
        ...


@dataclass(frozen=True)
class RowNorm:
    r"""Rows of length √n: :math:`P(x) = \sqrt{n}\, Q(x)^{-1} x`, Q the diagonal of row lengths.

    Example:
        >>> RowNorm().project(torch.tensor([[3.0, 4.0], [0.0, 0.5]]))
        tensor([[0.8485, 1.1314],
                [0.0000, 1.4142]])
    """

    def project(self, x: Tensor) -> Tensor:
        """Scale every row of ``(..., m, n)`` to length √n."""
        return _scaled_to_length(x, x.shape[-1] ** 0.5, dim=(-1,))


@dataclass(frozen=True)
class ColumnNorm:
    r"""Columns of length √m: :math:`P(x) = \sqrt{m}\, x R(x)^{-1}`, R the column lengths."""

    def project(self, x: Tensor) -> Tensor:
        """Scale every column of ``(..., m, n)`` to length √m."""
        return _scaled_to_length(x, x.shape[-2] ** 0.5, dim=(-2,))


@dataclass(frozen=True)
class FrobeniusNorm:
    r"""The whole matrix to length √(mn): :math:`P(x) = \sqrt{mn}\, x / \lVert x \rVert_F`."""

    def project(self, x: Tensor) -> Tensor:
        """Scale ``(..., m, n)`` to root-mean-square 1."""
        return _scaled_to_length(x, (x.shape[-2] * x.shape[-1]) ** 0.5, dim=(-2, -1))


@dataclass(frozen=True)
class SignNorm:
    r"""Entries of size 1: :math:`P(x) = \operatorname{sign}(x)`, of length √(mn) without zeros."""

    def project(self, x: Tensor) -> Tensor:
        """Replace every entry of ``(..., m, n)`` by its sign."""
        return torch.where(x.isfinite(), x.sign(), torch.nan)


@dataclass(frozen=True)
class SpectralNorm:
    r"""Equal singular values: :math:`P(x) = \sqrt{\max(m, n)}\, U V^\top` for x = USVᵀ.

    The polar factor comes from `orthogonalize`, on the shorter side of the matrix, and the result
    is scaled to Frobenius norm √(mn). For a matrix of full rank and enough steps that changes
    nothing; otherwise it keeps the size of the update, and so the meaning of ``lr``.

    Args:
        num_steps: Newton–Schulz steps, at least 1. More steps bring smaller singular values to 1.
    """

    num_steps: int = 5

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")

    def project(self, x: Tensor) -> Tensor:
        """Whiten ``(..., m, n)``."""
        return FrobeniusNorm().project(orthogonalize(x, self.num_steps))


def _scaled_to_length(x: Tensor, length: float, dim: tuple[int, ...]) -> Tensor:
    if x.numel() == 0:
        return x.clone()
    # Dividing by the largest entry first keeps the squares in range from 1e-38 to 1e+38.
    peak = x.abs().amax(dim=dim, keepdim=True)
    shrunk = x / torch.where(peak == 0, 1, peak)
    # On a CPU this sum is tens of times faster than vector_norm along the rows.
    squared_length = shrunk.square().sum(dim=dim, keepdim=True)
    return shrunk * (length / torch.where(squared_length == 0, 1, squared_length).sqrt())
