"""Scale the rows and columns of a matrix by powers of two, which changes no rounding.

Afterwards the largest magnitude in each nonzero row and column is in [1, 2). LAPACK's ``geequb``
scales similarly.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.kernels.backend import Scales

# An upper bound of the factor by which deflation stretches an update. The factor goes into the
# scales.
_STRETCH = 2.0**10


class Equilibration(NamedTuple):
    """Powers of two by which a matrix ``(..., m, n)`` is divided."""

    row: Tensor  # (..., m, 1)
    lifted_col: Tensor  # (..., 1, n): the divisors of columns, times `_lift`

    @property
    def s(self) -> Tensor:
        """The divisors of rows, float64."""
        return self.row.double()

    @property
    def t(self) -> Tensor:
        """The divisors of columns, float64: they may be below float32's range."""
        t = self.lifted_col.double() / _lift(self.lifted_col)
        return t.clamp(min=torch.finfo(torch.float64).tiny)

    def divide_(self, x: Tensor) -> Tensor:
        """Divide ``x``, in float32 or wider, by the divisors of its rows and columns."""
        return _divide_rows_(x, self.row).div_(self.lifted_col)


def equilibrate_(S: Tensor) -> Equilibration:
    """Divide ``S``, which is not negative, by powers of two, and return these divisors.

    Afterwards the largest entry of every nonzero row and column is in [1, 2). Columns are divided
    by 1 or less.
    """
    row = _power_of_two_below(S.amax(dim=-1, keepdim=True))
    _divide_rows_(S, row)
    col = _power_of_two_below(S.amax(dim=-2, keepdim=True))
    S /= col
    return Equilibration(row, col)


def _divide_rows_(x: Tensor, row: Tensor) -> Tensor:
    """Divide rows by powers of two below their peaks, and multiply everything by `_lift`.

    Without the lift, a column far below the peaks of its rows would vanish.
    """
    x /= row.clamp(max=1)  # in two steps, since row / lift may be out of range
    return x.div_(row.clamp(min=1) / _lift(x))


def _lift(x: Tensor) -> float:
    """Return the largest power of two that stays in the range of ``x``'s dtype when doubled."""
    return 1 / torch.finfo(x.dtype).tiny


def scales_of(row: Tensor, col: Tensor, dtype: torch.dtype) -> Scales:
    """Return scales in ``dtype``. If they are far from 1, multiply r and divide c by a factor.

    Only the product of row and column scales counts. The factor is the power of two that brings the
    largest and the smallest entry of r and c nearest to 1. Then r and c are in the range of
    ``dtype``, and so are ``row * grad`` and ``grad * col``. If the lengths of rows or columns
    differ by a factor of nearly the whole range (in float32, by a factor above 2**240 / √(mn)), the
    scales of the shortest are out of range. These are clamped, and the update of such a row or
    column is shorter than that of others.

    Args:
        row: r, ``(..., m, 1)``, float64; not negative.
        col: c, ``(..., 1, n)``, float64.
        dtype: float32 or float64.
    """
    if row.numel() == 0 or col.numel() == 0:
        return Scales(row.to(dtype), col.to(dtype))
    limit = torch.finfo(dtype).max
    # If r is small, grad * col is large: 1 / r times an entry of the update.
    entry = _STRETCH * math.sqrt(row.shape[-2] * col.shape[-1])
    most = torch.finfo(torch.float64).max
    row_inverse, col_inverse = (
        torch.where(x == 0, 0, entry / x).clamp(max=most) for x in (row, col)
    )
    largest_row_grad = col_inverse.amax(-1, keepdim=True)
    largest_grad_col = row_inverse.amax(-2, keepdim=True)
    up = torch.maximum(row.amax(-2, keepdim=True), largest_row_grad)
    down = torch.maximum(col.amax(-1, keepdim=True), largest_grad_col)
    factor = torch.minimum((down / up).sqrt(), limit / largest_row_grad)
    factor = _power_of_two_below(torch.maximum(factor, largest_grad_col / limit))
    factor = torch.where(torch.maximum(up, down) > limit**0.5, factor, 1)
    r, c = (x.clamp(max=limit).to(dtype) for x in (row * factor, col / factor))
    return Scales(r, c)


def _power_of_two_below(peak: Tensor) -> Tensor:
    # The mantissa is in [1/2, 1), so this is exactly a power of two. ldexp calls pow, which does
    # not promise that.
    power = peak / (2 * torch.frexp(peak).mantissa)
    return torch.where(peak == 0, 1, power).clamp(min=torch.finfo(peak.dtype).tiny)
