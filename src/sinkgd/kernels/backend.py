"""The contract of a backend of SR-Sinkhorn, and what every backend does by default.

A backend finds the scales of a list of gradients, and updates a list of parameters from gradients
and scales; or it does both in one call. It receives whole lists, so that it may batch small
matrices or run everything in one launch. `sinkgd.kernels.eager` defines the result.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sinkgd.deflation import LowRank, PackedProducts, Products


class Scales(NamedTuple):
    """The pair for which ``row * grad * col`` is multi-normalized, in float32 or float64."""

    row: Tensor  # r, (..., m, 1)
    col: Tensor  # c, (..., 1, n)

    @property
    def mT(self) -> "Scales":  # noqa: N802 - named like `Tensor.mT`
        """The scales of the transposed matrix."""
        return Scales(self.col.mT, self.row.mT)


class CorrectedScales(NamedTuple):
    """Scales with a low-rank correction: ``factor * row * grad * col - correction``."""

    row: Tensor  # (..., m, 1)
    col: Tensor  # (..., 1, n)
    correction: LowRank  # (..., m, n), float32 or float64
    factor: Tensor | None = None  # (..., 1, 1), of the scales' dtype; None for 1

    @property
    def mT(self) -> "CorrectedScales":  # noqa: N802 - named like `Tensor.mT`
        """The corrected scales of the transposed matrix."""
        return CorrectedScales(self.col.mT, self.row.mT, self.correction.mT, self.factor)


class Cautious(NamedTuple):
    """A factor of a parameter that applies only to entries that the step moves toward zero.

    In these entries, ``param`` and ``step * update`` have opposite signs. The factor of all other
    entries is 1.
    """

    keep: float | Tensor


Keep = float | Tensor | Cautious  # the factor of a parameter


def factor_of(keep: Keep) -> tuple[float | Tensor, bool]:
    """Return the factor of a parameter, and whether it is `Cautious`."""
    return (keep.keep, True) if isinstance(keep, Cautious) else (keep, False)


class Matrices(NamedTuple):
    """Parameters seen as matrices, with the tensors of each matrix.

    All lists except ``ranges`` have an entry for each matrix. An owner is a user's parameter, which
    may consist of several matrices.
    """

    params: Sequence[Tensor]  # (..., m, n)
    grads: Sequence[Tensor]
    ranges: Sequence[range]  # for each owner, the indices of its matrices; in order, no gaps
    starts: Sequence[Tensor | None] | None = None  # as in `Backend.scales`
    keys: Sequence[Tensor] | None = None  # as in `Backend.update_`


class Stack(NamedTuple):
    """Gradients of one shape, dtype and memory layout; together ``(s, ..., m, n)``."""

    grads: Sequence[Tensor]  # s tensors (..., m, n)
    scales: Sequence[Scales]


class Shared(NamedTuple):
    """Vectors that gradients share."""

    vectors: Tensor  # (entries, k) float64, on the host; never modified
    first: tuple[int, ...]  # for each gradient, the row of ``vectors`` for its first column


class Descent(NamedTuple):
    """The result of `Backend.descend_`."""

    finite: Tensor  # (owners,) bool: whether all gradient entries of each owner are finite
    scales: Sequence[Scales]  # one for each gradient


class Sums(Protocol):
    """Weighted sums of the squares of gradients ``(..., m, n)``, computed repeatedly.

    Weights and sums are flat float64 tensors, gradient by gradient.
    """

    def of_rows(self, weights: Tensor) -> Tensor:
        """Return G² c² of each gradient: sums along its rows, with weights c² for its columns."""
        ...

    def of_cols(self, weights: Tensor) -> Tensor:
        """Return (G²)ᵀ r² of each gradient: sums along columns, with weights r² for its rows."""
        ...


class Backend(ABC):
    """What a backend does. `sinkgd.kernels.eager.EagerBackend` implements it in plain torch."""

    name: str
    package: str  # the package that it runs on
    install: str  # the command that installs the package
    # Whether the backend implements `packed_products`. It then applies `CorrectedScales` without
    # copying the gradients that its kernels can read.
    packs_vectors: bool = False

    @abstractmethod
    def missing(self) -> str | None:
        """Return why the backend cannot run in this environment, or None if it can."""

    @abstractmethod
    def supports(self, device: torch.device) -> bool:
        """Whether the backend runs on tensors of ``device``."""

    @abstractmethod
    def scales(
        self,
        grads: Sequence[Tensor],
        num_iters: int,
        *,
        tol: float | None = None,
        starts: Sequence[Tensor | None] | None = None,
    ) -> list[Scales]:
        """Run ``num_iters`` iterations on each gradient.

        Args:
            grads: Gradients ``(..., m, n)``. Not modified.
            num_iters: Number of iterations.
            tol: Stop iterating a matrix after an iteration, the second at the earliest, that
                changes no row scale by more than ``tol``, relative to its previous value. If a
                matrix has zero rows or columns, an iteration may multiply all row scales by a
                common factor. This factor is ignored.
            starts: Column scales ``(..., 1, n)`` from which the iterations begin, one for each
                gradient; None for ones. They are in (0, 1], contiguous, and have the scales' dtype.

        Returns:
            The scales. A non-finite entry makes every column scale of its matrix non-finite, and
            has no effect on other matrices.
        """

    @abstractmethod
    def sums(self, grads: Sequence[Tensor]) -> Sums:
        """Return an object that sums the squares of gradients, which may be shards or empty."""

    @abstractmethod
    def products(self, stacks: Sequence[Stack]) -> Products:
        """Return an object that multiplies each stack's updates ``row * grad * col`` by vectors."""

    def packed_products(
        self,
        grads: Sequence[Tensor],  # noqa: ARG002 - part of the contract
        scales: Sequence[Scales],  # noqa: ARG002
        shared: Shared,  # noqa: ARG002
    ) -> PackedProducts | None:
        """Return products of updates ``row * grad * col`` with vectors in one packed tensor.

        Returns None if the backend cannot do so for these gradients; `products` accepts all
        gradients.
        """
        return None

    def are_finite(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return ``(len(tensors),)`` bool: whether all entries of each tensor are finite.

        The tensors have any shape, but are not empty. The result is on their device. Takes no
        scratch memory, and does not wait for the device.
        """
        return all_finite(tensors)

    @abstractmethod
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
        """Set each parameter to ``keep * param + step * row * grad * col``, rounded once.

        Args:
            params: Parameters ``(..., m, n)``.
            grads: Their gradients.
            scales: Their scales. `CorrectedScales` replace ``row * grad * col`` by the update that
                they define.
            keep: Factor of the parameter; `Cautious` for one that depends on the step's direction.
            step: Factor of the update.
            allowed: A 0-dim bool for each parameter, on its device. If it is False, the parameter
                is left unchanged, whatever the gradient contains.
            keys: A 0-dim int64 for each parameter, on its device. If keys are given, bfloat16
                parameters are rounded stochastically, by the bits of `sinkgd.kernels.rounding`.
        """

    def descend_(
        self,
        matrices: Matrices,
        num_iters: int,
        *,
        keep: Keep,
        step: float | Tensor,
        tol: float | None = None,
        overflow: Tensor | None = None,
    ) -> Descent:
        """Find all scales as `scales` does, then update as `update_` does.

        All matrices of an owner are updated, or none if one of their gradients is not finite.
        Nothing is updated if ``overflow``, a 0-dim bool on the device of the matrices, is True.
        """
        scales = self.scales(matrices.grads, num_iters, tol=tol, starts=matrices.starts)
        descent = Descent(finite_of(scales, matrices.ranges), scales)
        take_steps(
            self, matrices, descent.finite, descent.scales, keep=keep, step=step, overflow=overflow
        )
        return descent


def take_steps(
    backend: Backend,
    matrices: Matrices,
    finite: Tensor,
    scales: Sequence[Scales | CorrectedScales],
    *,
    keep: Keep,
    step: float | Tensor,
    overflow: Tensor | None = None,
) -> None:
    """Update parameters by known scales. Skip owners with a gradient that is not finite.

    If ``overflow`` is True, skip all owners.
    """
    allowed = finite if overflow is None else finite & ~overflow
    all_allowed = overflow is None and _known_to_be_all(finite)
    backend.update_(
        matrices.params,
        matrices.grads,
        scales,
        keep=keep,
        step=step,
        allowed=None if all_allowed else of_each(allowed, matrices.ranges),
        keys=matrices.keys,
    )


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return ``(len(tensors),)`` bool: whether all entries of each tensor are finite.

    The largest magnitude decides. It is exact in every dtype, and NaN if an entry is NaN. On a GPU
    this takes a few kernels for all tensors of one dtype.
    """
    zero = tensors[0].new_zeros(())
    peaks = [zero] * len(tensors)  # an empty tensor counts as finite
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(tensors):
        if x.numel() > 0:
            by_dtype.setdefault(x.dtype, []).append(i)
    with torch.no_grad():
        for own in by_dtype.values():
            found = torch._foreach_norm([tensors[i] for i in own], ord=torch.inf)
            for i, peak in zip(own, found, strict=True):
                peaks[i] = peak
        return torch.stack(peaks).isfinite()


def finite_of(scales: Sequence[Scales], ranges: Sequence[range]) -> Tensor:
    """Return ``(owners,)`` bool: whether all gradients of each owner are finite."""
    # A non-finite entry makes every column scale of its matrix non-finite.
    flags = all_finite([col for _, col in scales])
    return _all_of(flags, [len(own) for own in ranges])


def by_owner(flags: Sequence[Tensor], ranges: Sequence[range]) -> Tensor:
    """Return ``(owners,)`` bool: whether the 0-dim flags of all matrices of each owner are True."""
    return _all_of(torch.stack([*flags]), [len(own) for own in ranges])


def of_each(flags: Tensor, ranges: Sequence[range]) -> list[Tensor]:
    """Return for each matrix the flag of its owner."""
    return [flag for flag, own in zip(flags.unbind(), ranges, strict=True) for _ in own]


def _all_of(flags: Tensor, sizes: Sequence[int]) -> Tensor:
    """Reduce consecutive runs of ``flags``, of these sizes, to one flag each."""
    if len(flags) == len(sizes):
        return flags
    bad = torch.split((~flags).float(), list(sizes))
    return torch.stack(torch._foreach_norm(bad, ord=torch.inf)) == 0


def _known_to_be_all(flags: Tensor) -> bool:
    """Whether all flags are True and that is known without waiting for a device."""
    return flags.is_cpu and not torch.compiler.is_compiling() and bool(flags.all())


def select_owners(matrices: Matrices, selected: Sequence[bool]) -> Matrices:
    """Return the matrices of the owners for which ``selected`` is True."""
    if all(selected):
        return matrices
    kept = [own for own, take in zip(matrices.ranges, selected, strict=True) if take]
    indices = [i for own in kept for i in own]
    ends = list(accumulate(map(len, kept), initial=0))
    return Matrices(
        [matrices.params[i] for i in indices],
        [matrices.grads[i] for i in indices],
        [range(*pair) for pair in pairwise(ends)],
        matrices.starts and [matrices.starts[i] for i in indices],
        matrices.keys and [matrices.keys[i] for i in indices],
    )


def merge_descents(
    selected: Sequence[bool], matrices: Matrices, one: Descent, other: Descent
) -> Descent:
    """Merge the descents of the ``selected`` owners and of all others, in the order of owners."""
    flags = [iter(found.finite.unbind()) for found in (other, one)]
    scales = [iter(found.scales) for found in (other, one)]
    return Descent(
        torch.stack([next(flags[own]) for own in selected]),
        [
            next(scales[take])
            for own, take in zip(matrices.ranges, selected, strict=True)
            for _ in own
        ],
    )
