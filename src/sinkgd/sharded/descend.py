"""A step along normalized gradients that lie in pieces: scales together, updates at home."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkgd.exchange import Steps, computation
from sinkgd.kernels.backend import Backend, Descent, Matrices, take_steps
from sinkgd.sharded.add_up import agree
from sinkgd.sharded.place import Place
from sinkgd.sharded.scales import find_scales


class OnMesh:
    """A backend whose matrices lie in pieces on a mesh.

    Args:
        backend: What adds up and updates this rank's pieces.
        places: How the matrices lie, in their order.
    """

    def __init__(self, backend: Backend, places: Sequence[Place]) -> None:
        self.backend, self.places = backend, places

    @computation
    def descend_(
        self,
        matrices: Matrices,
        num_iters: int,
        *,
        keep: float | Tensor,
        step: float | Tensor,
        tol: float | None = None,
        overflow: Tensor | None = None,
    ) -> Steps[Descent]:
        """Do what `Backend.descend_` does. A computation, as `find_scales` is."""
        found: Descent = yield self.solve(matrices, num_iters, tol=tol)
        take_steps(
            self.backend,
            matrices,
            found.finite,
            found.scales,
            keep=keep,
            step=step,
            overflow=overflow,
        )
        return found

    @computation
    def solve(
        self, matrices: Matrices, num_iters: int, *, tol: float | None = None
    ) -> Steps[Descent]:
        """Find the scales, and write nothing; all ranks learn whether a gradient is finite."""
        scales, flags = yield find_scales(
            matrices.grads, self.places, self.backend, num_iters, tol=tol, starts=matrices.starts
        )
        finite = torch.stack([flags[own.start : own.stop].all() for own in matrices.owners])
        # Ranks that hold other matrices of a batch had no part in the sums.
        others = [self.places[own.start].batch_groups for own in matrices.owners]
        finite = yield agree(finite, others)
        return Descent(finite, scales)
