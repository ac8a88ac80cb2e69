"""Sums of the squares of gradients that lie in pieces, by the compiled loops.

They add up in float32. A gradient for which that is not enough, here or later, is left to
`EagerSums` from then on: its squares leave float32's range, or a row or column is zero.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sinkgd.kernels.cpu.jobs import SumsJob, float32_address
from sinkgd.kernels.cpu.sources import readable
from sinkgd.kernels.sums import EagerSums

# A sum may have lost terms of up to 2^-126, each times its weight; see `FLOOR` in `invert`.
_FLOOR = 2.0**-100
_SMALLEST = 2.0**-126


class CpuSums:
    """Compiled loops: a pass over the gradients for each call.

    Args:
        grads: ``(..., m, n)``, of any kind.
    """

    def __init__(self, grads: Sequence[Tensor]) -> None:
        self._grads = grads
        self._sources = [readable(grad) for grad in grads]
        self._rows = [grad.shape[:-1].numel() for grad in grads]
        self._cols = [grad.mT.shape[:-1].numel() for grad in grads]
        self._others: dict[int, EagerSums] = {}  # by the place of the gradient
        for i, source in enumerate(self._sources):
            if source is None:
                self._leave(i)
        self._of_rows = torch.zeros(sum(self._rows), dtype=torch.float32, device="cpu")
        self._of_cols = torch.zeros(sum(self._cols), dtype=torch.float32, device="cpu")
        self._along = self._job(self._of_cols, self._cols, self._of_rows, self._rows, rows=True)
        self._down = self._job(self._of_rows, self._rows, self._of_cols, self._cols, rows=False)

    def of_rows(self, weights: Tensor) -> Tensor:
        """Return G² c² of each."""
        self._of_cols.copy_(weights)
        self._along.run()
        lengths = self._cols, self._rows
        return self._checked(weights, self._of_cols, self._of_rows, lengths, EagerSums.of_rows)

    def of_cols(self, weights: Tensor) -> Tensor:
        """Return (G²)ᵀ r² of each."""
        self._of_rows.copy_(weights)
        self._down.run()
        lengths = self._rows, self._cols
        return self._checked(weights, self._of_rows, self._of_cols, lengths, EagerSums.of_cols)

    def _job(
        self, weights: Tensor, counts: list[int], sums: Tensor, places: list[int], *, rows: bool
    ) -> SumsJob:
        job = SumsJob()
        at, to = float32_address(weights), float32_address(sums)
        for source, count, place in zip(self._sources, counts, places, strict=True):
            if source is not None:
                job.add(source.tensor.data_ptr(), source.form, at, to, rows=rows)
            at += 4 * count
            to += 4 * place
        return job

    def _checked(
        self,
        weights: Tensor,
        narrow: Tensor,
        sums: Tensor,
        lengths: tuple[list[int], list[int]],
        of: Callable[[EagerSums, Tensor], Tensor],
    ) -> Tensor:
        """Return sums in float64, those that float32 is not enough for by other means."""
        read, written = lengths
        floor = _FLOOR * (1 + max(read, default=0)) * (1 + narrow.amax()) if len(narrow) else 0
        fair = (sums >= floor) & sums.isfinite()
        if not bool(fair.all()):
            for i in _owners(~fair, written):
                self._leave(i)
        lost = (weights != 0) & ((narrow < _SMALLEST) | ~narrow.isfinite())
        if bool(lost.any()):
            for i in _owners(lost, read):
                self._leave(i)
        wide = sums.double()
        if self._others:
            parts, own = torch.split(wide, written), torch.split(weights, read)
            for i, other in self._others.items():
                parts[i].copy_(of(other, own[i]))
        return wide

    def _leave(self, i: int) -> None:
        if i not in self._others:
            self._others[i] = EagerSums([self._grads[i]])


def _owners(marked: Tensor, lengths: Sequence[int]) -> list[int]:
    """Return which stretches of a vector hold a mark."""
    return [i for i, own in enumerate(torch.split(marked, list(lengths))) if bool(own.any())]
