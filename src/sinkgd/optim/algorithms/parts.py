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
