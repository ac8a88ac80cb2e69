"""Numbers of which each rank knows its own part, made known to all that hold the others."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sinkgd.sharded.exchange import Asking, Sum, exchange


def add_up(numbers: Tensor, groups: Sequence[Sequence[ProcessGroup]]) -> Tensor:
    """Return the sums over ranks of numbers ``(k,)``.

    A collective call of one message a group, and of none where no number has a group.

    Args:
        numbers: What this rank knows.
        groups: Of each number, the process groups that it is added up over.
    """
    kinds: dict[tuple[ProcessGroup, ...], list[int]] = {}
    for i, own in enumerate(groups):
        kinds.setdefault(tuple(own), []).append(i)
    computations = [_add_up(numbers[members], kind) for kind, members in kinds.items()]
    order = _longest_first(kinds)
    total = torch.empty_like(numbers)
    for members, found in zip(kinds.values(), exchange(computations, order), strict=True):
        total[members] = found
    return total


def add_up_vectors(
    vectors: Sequence[Tensor], groups: Sequence[Sequence[ProcessGroup]]
) -> list[Tensor]:
    """Return the sums over ranks of tensors of any shapes, but of one dtype.

    A collective call, as `add_up` is. The vectors are used up.

    Args:
        vectors: What this rank knows.
        groups: Of each, the process groups that it is added up over.
    """
    flat = [vector.flatten() for vector in vectors]
    computations = [_add_up(own, of) for own, of in zip(flat, groups, strict=True)]
    found = exchange(computations, _longest_first(groups))
    return [total.view(vector.shape) for total, vector in zip(found, vectors, strict=True)]


def agree(flags: Tensor, groups: Sequence[Sequence[ProcessGroup]]) -> Tensor:
    """Return which flags ``(k,)`` are True on every rank; a collective call, as `add_up` is."""
    return add_up((~flags).double(), groups) == 0


def _longest_first(groups: Iterable[Sequence[ProcessGroup]]) -> list[ProcessGroup]:
    """Return an order of groups in which what asks for a part of them does not go ahead alone."""
    return [group for own in sorted(groups, key=len, reverse=True) for group in own]


def _add_up(numbers: Tensor, groups: Sequence[ProcessGroup]) -> Asking[Tensor]:
    for group in groups:
        yield Sum(numbers, group)
    return numbers
