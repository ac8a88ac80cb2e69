"""SR-Sinkhorn in plain torch: the definition that every fast backend is tested against.

Letters, everywhere in this file:
    m, n: rows and columns; ...: leading batch dimensions, one independent matrix each
    s, t: powers of two near the largest entry of a row, of a column
    S: the squares of the gradient divided by s and t, so that none overflows or vanishes
    r, c: row and column scales; r2, c2: their squares, in the units of S
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkgd.kernels.backend import Scales


class EagerBackend:
    """Two matrix–vector products an iteration; one float32 matrix of scratch at a time."""

    name = "eager"
    install = "pip install sinkgd"

    def missing(self) -> str | None:
        """Plain torch is always there."""
        return None

    def supports(self, device: torch.device) -> bool:  # noqa: ARG002 - part of the contract
        """Torch runs on every device."""
        return True

    def scales(self, grads: Sequence[Tensor], num_iters: int) -> list[Scales]:
        """Run ``num_iters`` iterations on each gradient ``(..., m, n)``."""
        return [sinkhorn(grad, num_iters) for grad in grads]

    def update_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        scales: Sequence[Scales],
        *,
        keep: float | Tensor,
        step: float | Tensor,
        allowed: Sequence[Tensor] | None = None,
    ) -> None:
        """Set each parameter to ``keep * param + step * row * grad * col``, rounded once."""
        for i, (param, grad, (row, col)) in enumerate(zip(params, grads, scales, strict=True)):
            update = grad.to(row.dtype) * row
            update *= col
            descend_(param, update, keep=keep, step=step, allowed=allowed[i] if allowed else None)


def sinkhorn(grad: Tensor, num_iters: int) -> Scales:
    """Return the scales of one gradient, or batch of gradients, ``(..., m, n)``."""
    m, n = grad.shape[-2:]
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if grad.numel() == 0:
        batch = grad.shape[:-2]
        return Scales(
            grad.new_ones(*batch, m, 1, dtype=dtype), grad.new_ones(*batch, 1, n, dtype=dtype)
        )
    S = grad.to(dtype).abs()
    s = _power_of_two_above(S.amax(dim=-1, keepdim=True))
    S /= s
    t = _power_of_two_above(S.amax(dim=-2, keepdim=True))
    S /= t
    S *= S
    c2 = t.square()
    for _ in range(num_iters):
        r2 = _divide(n, S @ c2.mT)
        c2 = _divide(m, r2.mT @ S)
    # A matrix near the end of float32's range would need scales beyond it: they stop there.
    limit = torch.finfo(dtype).max
    return Scales((r2.sqrt() / s).clamp(max=limit), (c2.sqrt() / t).clamp(max=limit))


def descend_(
    param: Tensor,
    update: Tensor,
    *,
    keep: float | Tensor,
    step: float | Tensor,
    allowed: Tensor | None = None,
) -> None:
    """Set ``param`` to ``keep * param + step * update``, computed in float32 and rounded once.

    Where ``allowed`` is a False (0-dim, on the parameter's device), ``param`` stays as it is. The
    memory of ``update`` is used up.
    """
    if allowed is not None:
        keep = torch.where(allowed, keep, 1.0)
        update = torch.where(allowed, update, 0.0)
    wide = param.to(torch.promote_types(param.dtype, torch.float32))  # param itself, if it is wide
    wide = wide.mul_(keep) if isinstance(keep, Tensor) or keep != 1 else wide
    wide.add_(update.mul_(step))
    if wide is not param:
        param.copy_(wide)


def _power_of_two_above(peak: Tensor) -> Tensor:
    # x / mantissa(x) is a power of two, exactly; ldexp goes through pow and promises less.
    power = peak / torch.frexp(peak).mantissa
    return torch.where(peak == 0, 1, power).clamp(min=torch.finfo(peak.dtype).tiny)


def _divide(length: int, sums: Tensor) -> Tensor:
    # A sum is zero for a zero row or column alone; its scale is then zero.
    return torch.where(sums == 0, sums, length / sums)
