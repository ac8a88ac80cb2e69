"""Weighted sums of the squares of gradients, for scales that are found together with others.

A matrix that lies in pieces on several devices has row and column sums that no one knows alone.
Each device gives those of its piece; what they add up to gives the scales. Sums and weights are
float64, which holds the squares of any float32, so that pieces of any size are added up as they
are.

Letters, everywhere in this file:
    m, n: rows and columns of a piece, which may be 0; ...: leading batch dimensions
    s, t: powers of two at or below the largest entry of a row, of a column
    S: the squares of the gradient divided by s and t, in float32 or float64
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkgd.kernels.level import Level, level_


class EagerSums:
    """A matrix–vector product each. One float32 matrix of scratch at a time; s and t are kept.

    Args:
        grads: ``(..., m, n)``, on one device.
    """

    def __init__(self, grads: Sequence[Tensor]) -> None:
        self.grads = grads
        self._levels = [_level(grad) for grad in grads]

    def of_rows(self, weights: Tensor) -> Tensor:
        """Return G² c² of each."""
        sums = []
        lengths = [level.lifted_col.numel() for level in self._levels]
        for i, own in enumerate(torch.split(weights, lengths)):
            s, t = self._levels[i].s, self._levels[i].t
            narrow, unit = _narrowed(own.view(t.shape) * t * t, self.grads[i].dtype)
            sums.append(((self._squares(i) @ narrow.mT).double() * unit * s * s).flatten())
        return torch.cat(sums)

    def of_cols(self, weights: Tensor) -> Tensor:
        """Return (G²)ᵀ r² of each."""
        sums = []
        lengths = [level.row.numel() for level in self._levels]
        for i, own in enumerate(torch.split(weights, lengths)):
            s, t = self._levels[i].s, self._levels[i].t
            narrow, unit = _narrowed(own.view(s.shape) * s * s, self.grads[i].dtype)
            sums.append(((narrow.mT @ self._squares(i)).double() * unit * t * t).flatten())
        return torch.cat(sums)

    def _squares(self, i: int) -> Tensor:
        grad = self.grads[i]
        S = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        return self._levels[i].divide_(S).square_()


def _level(grad: Tensor) -> Level:
    """Return by what a gradient is divided; by ones where it is empty."""
    *batch, m, n = grad.shape
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if grad.numel() == 0:
        one = torch.ones((), dtype=dtype, device=grad.device)
        return Level(one.expand(*batch, m, 1), one.expand(*batch, 1, n))
    return level_(grad.to(dtype).abs())


def _narrowed(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a weight in units of the largest, as narrow as the squares, and the unit."""
    if weight.numel() == 0:
        return weight.to(torch.promote_types(dtype, torch.float32)), weight.new_ones(())
    unit = weight.amax(dim=(-2, -1), keepdim=True)
    unit = torch.where(unit == 0, 1, unit)
    return (weight / unit).to(torch.promote_types(dtype, torch.float32)), unit
