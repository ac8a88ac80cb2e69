"""Optimizers that update matrices one by one, and Fira's limiter of how an update's norm grows.

References:
    Chen et al., Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?
    https://arxiv.org/abs/2410.01623
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sinkgd.lab.train.recipes.contract import check_matrices

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


class OneByOne(Optimizer):
    """Updates every matrix that has a gradient.

    Args:
        params: Matrices: tensors, (name, tensor) pairs, or groups of them.
        defaults: Options of the groups that do not set their own.
        method: What it does to matrices, e.g. "APOLLO projects matrices"; an error begins with it.

    Raises:
        ValueError: If a parameter is no matrix; the message names it.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], method: str) -> None:
        super().__init__(params, defaults)
        check_matrices(self.param_groups, method)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every matrix that has a gradient; return what ``closure`` did."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for param in group["params"]:
                number += 1
                if param.grad is not None:
                    self._descend(param, param.grad, group, number)
        return loss

    @abstractmethod
    def _descend(self, param: Tensor, grad: Tensor, group: Mapping[str, Any], number: int) -> None:
        """Update a matrix, the ``number``-th of all, from 1."""
