"""The tempered update of matrices and vectors that lie in pieces: only sums travel."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup

from sinkgd.exchange import Steps, computation, sums_in_turn
from sinkgd.sharded.place import Place
from sinkgd.tempered import tempering

Groups = Sequence[ProcessGroup]


class Spread(NamedTuple):
    """Over which groups the sums of a matrix or a vector are added up."""

    row: Groups = ()
    column: Groups = ()
    all: Groups = ()


def spread_of(place: Place) -> Spread:
    """Return the groups of a matrix, or of a batch of them."""
    return Spread(place.row_groups, place.col_groups, (*place.row_groups, *place.col_groups))


@computation
def temper_piece(
    grad: Tensor, spread: Spread, tau: float, num_iters: int, *, eps: float
) -> Steps[Tensor]:
    """Temper this rank's piece of a gradient; a computation for `exchange`.

    Of a matrix it asks for ``num_iters`` vectors a group, one number a row or column of the piece,
    and for two numbers at the end.
    """
    steps = tempering(grad, tau, num_iters, eps=eps)
    try:
        sums = next(steps)
        while True:
            groups: Groups = getattr(spread, sums.over)
            flat = sums.numbers.double().flatten()
            yield from sums_in_turn(flat, groups, spread.column if sums.over == "row" else ())
            whole = flat.view(sums.numbers.shape).to(sums.numbers.dtype)
            sums = steps.send(whole if groups else sums.numbers)
    except StopIteration as end:
        update: Tensor = end.value
        return update
