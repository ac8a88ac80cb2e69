"""SR-Sinkhorn in plain torch: the definition, and the base class of every fast backend.

Letters, everywhere in this file:
    m, n: rows and columns; ...: leading batch dimensions, one independent matrix each
    s, t: the powers of two by which `equilibrate_` divides rows (s) and columns (t)
    S: the squares of the gradient's entries, which are first divided by s and t, so that no square
        overflows and no nonzero row or column vanishes
    r, c: row and column scales; r2, c2: their squares, in the units of S
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkgd.deflation import LowRank, Products, StoredProducts, take_away_
from sinkgd.kernels.backend import (
    Backend,
    CorrectedScales,
    Keep,
    Scales,
    Stack,
    Sums,
    factor_of,
)
from sinkgd.kernels.equilibrate import Equilibration, equilibrate_, scales_of
from sinkgd.kernels.layout import check_scales, check_start
from sinkgd.kernels.rounding import round_to_bfloat16
from sinkgd.newton_schulz import matrix_buffer


class EagerBackend(Backend):
    """Two matrix–vector products per iteration, on a float32 or wider copy of each gradient."""

    name = "eager"
    package = "torch"
    install = "pip install torch"

    def missing(self) -> str | None:
        """Return None: plain torch is always available."""
        return None

    def supports(self, device: torch.device) -> bool:  # noqa: ARG002 - part of the contract
        """Return True: torch runs on every device."""
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

    def sums(self, grads: Sequence[Tensor]) -> Sums:
        """Return an object that sums the squares of gradients."""
        return EagerSums(grads)

    def products(self, stacks: Sequence[Stack]) -> Products:
        """Compute and store updates, and return an object that multiplies them by vectors."""
        return eager_products(stacks)

    def update_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        scales: Sequence[Scales | CorrectedScales],
        *,
        keep: Keep,
        step: float | Tensor,
        allowed: Sequence[Tensor] | None = None,
        keys: Sequence[Tensor] | None = None,
    ) -> None:
        """Set each parameter to ``keep * param + step * row * grad * col``, rounded once."""
        for i, (param, grad, own) in enumerate(zip(params, grads, scales, strict=True)):
            check_scales(param, own.row, own.col)
            apply_update_(
                param,
                update_of(grad, own),
                keep=keep,
                step=step,
                allowed=None if allowed is None else allowed[i],
                key=None if keys is None else keys[i],
            )


def sinkhorn(
    grad: Tensor, num_iters: int, *, tol: float | None = None, start: Tensor | None = None
) -> Scales:
    """Return the scales of one gradient, or batch of gradients, ``(..., m, n)``.

    On a GPU, ``tol`` makes every iteration after the first wait for the device.
    """
    m, n = grad.shape[-2:]
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if grad.numel() == 0:
        batch = grad.shape[:-2]
        return Scales(
            grad.new_ones(*batch, m, 1, dtype=dtype), grad.new_ones(*batch, 1, n, dtype=dtype)
        )
    S = grad.to(dtype, copy=True).abs_()
    divisors = equilibrate_(S)
    S *= S
    first = divisors.t if start is None else divisors.t * start
    r2, c2 = _iterate(S, first.square().to(dtype))
    moving = torch.ones_like(r2[..., :1, :1], dtype=torch.bool)  # one per matrix
    for _ in range(num_iters - 1):
        # With zero rows or columns, each iteration multiplies r2 by a factor and c2 by its inverse.
        # The tilt is the factor that would give r2 * tilt and c2 / tilt the same size. Dividing c2
        # by the tilt multiplies the next r2 by it. So no product r2 * c2 changes, and r2 and c2
        # stay in range.
        tilt = _tilt(r2, c2)
        last = r2 * tilt * _drift(r2, c2)
        found = _iterate(S, c2 / tilt)
        if tol is None:
            r2, c2 = found
            continue
        r2, c2 = torch.where(moving, found[0], r2), torch.where(moving, found[1], c2)
        moving = moving & ~_has_converged(found[0], last, tol)
        if not bool(moving.any()):
            break
    return scales_of(r2.double().sqrt() / divisors.s, c2.double().sqrt() / divisors.t, dtype)


def apply_update_(
    param: Tensor,
    update: Tensor,
    *,
    keep: Keep,
    step: float | Tensor,
    allowed: Tensor | None = None,
    key: Tensor | None = None,
) -> None:
    """Set ``param`` to ``keep * param + step * update``, in float32 or wider, and round once.

    Args:
        param: The parameter.
        update: The update, of the parameter's shape. Its memory may be overwritten.
        keep: Factor of the parameter. A `Cautious` factor needs scratch of the parameter's size in
            float32 or wider.
        step: Factor of the update.
        allowed: A 0-dim bool on the parameter's device. False leaves ``param`` unchanged.
        key: The key for stochastic rounding of a bfloat16 parameter.
    """
    keep, is_cautious = factor_of(keep)
    if allowed is not None:
        if not isinstance(keep, Tensor):  # torch.where of two numbers has the default dtype
            wide_dtype = torch.promote_types(param.dtype, torch.float32)
            keep = torch.full_like(allowed, keep, dtype=wide_dtype)
        keep = torch.where(allowed, keep, 1.0)
    wide = param.to(
        torch.promote_types(param.dtype, torch.float32)
    )  # param itself, if it has that dtype
    moved = update.mul_(step)
    if allowed is not None:
        moved = torch.where(allowed, moved, -0.0)  # to add 0.0 would change -0.0
    if is_cautious:
        wide.mul_(_where_toward_zero(wide, moved, keep))
    elif isinstance(keep, Tensor) or keep != 1:
        wide.mul_(keep)
    wide.add_(moved)
    if key is not None and param.dtype == torch.bfloat16:
        wide = round_to_bfloat16(wide, key)  # what bfloat16 can represent does not change
    if wide is not param:
        param.copy_(wide)


def _where_toward_zero(param: Tensor, moved: Tensor, keep: float | Tensor) -> Tensor:
    """Return ``keep`` where adding ``moved`` brings ``param`` toward zero, and 1 elsewhere."""
    # Signs are compared, since the product of param and moved could round to zero. Which factor an
    # entry of zero gets does not matter.
    is_toward = ((moved > 0) == (param < 0)) & (moved != 0)
    factors = torch.ones_like(param)
    if isinstance(keep, Tensor):
        return torch.where(is_toward, keep.to(param.dtype), factors)
    return factors.masked_fill_(is_toward, keep)


def _iterate(S: Tensor, c2: Tensor) -> tuple[Tensor, Tensor]:
    m, n = S.shape[-2:]
    r2 = _divide(n, S @ c2.mT)
    return r2, _divide(m, r2.mT @ S)


def _divide(length: int, sums: Tensor) -> Tensor:
    # Only a zero row or column has a sum of zero. Its scale is zero.
    return torch.where(sums == 0, sums, length / sums)


def _has_converged(r2: Tensor, last: Tensor, tol: float) -> Tensor:
    """Whether no row scale of a matrix moved by more than ``tol``: ``(..., 1, 1)``."""
    low, high = no_movement(tol)
    return ((r2 >= low * last) & (r2 <= high * last)).all(dim=-2, keepdim=True)


def no_movement(tol: float) -> tuple[float, float]:
    """Return the least and the largest quotient of squared scales that count as no movement."""
    return max(0.0, 1 - tol) ** 2, (1 + tol) ** 2


def _drift(r2: Tensor, c2: Tensor) -> Tensor:
    """Return the factor by which an iteration multiplies all r2 if a row or column is zero."""
    rows, cols = (
        (r2 != 0).double().mean(-2, keepdim=True),
        (c2 != 0).double().mean(-1, keepdim=True),
    )
    return torch.where(cols == 0, 1, rows / cols).to(r2.dtype)


def _tilt(r2: Tensor, c2: Tensor) -> Tensor:
    """Return the factor for which factor * r2 and c2 / factor have the same largest entry."""
    row_peak, col_peak = r2.amax(-2, keepdim=True), c2.amax(-1, keepdim=True)
    # The quotient of the squares may be out of range.
    return torch.where(row_peak == 0, 1, col_peak.sqrt() / row_peak.sqrt())


def eager_products(stacks: Sequence[Stack]) -> StoredProducts:
    """Compute and store updates, and return an object that multiplies them by vectors."""
    return StoredProducts([_updates_of(*stack) for stack in stacks])


def update_of(grad: Tensor, scales: Scales | CorrectedScales) -> Tensor:
    """Return the update of one gradient, in float32 or wider."""
    if not isinstance(scales, CorrectedScales):
        return (grad * scales.row).mul_(scales.col)
    together = _updates_of([grad], [scales])
    take_away_(together, LowRank(*(x.unsqueeze(0) for x in scales.correction)))
    return together[0]


def without_corrections(
    grads: Sequence[Tensor], scales: Sequence[Scales | CorrectedScales]
) -> tuple[list[Tensor], list[Scales]]:
    """Return the update instead of the gradient if the scales are `CorrectedScales`.

    The scales of such an update are ones. The update is a copy, in float32 or wider.
    """
    found_grads: list[Tensor] = []
    found_scales: list[Scales] = []
    for grad, own in zip(grads, scales, strict=True):
        if isinstance(own, CorrectedScales):
            found_grads.append(update_of(grad, own))
            found_scales.append(Scales(torch.ones_like(own.row), torch.ones_like(own.col)))
        else:
            found_grads.append(grad)
            found_scales.append(own)
    return found_grads, found_scales


def _updates_of(grads: Sequence[Tensor], scales: Sequence[Scales | CorrectedScales]) -> Tensor:
    """Return ``factor * row * grad * col`` of gradients of one layout, in a `matrix_buffer`."""
    first, dtype = grads[0], scales[0].row.dtype
    updates = matrix_buffer(first.expand(len(grads), *first.shape), dtype)
    for update, grad, own in zip(updates, grads, scales, strict=True):
        torch.mul(grad, own.row, out=update).mul_(own.col)
        if isinstance(own, CorrectedScales) and own.factor is not None:
            update.mul_(own.factor)
    return updates


class EagerSums:
    """Weighted sums of squares, for example to find the scales of a matrix that devices share.

    A device that holds a shard of a matrix returns the sums of its shard. The totals over all
    devices give the scales. Weights and sums are float64, whose range includes the squares of all
    float32 numbers, so that the sums of any shards can be added.

    A call takes a matrix–vector product for each gradient, with one matrix of scratch at a time, in
    float32 or wider; s and t are kept between calls.

    Args:
        grads: ``(..., m, n)``, on one device; m and n may be 0.
    """

    def __init__(self, grads: Sequence[Tensor]) -> None:
        self.grads = grads
        self._divisors = [_equilibration(grad) for grad in grads]

    def of_rows(self, weights: Tensor) -> Tensor:
        """Return G² c² of each gradient."""
        sums = []
        lengths = [divisors.lifted_col.numel() for divisors in self._divisors]
        for i, own in enumerate(torch.split(weights, lengths)):
            s, t = self._divisors[i].s, self._divisors[i].t
            narrow, unit = _narrowed(own.view(t.shape) * t * t, self.grads[i].dtype)
            sums.append(((self._squares(i) @ narrow.mT).double() * unit * s * s).flatten())
        return torch.cat(sums)

    def of_cols(self, weights: Tensor) -> Tensor:
        """Return (G²)ᵀ r² of each gradient."""
        sums = []
        lengths = [divisors.row.numel() for divisors in self._divisors]
        for i, own in enumerate(torch.split(weights, lengths)):
            s, t = self._divisors[i].s, self._divisors[i].t
            narrow, unit = _narrowed(own.view(s.shape) * s * s, self.grads[i].dtype)
            sums.append(((narrow.mT @ self._squares(i)).double() * unit * t * t).flatten())
        return torch.cat(sums)

    def _squares(self, i: int) -> Tensor:
        grad = self.grads[i]
        S = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        return self._divisors[i].divide_(S).square_()


def _equilibration(grad: Tensor) -> Equilibration:
    """Return the powers of two by which a gradient is divided; ones if the gradient is empty."""
    *batch, m, n = grad.shape
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if grad.numel() == 0:
        one = torch.ones((), dtype=dtype, device=grad.device)
        return Equilibration(one.expand(*batch, m, 1), one.expand(*batch, 1, n))
    return equilibrate_(grad.to(dtype, copy=True).abs_())


def _narrowed(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return weights in units of the largest, in the dtype of the squares, and the unit."""
    if weight.numel() == 0:
        return weight.to(torch.promote_types(dtype, torch.float32)), weight.new_ones(())
    unit = weight.amax(dim=(-2, -1), keepdim=True)
    unit = torch.where(unit == 0, 1, unit)
    return (weight / unit).to(torch.promote_types(dtype, torch.float32)), unit
