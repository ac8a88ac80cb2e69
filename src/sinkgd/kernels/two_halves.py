"""A descent in two halves, all scales and then all updates: what `Backend.descend_` means."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from sinkgd.deflation import PackedProducts
from sinkgd.kernels.backend import Backend, Descent, Lowered, Matrices, Scales, Shared
from sinkgd.kernels.finite import all_finite


class TwoHalves:
    """Gives a backend its `Backend.descend_`, and no products of packed vectors."""

    packs_vectors = False

    def packed_products(
        self,
        grads: Sequence[Tensor],  # noqa: ARG002 - part of the contract
        scales: Sequence[Scales],  # noqa: ARG002
        shared: Shared,  # noqa: ARG002
    ) -> PackedProducts | None:
        """Return None: it has none."""
        return None

    def descend_(
        self: Backend,
        matrices: Matrices,
        num_iters: int,
        *,
        keep: float | Tensor,
        step: float | Tensor,
        tol: float | None = None,
        overflow: Tensor | None = None,
    ) -> Descent:
        """Find all scales, then take all steps."""
        scales = self.scales(matrices.grads, num_iters, tol=tol, starts=matrices.starts)
        descent = Descent(finite_of(scales, matrices.owners), scales)
        take_steps(
            self, matrices, descent.finite, descent.scales, keep=keep, step=step, overflow=overflow
        )
        return descent


def take_steps(
    backend: Backend,
    matrices: Matrices,
    finite: Tensor,
    scales: Sequence[Scales | Lowered],
    *,
    keep: float | Tensor,
    step: float | Tensor,
    overflow: Tensor | None = None,
) -> None:
    """Update the parameters by scales that are known, but for those of gradients not finite."""
    allowed = finite if overflow is None else finite & ~overflow
    all_may = overflow is None and _all_here(finite)
    backend.update_(
        matrices.params,
        matrices.grads,
        scales,
        keep=keep,
        step=step,
        allowed=None if all_may else of_each(allowed, matrices.owners),
        keys=matrices.keys,
    )


def finite_of(scales: Sequence[Scales], owners: Sequence[range]) -> Tensor:
    """Return ``(owners,)`` bool: whether the gradients of each were finite throughout."""
    # A non-finite entry makes every column scale of its matrix non-finite.
    flags = all_finite([col for _, col in scales])
    return _all_of(flags, [len(own) for own in owners])


def by_owner(flags: Sequence[Tensor], owners: Sequence[range]) -> Tensor:
    """Return ``(owners,)`` bool: whether all matrices of each owner have a True flag, 0-dim."""
    return _all_of(torch.stack([*flags]), [len(own) for own in owners])


def _all_of(flags: Tensor, sizes: Sequence[int]) -> Tensor:
    """Reduce consecutive runs of ``flags`` to one flag each."""
    if len(flags) == len(sizes):
        return flags
    bad = torch.split((~flags).float(), list(sizes))
    return torch.stack(torch._foreach_norm(bad, ord=torch.inf)) == 0


def _all_here(finite: Tensor) -> bool:
    """Whether all are finite and that is known without waiting for a device."""
    return finite.is_cpu and not torch.compiler.is_compiling() and bool(finite.all())


def of_each(allowed: Tensor, owners: Sequence[range]) -> list[Tensor]:
    """Return the flag of the owner of each gradient."""
    return [flag for flag, own in zip(allowed.unbind(), owners, strict=True) for _ in own]


def chosen(matrices: Matrices, taken: Sequence[bool]) -> Matrices:
    """Return the matrices of some owners."""
    if all(taken):
        return matrices
    kept = [own for own, take in zip(matrices.owners, taken, strict=True) if take]
    places = [i for own in kept for i in own]
    ends = list(accumulate(map(len, kept), initial=0))
    return Matrices(
        [matrices.params[i] for i in places],
        [matrices.grads[i] for i in places],
        [range(*pair) for pair in pairwise(ends)],
        matrices.starts and [matrices.starts[i] for i in places],
        matrices.keys and [matrices.keys[i] for i in places],
    )


def merged(ours: Sequence[bool], matrices: Matrices, one: Descent, other: Descent) -> Descent:
    """Put the owners and the matrices of two descents in order again."""
    flags = [iter(found.finite.unbind()) for found in (other, one)]
    scales = [iter(found.scales) for found in (other, one)]
    return Descent(
        torch.stack([next(flags[own]) for own in ours]),
        [next(scales[take]) for own, take in zip(matrices.owners, ours, strict=True) for _ in own],
    )
