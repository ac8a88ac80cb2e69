"""Fira's limiter: the norm of an update grows by a hundredth a step at most.

References:
    Chen et al., Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?
    https://arxiv.org/abs/2410.01623
"""

import torch
from torch import Tensor

LARGEST_GROWTH = 1.01  # a step


def excess_of(norm: Tensor, before: Tensor) -> Tensor:
    """Return by how much an update is too long, at least 1: what to divide it by.

    Args:
        norm: Of the update.
        before: Of the last one, after it was divided; after zero, any norm is allowed.

    Examples:
        >>> excess_of(torch.tensor(3.0), torch.tensor(1.0)) * LARGEST_GROWTH
        tensor(3.)
    """
    return torch.where(before > 0, norm / before / LARGEST_GROWTH, 1.0).clamp_min(1.0)
