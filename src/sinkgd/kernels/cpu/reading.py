"""From a list of gradients to the scales of all: one job, and what it could not do."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sinkgd.kernels.cpu.jobs import MatricesJob, Write
from sinkgd.kernels.cpu.repair import repair
from sinkgd.kernels.cpu.room import Room
from sinkgd.kernels.cpu.sources import readable
from sinkgd.kernels.eager import sinkhorn
from sinkgd.kernels.layout import check_start


class Reading:
    """Gradients ``(..., m, n)``, to be read into scales.

    Args:
        grads: Of any kind.
        starts: Where the iterations of each begin.
    """

    def __init__(self, grads: Sequence[Tensor], starts: Sequence[Tensor | None] | None) -> None:
        self.grads = grads
        self.starts = [None] * len(grads) if starts is None else starts
        for grad, start in zip(grads, self.starts, strict=True):
            check_start(grad, start)
        self.sources = [readable(grad) for grad in grads]
        self.room = Room([source and source.form for source in self.sources], grads)

    def run(
        self,
        num_iters: int,
        tol: float | None,
        *,
        writes: Mapping[int, Write] | None = None,
        factors: tuple[float, float] = (1.0, 0.0),
    ) -> set[int]:
        """Find all scales, and take the step of those gradients that have a write.

        Returns:
            Which gradients the loops could not do as they are: their step was not taken.
        """
        writes = writes or {}
        job = MatricesJob(*factors)
        for i, source in enumerate(self.sources):
            if source is None:
                continue
            x, form = source
            start = self.starts[i]
            if start is not None:
                torch.mul(start, start, out=self.room[i].col)
            scales = self.room.addresses(i)
            job.add(x.data_ptr(), form, scales, writes.get(i), started=start is not None)
        undone = {i for i, source in enumerate(self.sources) if source is None}
        for i in undone:
            self.room.put(i, sinkhorn(self.grads[i], num_iters, tol=tol, start=self.starts[i]))
        for i, x, place in self._matrices(job.find_scales(num_iters, tol)):
            repair(x, self.room[i], place, num_iters, tol=tol, start=self.starts[i])
            undone.add(i)
        return undone

    def _matrices(self, numbers: Sequence[int]) -> list[tuple[int, Tensor, int]]:
        """Return of matrices of the job the gradient, what is read of it, and their place in it."""
        if not numbers:
            return []
        places = [
            (i, source.tensor, place)
            for i, source in enumerate(self.sources)
            if source is not None
            for place in range(len(source.form.offsets))
        ]
        return [places[number] for number in numbers]
