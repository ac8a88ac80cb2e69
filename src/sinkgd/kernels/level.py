"""Powers of two that bring every row and column of a matrix to one size, and change no rounding."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.kernels.backend import Scales

# Above the factor by which deflation stretches an update, which goes into the scales.
_STRETCH = 2.0**10


class Level(NamedTuple):
    """Powers of two by which a matrix ``(..., m, n)`` is divided."""

    row: Tensor  # (..., m, 1)
    lifted_col: Tensor  # (..., 1, n): those of columns, times `_lift`

    @property
    def s(self) -> Tensor:
        """What rows are divided by, float64."""
        return self.row.double()

    @property
    def t(self) -> Tensor:
        """What columns are divided by, float64: it may be below float32's range."""
        t = self.lifted_col.double() / _lift(self.lifted_col)
        return t.clamp(min=torch.finfo(torch.float64).tiny)

    def divide_(self, x: Tensor) -> Tensor:
        """Divide ``x``, in float32 or wider, by them."""
        return _divide_rows_(x, self.row).div_(self.lifted_col)


def level_(S: Tensor) -> Level:
    """Divide ``S`` by powers of two, and return them.

    ``S`` is not negative. Then every row and column that is not zero has an entry of 1 or more, and
    none has one of 2 or more. Columns are divided by 1 or less.
    """
    row = _power_of_two_below(S.amax(dim=-1, keepdim=True))
    _divide_rows_(S, row)
    col = _power_of_two_below(S.amax(dim=-2, keepdim=True))
    S /= col
    return Level(row, col)


def _divide_rows_(x: Tensor, row: Tensor) -> Tensor:
    """Divide rows by powers of two below their peaks, and multiply all by `_lift`.

    Otherwise a column far below the peaks of its rows would vanish.
    """
    x /= row.clamp(max=1)  # both at once may be out of range
    return x.div_(row.clamp(min=1) / _lift(x))


def _lift(x: Tensor) -> float:
    """Return the largest power of two of which twice that is in the range of ``x``'s type."""
    return 1 / torch.finfo(x.dtype).tiny


def scales_of(row: Tensor, col: Tensor, dtype: torch.dtype) -> Scales:
    """Return scales in ``dtype``, with a factor moved from one to the other if they are far from 1.

    Only their product counts. The factor is the power of two that brings the largest and the
    smallest of both nearest to 1, so that both are in range, and so are ``row * grad`` and
    ``grad * col``. Where rows or columns differ by nearly all of the range, in float32 by more than
    2**240 / √(mn), the shortest have scales beyond it; these stop at its end, and the update of
    such a row or column is shorter than that of others.

    Args:
        row: r, ``(..., m, 1)``, float64; not negative.
        col: c, ``(..., 1, n)``, float64.
        dtype: float32 or float64.
    """
    if row.numel() == 0 or col.numel() == 0:
        return Scales(row.to(dtype), col.to(dtype))
    limit = torch.finfo(dtype).max
    # Where r is small, grad * col is large: 1 / r times an entry of the update.
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
    # The mantissa lies in [1/2, 1), so this is a power of two, exactly; ldexp goes through pow and
    # promises less.
    power = peak / (2 * torch.frexp(peak).mantissa)
    return torch.where(peak == 0, 1, power).clamp(min=torch.finfo(peak.dtype).tiny)
