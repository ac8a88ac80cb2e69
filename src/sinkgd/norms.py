r"""The norms that a gradient can be normalized by, each defined by its projection.

The projection of a norm :math:`g` sends ``x`` to the point of the unit ball of :math:`g` that is
farthest in the direction of ``x``, :math:`P_g(x) = \arg\max_{g(z) = 1} \langle x, z \rangle`. Each
projection here is scaled so that its result has Frobenius norm :math:`\sqrt{mn}`, whatever the
scale of ``x``: the entries of the result then have root-mean-square 1, and projections can
alternate (Assumption 3.3 of the paper).

Shapes, everywhere in this file:
    m: rows, the out_features of an ``nn.Linear`` weight
    n: columns, its in_features
    ...: leading batch dimensions, one independent matrix each

A zero row, column or matrix has no direction and stays zero, so the result can be shorter than
√(mn). NaN and infinity become NaN. Projections compute in the dtype of their input;
`multi_normalize` passes float32 or float64. Besides the result they need one matrix of scratch
memory; the spectral norm needs up to two, and the deflated norm also a few blocks of vectors. They
are not differentiable: no gradient flows through them.

References:
    Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training,
    sections 3.1 and 3.2. https://arxiv.org/abs/2502.06742
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from sinkgd.deflation import check_rank, deflate_
from sinkgd.newton_schulz import (
    largest_entry,
    matrix_buffer,
    or_one,
    orthogonalize_into,
    sum_of_matrix,
)
from sinkgd.number_check import check_whole_number
from sinkgd.precision import in_full_precision


@runtime_checkable
class Norm(Protocol):
    """The interface of a norm for `multi_normalize`: any class with a method `project` is a norm.

    The optimizers stack matrices of one shape and project them together, so a norm must treat
    leading dimensions as independent matrices: ``project(x)[i]`` is ``project(x[i])``. Count
    dimensions from the end: in a stack, ``dim=-1`` is along a row, and ``dim=1`` is not.

    Examples:
        >>> class HeadNorm:
        ...     '''Scales every attention head, 64 rows of a query weight, to root-mean-square 1.'''
        ...
        ...     def project(self, x: Tensor) -> Tensor:
        ...         heads = x.unflatten(-2, (-1, 64))
        ...         return FrobeniusNorm().project(heads).flatten(-3, -2)
        >>> isinstance(HeadNorm(), Norm)
        True
    """

    def project(self, x: Tensor) -> Tensor:
        """Map each matrix of ``(..., m, n)`` to one of length √(mn), without modifying ``x``."""
        ...


class _BuiltIn(ABC):
    """A norm that can project into buffers of the caller."""

    @in_full_precision
    def project(self, x: Tensor) -> Tensor:
        """Project each matrix of ``(..., m, n)``, without modifying ``x``."""
        if x.numel() == 0:
            return x.clone()
        return self.project_into(x.detach(), matrix_buffer(x), matrix_buffer(x))[0]

    @abstractmethod
    def project_into(self, x: Tensor, result: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        """Project ``x`` into ``result`` or ``spare``; both buffers are overwritten.

        Args:
            x: ``(..., m, n)``, not empty. It may be ``result``; otherwise it is only read.
            result: A `matrix_buffer` of ``x``.
            spare: Another such buffer, with the same memory layout.

        Returns:
            The two buffers, the one with the result first.
        """


@dataclass(frozen=True)
class RowNorm(_BuiltIn):
    r"""Rows of length √n: :math:`P(x) = \sqrt{n}\, Q(x)^{-1} x`.

    Q(x) is the diagonal matrix of row lengths.

    Examples:
        >>> RowNorm().project(torch.tensor([[3.0, 4.0], [0.0, 0.5]]))
        tensor([[0.8485, 1.1314],
                [0.0000, 1.4142]])
    """

    def project_into(self, x: Tensor, result: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        """Scale every row to length √n."""
        return _scale(x, (-1,), result, spare)


@dataclass(frozen=True)
class ColumnNorm(_BuiltIn):
    r"""Columns of length √m: :math:`P(x) = \sqrt{m}\, x R(x)^{-1}`.

    R(x) is the diagonal matrix of column lengths.
    """

    def project_into(self, x: Tensor, result: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        """Scale every column to length √m."""
        return _scale(x, (-2,), result, spare)


@dataclass(frozen=True)
class FrobeniusNorm(_BuiltIn):
    r"""A whole matrix of length √(mn): :math:`P(x) = \sqrt{mn}\, x / \lVert x \rVert_F`."""

    def project_into(self, x: Tensor, result: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        """Scale every matrix to root-mean-square 1."""
        return _scale(x, (-2, -1), result, spare)


@dataclass(frozen=True)
class SignNorm(_BuiltIn):
    r"""Entries of 1 or −1: :math:`P(x) = \operatorname{sign}(x)`.

    The length of the result is √(mn) if x has no zeros.
    """

    def project_into(self, x: Tensor, result: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        """Replace every entry by its sign."""
        torch.sign(x, out=spare)
        torch.mul(x, 0, out=result)  # NaN where x is not finite, and 0 elsewhere
        result += spare
        return result, spare


@dataclass(frozen=True)
class SpectralNorm(_BuiltIn):
    r"""Equal singular values: :math:`P(x) = \sqrt{\max(m, n)}\, U V^\top` for x = USVᵀ.

    The polar factor :math:`U V^\top` comes from `orthogonalize`, and is scaled to Frobenius norm
    √(mn). For a matrix of full rank and with enough steps, it is multiplied by √max(m, n).
    Otherwise the multiplier is larger, so that the size of the update, and with it the meaning of
    ``lr``, does not change.

    Args:
        num_steps: Newton–Schulz steps, at least 1. More steps bring smaller singular values to 1.
    """

    num_steps: int = 5

    def __post_init__(self) -> None:
        check_whole_number("num_steps", self.num_steps)
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")

    def project_into(self, x: Tensor, result: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        """Whiten every matrix."""
        result, spare = orthogonalize_into(x, self.num_steps, result, spare)
        # The largest singular value is at least min(m, n)^(-1/4): no square that matters is out of
        # range.
        _stretch(result, (-2, -1), spare)
        return result, spare


@dataclass(frozen=True)
class DeflatedNorm(_BuiltIn):
    r"""Lower the largest singular values: :math:`P(x) \propto` `deflate` of x, of length √(mn).

    The k leading singular values are lowered to the next one. This is not the projection of a norm,
    but its result is close to `SpectralNorm`'s, at a lower cost. The products of the matrix with
    k + 1 vectors take about 10 (k + 1) flops per entry; whitening in five steps takes up to
    20 min(m, n).

    Args:
        rank: Directions k, at least 1.
    """

    rank: int = 8

    def __post_init__(self) -> None:
        check_rank(self.rank)

    def project_into(self, x: Tensor, result: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        """Lower the leading singular values, and scale the result."""
        torch.div(x, or_one(largest_entry(x, (-2, -1))), out=result)
        deflate_(result, self.rank)
        return _scale(result, (-2, -1), result, spare)


def as_norms(norms: object) -> tuple[Any, ...]:
    """Return the members of a list or other iterable of norms, without checking them.

    Raises:
        TypeError: If ``norms`` is not iterable, or is a string, a tensor or a mapping.
    """
    if isinstance(norms, str | Tensor | Mapping) or not isinstance(norms, Iterable):
        raise TypeError(f"norms must be a list of norms such as [RowNorm()], got {norms!r}")
    return tuple(norms)


def checked_norms(norms: object) -> tuple[Norm, ...]:
    """Return the members of a list or other iterable of norms.

    Raises:
        TypeError: If ``norms`` is not a list or other iterable, or a member is not a norm, such as
            a class of norms without parentheses.
        ValueError: If the list is empty.
    """
    found = as_norms(norms)
    if not found:
        raise ValueError("norms must name at least one norm, got none; e.g. [RowNorm()]")
    for norm in found:
        if isinstance(norm, type):
            raise TypeError(
                f"norms must be instances, and {norm.__name__} is a class; write {norm.__name__}()"
            )
        if not isinstance(norm, Norm):
            raise TypeError(f"norms must each have a method project(x); {norm!r} has none")
    return found


def is_built_in(norm: Norm) -> TypeGuard[_BuiltIn]:
    """Whether `project_into` may replace `project`: not for subclasses, which may override it."""
    return type(norm) in _BUILT_IN


_BUILT_IN = (RowNorm, ColumnNorm, FrobeniusNorm, SignNorm, SpectralNorm, DeflatedNorm)


def _scale(x: Tensor, dim: tuple[int, ...], result: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    # Dividing by the largest entry first keeps squares in range if this entry is in [1e-38, 1e+38].
    torch.div(x, or_one(largest_entry(x, dim)), out=result)
    _stretch(result, dim, spare)
    return result, spare


def _stretch(x: Tensor, dim: tuple[int, ...], spare: Tensor) -> None:
    """Scale ``x`` in place to root-mean-square 1 along ``dim``."""
    # On a CPU this sum is tens of times faster than vector_norm along the rows.
    squares = torch.mul(x, x, out=spare)
    total = sum_of_matrix(squares) if len(dim) > 1 else squares.sum(dim=dim, keepdim=True)
    size = math.prod(x.shape[axis] for axis in dim)
    x *= size**0.5 / or_one(total).sqrt_()
