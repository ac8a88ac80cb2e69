"""Norms whose projection scales rows and columns, of matrices that lie in pieces on a mesh.

Row, column and Frobenius norms leave an update of the form r G c; the sign norm puts sign(G) in the
place of G. So only sums along rows and columns travel, one message a group for each norm in turn,
and a matrix never does. The sign norm copies this rank's pieces.

Letters, everywhere in this file:
    m, n: rows and columns of a whole matrix; ...: leading batch dimensions
    r2, c2: the squares of the scales of this rank's rows ``(..., m, 1)`` and columns, float64
    S: the squares of the gradient
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from sinkgd import kernels
from sinkgd.exchange import Steps, computation
from sinkgd.kernels.backend import take_steps
from sinkgd.kernels.equilibrate import scales_of
from sinkgd.norms import ColumnNorm, FrobeniusNorm, Norm, RowNorm, SignNorm
from sinkgd.optim.algorithms.across import over_columns, over_rows
from sinkgd.optim.algorithms.contract import Context, Group, Slot, are_finite, decay, descent
from sinkgd.optim.algorithms.parts import Part, parts_of
from sinkgd.optim.algorithms.rounding import keys_of_parts

_SCALINGS = (RowNorm, ColumnNorm, FrobeniusNorm, SignNorm)


def are_scalings(norms: Sequence[Norm]) -> bool:
    """Whether pieces of a matrix can be projected on all of these; a subclass may do anything."""
    return all(type(norm) in _SCALINGS for norm in norms)


@computation
def step_in_pieces(
    slots: Sequence[Slot], norms: Sequence[Norm], group: Group, context: Context
) -> Steps[Tensor]:
    """Look through the gradients of parameters on a mesh; then scale and write all at once."""
    backend = kernels.select("auto", slots[0].param.device)
    finite: Tensor = yield are_finite(slots)
    parts, owners = parts_of(slots, layout=group["layout"], split=group["split"])
    turns = _Turns(parts, backend)
    for _ in range(group["num_iters"]):
        for norm in norms:
            yield turns.project(norm)
    matrices = kernels.Matrices(
        params=[part.param for part in parts],
        grads=turns.grads,
        owners=owners,
        keys=keys_of_parts(slots, parts, owners, group),
    )
    take_steps(
        backend,
        matrices,
        finite,
        turns.scales(),
        keep=decay(group),
        step=descent(group),
        overflow=context.overflow,
    )
    return finite


class _Turns:
    """Matrices whose projections take turns."""

    def __init__(self, parts: Sequence[Part], backend: kernels.Backend) -> None:
        self.parts, self.backend = parts, backend
        self._begin([part.grad for part in parts])

    def _begin(self, grads: Sequence[Tensor]) -> None:
        self.grads = grads
        self._sums = self.backend.sums(grads)
        self.r2 = [_ones(*grad.shape[:-1], 1, like=grad) for grad in grads]
        self.c2 = [_ones(*grad.shape[:-2], 1, grad.shape[-1], like=grad) for grad in grads]

    @computation
    def project(self, norm: Norm) -> Steps[None]:
        """Project on one of `are_scalings`. Zero rows and columns stay zero."""
        shapes = [part.shape for part in self.parts]
        if isinstance(norm, SignNorm):
            self._begin([grad.sign() for grad in self.grads])
        elif isinstance(norm, RowNorm):
            sums = yield over_columns(self._row_sums(), self.parts)
            self.r2 = [_quotient(n, own) for (_, n), own in zip(shapes, sums, strict=True)]
        elif isinstance(norm, ColumnNorm):
            weights = torch.cat([r2.flatten() for r2 in self.r2])
            sums = yield over_rows(_split(self._sums.of_cols(weights), self.c2), self.parts)
            self.c2 = [_quotient(m, own) for (m, _), own in zip(shapes, sums, strict=True)]
        else:
            own = [r2 * s for r2, s in zip(self.r2, self._row_sums(), strict=True)]
            totals = yield over_columns([x.sum(-2, keepdim=True) for x in own], self.parts)
            totals = yield over_rows(totals, self.parts)
            self.r2 = [
                r2 * _quotient(m * n, total)
                for r2, (m, n), total in zip(self.r2, shapes, totals, strict=True)
            ]

    def scales(self) -> list[kernels.Scales]:
        """Return r and c of each, in float32 or the gradient's wider type."""
        return [
            scales_of(r2.sqrt(), c2.sqrt(), torch.promote_types(grad.dtype, torch.float32))
            for r2, c2, grad in zip(self.r2, self.c2, self.grads, strict=True)
        ]

    def _row_sums(self) -> list[Tensor]:
        """S c², of this rank's piece."""
        weights = torch.cat([c2.flatten() for c2 in self.c2])
        return _split(self._sums.of_rows(weights), self.r2)


def _ones(*shape: int, like: Tensor) -> Tensor:
    return torch.ones(shape, dtype=torch.float64, device=like.device)


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [prod(x.shape) for x in like])
    return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]


def _quotient(length: int, sums: Tensor) -> Tensor:
    return torch.where(sums == 0, sums, length / sums)
