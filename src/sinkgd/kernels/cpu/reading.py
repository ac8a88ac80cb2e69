"""From a list of gradients to the scales of all: one job, and what it could not do."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sinkgd.kernels.cpu.jobs import MatricesJob, Write
from sinkgd.kernels.cpu.repair import repair
from sinkgd.kernels.cpu.room import Room
from sinkgd.kernels.cpu.sources import readable
from sinkgd.kernels.eager import sinkhorn


class Reading:
    """Gradients ``(..., m, n)``, to be read into scales.

    Args:
        grads: Of any kind.
        starts: Where the iterations of each begin.
    """

    def __init__(self, grads: Sequence[Tensor], starts: Sequence[Tensor | None] | None) -> None:
        self.grads = grads
        self.starts = [None] * len(grads) if starts is None else starts
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
        places: list[tuple[int, int]] = []  # of every matrix of the job: gradient, place in it
        for i, source in enumerate(self.sources):
            if source is None:
                continue
            x, form = source
            start = self.starts[i]
            if start is not None:
                torch.mul(start, start, out=self.room[i].col)
            scales = self.room.addresses(i)
            job.add(x.data_ptr(), form, scales, writes.get(i), started=start is not None)
            places += [(i, place) for place in range(len(form.offsets))]
        failed = [places[number] for number in job.find_scales(num_iters, tol)]
        for i, place in failed:
            source = self.sources[i]
            assert source is not None, "it was not in the job"
            repair(source.tensor, self.room[i], place, num_iters, tol=tol, start=self.starts[i])
        others = [i for i, source in enumerate(self.sources) if source is None]
        for i in others:
            self.room.put(i, sinkhorn(self.grads[i], num_iters, tol=tol, start=self.starts[i]))
        return {*others, *(i for i, _ in failed)}
