"""SR-Sinkhorn in plain torch: the definition that every fast backend is tested against.

Letters, everywhere in this file:
    m, n: rows and columns; ...: leading batch dimensions, one independent matrix each
    s, t: powers of two at or below the largest entry of a row, of a column
    S: the squares of the gradient divided by s and t, so that none overflows or vanishes
    r, c: row and column scales; r2, c2: their squares, in the units of S
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkgd.deflation import StoredProducts
from sinkgd.kernels.backend import Lowered, Scales, Stack
from sinkgd.kernels.finite import all_finite
from sinkgd.kernels.layout import check_scales, check_start
from sinkgd.kernels.level import level_, scales_of
from sinkgd.kernels.products import eager_products, made
from sinkgd.kernels.rounding import round_to_bfloat16
from sinkgd.kernels.sums import EagerSums
from sinkgd.kernels.two_halves import TwoHalves


class EagerBackend(TwoHalves):
    """Two matrix–vector products an iteration; one float32 matrix of scratch at a time."""

    name = "eager"
    package = "torch"
    install = "pip install sinkgd"

    def missing(self) -> str | None:
        """Plain torch is always there."""
        return None

    def supports(self, device: torch.device) -> bool:  # noqa: ARG002 - part of the contract
        """Torch runs on every device."""
        return True

    def scales(
        self,
        grads: Sequence[Tensor],
        num_iters: int,
        *,
        tol: float | None = None,
        starts: Sequence[Tensor | None] | None = None,
    ) -> list[Scales]:
        """Run ``num_iters`` iterations on each gradient ``(..., m, n)``."""
        begin = [None] * len(grads) if starts is None else starts
        for grad, start in zip(grads, begin, strict=True):
            check_start(grad, start)
        return [
            sinkhorn(grad, num_iters, tol=tol, start=start)
            for grad, start in zip(grads, begin, strict=True)
        ]

    def sums(self, grads: Sequence[Tensor]) -> EagerSums:
        """Return the sums of the squares of gradients."""
        return EagerSums(grads)

    def products(self, stacks: Sequence[Stack]) -> StoredProducts:
        """Return the products of updates, of which copies are made."""
        return eager_products(stacks)

    def are_finite(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return ``(len(tensors),)`` bool: whether each holds finite numbers alone."""
        return all_finite(tensors)

    def update_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        scales: Sequence[Scales | Lowered],
        *,
        keep: float | Tensor,
        step: float | Tensor,
        allowed: Sequence[Tensor] | None = None,
        keys: Sequence[Tensor] | None = None,
    ) -> None:
        """Set each parameter to ``keep * param + step * row * grad * col``, rounded once."""
        for i, (param, grad, own) in enumerate(zip(params, grads, scales, strict=True)):
            check_scales(param, own.row, own.col)
            descend_(
                param,
                made(grad, own),
                keep=keep,
                step=step,
                allowed=None if allowed is None else allowed[i],
                key=None if keys is None else keys[i],
            )


def sinkhorn(
    grad: Tensor, num_iters: int, *, tol: float | None = None, start: Tensor | None = None
) -> Scales:
    """Return the scales of one gradient, or batch of gradients, ``(..., m, n)``.

    On a GPU ``tol`` waits for the device once an iteration.
    """
    m, n = grad.shape[-2:]
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if grad.numel() == 0:
        batch = grad.shape[:-2]
        return Scales(
            grad.new_ones(*batch, m, 1, dtype=dtype), grad.new_ones(*batch, 1, n, dtype=dtype)
        )
    S = grad.to(dtype).abs()
    level = level_(S)
    S *= S
    first = level.t if start is None else level.t * start
    r2, c2 = _iterate(S, first.square().to(dtype))
    moving = torch.ones_like(r2[..., :1, :1], dtype=torch.bool)  # one a matrix
    for _ in range(num_iters - 1):
        # Where rows or columns are zero the pair drifts apart by a factor an iteration. A factor on
        # c2 comes back as its inverse on r2, so it changes no product and keeps both in range.
        tilt = _tilt(r2, c2)
        last = r2 * tilt * _drift(r2, c2)
        found = _iterate(S, c2 / tilt)
        if tol is None:
            r2, c2 = found
            continue
        r2, c2 = torch.where(moving, found[0], r2), torch.where(moving, found[1], c2)
        moving = moving & ~_settled(found[0], last, tol)
        if not bool(moving.any()):
            break
    return scales_of(r2.double().sqrt() / level.s, c2.double().sqrt() / level.t, dtype)


def descend_(
    param: Tensor,
    update: Tensor,
    *,
    keep: float | Tensor,
    step: float | Tensor,
    allowed: Tensor | None = None,
    key: Tensor | None = None,
) -> None:
    """Set ``param`` to ``keep * param + step * update``, computed in float32 and rounded once.

    Where ``allowed`` is a False (0-dim, on the parameter's device), ``param`` stays as it is. Where
    there is a ``key``, bfloat16 is rounded stochastically. The memory of ``update`` is used up.
    """
    if allowed is not None:
        if not isinstance(keep, Tensor):  # of two numbers, torch would make the default dtype
            wide_dtype = torch.promote_types(param.dtype, torch.float32)
            keep = torch.full_like(allowed, keep, dtype=wide_dtype)
        keep = torch.where(allowed, keep, 1.0)
        update = torch.where(allowed, update, 0.0)
    wide = param.to(torch.promote_types(param.dtype, torch.float32))  # param itself, if it is wide
    wide = wide.mul_(keep) if isinstance(keep, Tensor) or keep != 1 else wide
    wide.add_(update.mul_(step))
    if key is not None and param.dtype == torch.bfloat16:
        wide = round_to_bfloat16(wide, key)  # what is bfloat16 already stays, whatever the bits
    if wide is not param:
        param.copy_(wide)


def _iterate(S: Tensor, c2: Tensor) -> tuple[Tensor, Tensor]:
    m, n = S.shape[-2:]
    r2 = _divide(n, S @ c2.mT)
    return r2, _divide(m, r2.mT @ S)


def _divide(length: int, sums: Tensor) -> Tensor:
    # A sum is zero for a zero row or column alone; its scale is then zero.
    return torch.where(sums == 0, sums, length / sums)


def _settled(r2: Tensor, last: Tensor, tol: float) -> Tensor:
    """Whether no row scale of a matrix moved by more than ``tol``: ``(..., 1, 1)``."""
    low, high = no_movement(tol)
    return ((r2 >= low * last) & (r2 <= high * last)).all(dim=-2, keepdim=True)


def no_movement(tol: float) -> tuple[float, float]:
    """The least and the largest quotient of squared scales that count as no movement."""
    return max(0.0, 1 - tol) ** 2, (1 + tol) ** 2


def _drift(r2: Tensor, c2: Tensor) -> Tensor:
    """The factor by which an iteration moves all r2 alike, where rows or columns are zero."""
    rows, cols = (
        (r2 != 0).double().mean(-2, keepdim=True),
        (c2 != 0).double().mean(-1, keepdim=True),
    )
    return torch.where(cols == 0, 1, rows / cols).to(r2.dtype)


def _tilt(r2: Tensor, c2: Tensor) -> Tensor:
    row_peak, col_peak = r2.amax(-2, keepdim=True), c2.amax(-1, keepdim=True)
    # Roots first: the quotient of the squares may be out of range.
    return torch.where(row_peak == 0, 1, col_peak.sqrt() / row_peak.sqrt())
