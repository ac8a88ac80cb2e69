"""The matrices of some parameters, whole or in pieces: what a backend is given.

A DTensor lies in pieces on a mesh of devices. A rank sees its own piece as matrices, and each has
its place among the pieces of others.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from sinkgd.optim.algorithms.contract import Slot, on_mesh
from sinkgd.optim.algorithms.layout import Split, matrices_of

if TYPE_CHECKING:
    from sinkgd.sharded import Place


class Part(NamedTuple):
    """A matrix, or a batch of them, of a parameter."""

    param: Tensor  # (..., m, n), a view
    grad: Tensor
    first_entry: int  # its place among all entries of the parameter
    place: "Place | None" = None  # how it lies on a mesh, if it does

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the whole matrix."""
        if self.place is not None:
            return self.place.rows, self.place.cols
        return self.param.shape[-2], self.param.shape[-1]

    def turned(self) -> "Part":
        """Return it with rows and columns exchanged."""
        place = None if self.place is None else self.place.turned()
        return Part(self.param.mT, self.grad.mT, self.first_entry, place)


class Parts(NamedTuple):
    """The parts of some parameters, one after the other."""

    parts: list[Part]
    owners: list[range]  # of each parameter, which of them are its own


def parts_of(slots: Sequence[Slot], *, layout: str, split: Split) -> Parts:
    """List the parts of parameters of which all or none lie on a mesh."""
    parts: list[Part] = []
    owners: list[range] = []
    for slot in slots:
        first = len(parts)
        if on_mesh(slot.param):
            # It imports torch.distributed, which takes longer than all the rest.
            from sinkgd.optim.algorithms.pieces import pieces_of  # noqa: PLC0415

            parts += pieces_of(slot, layout=layout, split=split)
        else:
            entries = 0
            for param, grad in matrices_of(slot.param, slot.grad, layout=layout, split=split):
                parts.append(Part(param, grad, entries))
                entries += param.numel()
        owners.append(range(first, len(parts)))
    return Parts(parts, owners)


def first_entry_of(param: Tensor, layout: str) -> int:
    """Return what the first entry that this rank holds counts as, for random bits."""
    if not on_mesh(param) or param.ndim < 2:
        return 0
    from sinkgd.optim.algorithms import pieces  # noqa: PLC0415 - see parts_of

    return pieces.first_entry_of(param, layout)


def lying_as(param: Tensor, piece: Tensor) -> Tensor:
    """Return what lies as ``param`` does, and of which this rank holds ``piece``."""
    if not on_mesh(param):
        return piece
    from sinkgd.optim.algorithms import pieces  # noqa: PLC0415 - see parts_of

    return pieces.lying_as(param, piece)


def spread_columns(param: Tensor, row_dim: int, numbers: Tensor) -> Tensor:
    """Return ``numbers``, which all ranks have, lying as ``param`` does but for its rows."""
    if not on_mesh(param):
        return numbers
    from sinkgd.optim.algorithms import pieces  # noqa: PLC0415 - see parts_of

    return pieces.spread_columns(param, row_dim, numbers)
