"""Sums across the ranks that hold pieces of the same parameters; computations for `exchange`."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sinkgd.exchange import Computation, Steps, computation, sums_in_turn


def add_up(numbers: Tensor, groups: Sequence[Sequence[ProcessGroup]]) -> Computation[Tensor]:
    """Return the sums over ranks of numbers ``(k,)``.

    One message a group, and none where no number has a group.

    Args:
        numbers: What this rank knows.
        groups: Of each number, the process groups that it is added up over.
    """
    kinds: dict[tuple[ProcessGroup, ...], list[int]] = {}
    for i, own in enumerate(groups):
        kinds.setdefault(tuple(own), []).append(i)
    if len(kinds) == 1:
        return _add_up(numbers.clone(), next(iter(kinds)))
    return _add_up_by_kinds(numbers, kinds)


@computation
def _add_up_by_kinds(
    numbers: Tensor, kinds: Mapping[tuple[ProcessGroup, ...], Sequence[int]]
) -> Steps[Tensor]:
    each = numbers.unbind()  # an index would have to travel to the device
    found = yield [_add_up(torch.stack([each[i] for i in own]), of) for of, own in kinds.items()]
    totals: dict[int, Tensor] = {}
    for places, sums in zip(kinds.values(), found, strict=True):
        totals.update(zip(places, sums.unbind(), strict=True))
    return torch.stack([totals[i] for i in range(len(numbers))])


@computation
def add_up_vectors(
    vectors: Sequence[Tensor], groups: Sequence[Sequence[ProcessGroup]]
) -> Steps[list[Tensor]]:
    """Return the sums over ranks of tensors of any shapes, but of one dtype.

    Messages as those of `add_up`. The vectors are used up.

    Args:
        vectors: What this rank knows.
        groups: Of each, the process groups that it is added up over.
    """
    flat = [vector.flatten() for vector in vectors]
    found = yield [_add_up(own, of) for own, of in zip(flat, groups, strict=True)]
    return [total.view(vector.shape) for total, vector in zip(found, vectors, strict=True)]


@computation
def agree(flags: Tensor, groups: Sequence[Sequence[ProcessGroup]]) -> Steps[Tensor]:
    """Return which flags ``(k,)`` are True on every rank; messages as those of `add_up`."""
    bad: Tensor = yield add_up((~flags).double(), groups)
    return bad == 0


@computation
def _add_up(numbers: Tensor, groups: Sequence[ProcessGroup]) -> Steps[Tensor]:
    yield from sums_in_turn(numbers, groups)
    return numbers
