"""Geometric means of scales, which say how the size of a gradient is divided between the sides."""

import torch
from torch import Tensor


def sum_of_logs(scales: Tensor) -> Tensor:
    """Return the sum of the logarithms of nonzero scales, and their number.

    Args:
        scales: ``(..., 1, n)``, where n counts only this rank's.

    Returns:
        ``(..., 1, 2)`` float64, to be added up over ranks.
    """
    wide, found = scales.double(), scales != 0
    logs = torch.where(found, wide, 1).log()
    return torch.stack([logs.sum(-1), found.double().sum(-1)], dim=-1)


def geometric_mean(sums: Tensor) -> Tensor:
    """Return the mean ``(..., 1, 1)`` of the scales of `sum_of_logs`; 1 if all are zero."""
    total, count = sums[..., :1], sums[..., 1:]
    return (total / count.clamp(min=1)).exp()
