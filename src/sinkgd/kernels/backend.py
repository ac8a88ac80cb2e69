"""The contract of every backend of SR-Sinkhorn, and the choice among them.

A backend reads a list of gradients into scales, and writes a list of parameters from gradients and
scales; or it does both at once. It is given whole lists so that it may batch small matrices or run
all in one launch.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sinkgd.deflation import LowRank, PackedProducts, Products


class Scales(NamedTuple):
    """The pair for which ``row * grad * col`` is multi-normalized, in float32 or float64."""

    row: Tensor  # r, (..., m, 1)
    col: Tensor  # c, (..., 1, n)

    @property
    def mT(self) -> "Scales":  # noqa: N802 - as of a tensor
        """Those of the matrix with rows and columns exchanged."""
        return Scales(self.col.mT, self.row.mT)


class Lowered(NamedTuple):
    """Scales, and what is to be taken away from ``row * grad * col``, or that times a factor."""

    row: Tensor  # (..., m, 1)
    col: Tensor  # (..., 1, n)
    taken: LowRank  # (..., m, n), float32 or float64
    factor: Tensor | None = None  # (..., 1, 1), as the scales

    @property
    def mT(self) -> "Lowered":  # noqa: N802 - as of a tensor
        """The same of the matrix with rows and columns exchanged."""
        return Lowered(self.col.mT, self.row.mT, self.taken.mT, self.factor)


class Matrices(NamedTuple):
    """Parameters seen as matrices, and what belongs to each matrix: lists of one length."""

    params: Sequence[Tensor]  # (..., m, n)
    grads: Sequence[Tensor]
    owners: Sequence[range]  # of each parameter, which of these are it; in order, and all
    starts: Sequence[Tensor | None] | None = None  # as in `Backend.scales`
    keys: Sequence[Tensor] | None = None  # as in `Backend.update_`


class Stack(NamedTuple):
    """Gradients of one shape and dtype that lie alike in memory; together ``(s, ..., m, n)``."""

    grads: Sequence[Tensor]  # s of them, (..., m, n)
    scales: Sequence[Scales]


class Shared(NamedTuple):
    """Vectors that some gradients share."""

    vectors: Tensor  # (entries, k) float64, on the host; it does not change
    first: tuple[int, ...]  # of each gradient, where those of its columns begin


class Descent(NamedTuple):
    """What a step along normalized gradients leaves behind."""

    finite: Tensor  # (owners,) bool: whether the gradients of each hold finite numbers alone
    scales: Sequence[Scales]  # one a gradient


class Sums(Protocol):
    """Sums of the squares of some gradients ``(..., m, n)``, to be asked for again and again.

    Weights and sums are flat, float64: those of one gradient after those of the other.
    """

    def of_rows(self, weights: Tensor) -> Tensor:
        """Return G² c² of each: of its rows, from weights c² of its columns."""
        ...

    def of_cols(self, weights: Tensor) -> Tensor:
        """Return (G²)ᵀ r² of each: of its columns, from weights r² of its rows."""
        ...


class Backend(Protocol):
    """What a backend does; `eager` is its definition in plain torch."""

    name: str
    package: str  # that it runs on
    install: str  # the command that brings it where it is absent

    @property
    def packs_vectors(self) -> bool:
        """Whether it has `packed_products`, and lowers updates without a copy of a gradient."""
        ...

    def missing(self) -> str | None:
        """Say why it cannot run in this environment, or None where it can."""
        ...

    def supports(self, device: torch.device) -> bool:
        """Whether it runs on tensors of ``device``."""
        ...

    def scales(
        self,
        grads: Sequence[Tensor],
        num_iters: int,
        *,
        tol: float | None = None,
        starts: Sequence[Tensor | None] | None = None,
    ) -> list[Scales]:
        """Run ``num_iters`` iterations on each gradient ``(..., m, n)``. Gradients are only read.

        A non-finite entry makes every column scale of its matrix non-finite.

        Where ``tol`` is given, a matrix is left after the first iteration, from its second on, that
        moves no row scale by more than ``tol``, relative to what it was; a factor common to all,
        which zero rows and columns bring about, is no movement.

        Where ``starts`` are given, one a gradient or None for ones, iterations begin from these
        column scales ``(..., 1, n)`` instead of 1: float32 or float64 as the scales are, in (0, 1],
        contiguous.
        """
        ...

    def sums(self, grads: Sequence[Tensor]) -> Sums:
        """Return the sums of the squares of gradients, which may be pieces, and empty."""
        ...

    def products(self, stacks: Sequence[Stack]) -> Products:
        """Return the products of the updates ``row * grad * col`` of each stack."""
        ...

    def packed_products(
        self, grads: Sequence[Tensor], scales: Sequence[Scales], shared: Shared
    ) -> PackedProducts | None:
        """Return the products of updates ``row * grad * col`` with vectors packed together.

        None where it has no such products of these gradients; `products` has some of all.
        """
        ...

    def are_finite(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return ``(len(tensors),)`` bool, on their device: whether each is finite throughout.

        Of any shape but empty; no scratch, and no wait on a device.
        """
        ...

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
        """Set each parameter to ``keep * param + step * row * grad * col``, rounded once.

        Of `Lowered` scales what is taken is subtracted from ``row * grad * col``, times the factor
        where there is one.

        Where ``allowed`` is given, a 0-dim bool a parameter on its device, False leaves the
        parameter as it is, whatever the gradient holds.

        Where ``keys`` are given, a 0-dim int64 a parameter on its device, a bfloat16 parameter is
        rounded up or down at random, by the bits of `sinkgd.kernels.rounding`.
        """
        ...

    def descend_(
        self,
        matrices: Matrices,
        num_iters: int,
        *,
        keep: float | Tensor,
        step: float | Tensor,
        tol: float | None = None,
        overflow: Tensor | None = None,
    ) -> Descent:
        """Do what `scales` and `update_` do, where the gradient is finite.

        The matrices of one owner are written together or, where a gradient of theirs is not finite,
        not at all. Nothing is written where ``overflow``, a 0-dim bool on their device, is True.
        """
        ...
