"""SR-Sinkhorn as others write it: every half step writes the iterate back to memory.

`peer_step` is a Triton loop of our own that works like axolotl's: each half step reads and writes a
scratch matrix in the gradient's dtype. `naive_step` is the textbook loop in torch, for
``torch.compile``. Neither shares code with the library.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


def naive_update(grad: Tensor, num_iters: int) -> Tensor:
    """Return the normalized gradient, by norms and divisions in float32."""
    m, n = grad.shape
    x = grad.float()
    for _ in range(num_iters):
        x = x * (n**0.5 / torch.linalg.vector_norm(x, dim=1, keepdim=True))
        x = x * (m**0.5 / torch.linalg.vector_norm(x, dim=0, keepdim=True))
    return x


def naive_step_one(param: Tensor, grad: Tensor, lr: float, num_iters: int) -> None:
    """Update one matrix by `naive_update`."""
    param.add_(naive_update(grad, num_iters).to(param.dtype), alpha=-lr)


@torch.no_grad()
def naive_step(params: Sequence[Tensor], lr: float, num_iters: int) -> None:
    """Update every matrix from its gradient, one after the other."""
    for param in params:
        assert param.grad is not None
        naive_step_one(param, param.grad, lr, num_iters)


@cache
def compiled_step_one() -> Any:
    """Return `naive_step_one`, compiled for each shape that it meets."""
    return torch.compile(naive_step_one, dynamic=False)


@torch.no_grad()
def compiled_step(params: Sequence[Tensor], lr: float, num_iters: int) -> None:
    """Update every matrix by the compiled loop."""
    one = compiled_step_one()
    for param in params:
        one(param, param.grad, lr, num_iters)


@torch.no_grad()
def peer_step(params: Sequence[Tensor], lr: float, num_iters: int) -> None:
    """Update every matrix by the Triton loop that writes its iterate back."""
    for param in params:
        assert param.grad is not None
        param.add_(peer_update(param.grad, num_iters), alpha=-lr)


def peer_update(grad: Tensor, num_iters: int) -> Tensor:
    """Return the normalized gradient in the gradient's own dtype, contiguous."""
    kernels = import_module("contact.peer_kernels")
    m, n = grad.shape
    x = torch.empty_like(grad, memory_format=torch.contiguous_format)
    source = grad.contiguous()
    for _ in range(num_iters):
        kernels.rows[(m,)](source, x, n, n**0.5, BLOCK=2048)
        grid = (-(-n // kernels.COLUMNS),)
        kernels.columns[grid](x, m, n, m**0.5, ROWS=64, COLUMNS=kernels.COLUMNS)
        source = x
    return x
