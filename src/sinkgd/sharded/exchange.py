"""Sums over process groups, asked for side by side and sent together.

A computation that needs sums is a generator: it yields a vector and the group over which it is to
be added up, and goes on when that is done. Those that wait for one group share one message, so that
the number of messages is that of the longest computation and not of all.
"""

from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

Result = TypeVar("Result")


class Sum(NamedTuple):
    """A vector that is to be replaced by its sum over a group."""

    vector: Tensor
    group: ProcessGroup


Asking = Generator[Sum, None, Result]


def exchange(computations: Sequence[Asking[Result]], order: Iterable[ProcessGroup]) -> list[Result]:
    """Run computations to their ends, and return what they return.

    Every rank must give the same computations in the same order, as far as they share groups.

    Args:
        computations: What runs.
        order: The groups, in the order of their messages, round by round. The fewest rounds are
            needed where it is the order in which most computations ask.
    """
    groups = list(dict.fromkeys(order))
    results: dict[int, Result] = {}
    waiting: dict[int, Sum] = {}

    def go_on(i: int) -> None:
        try:
            waiting[i] = next(computations[i])
        except StopIteration as end:
            results[i] = end.value

    for i in range(len(computations)):
        go_on(i)
    while waiting:
        for group in groups:
            ready = sorted(i for i, asked in waiting.items() if asked.group is group)
            if ready:
                _add_up([waiting.pop(i).vector for i in ready], group)
            for i in ready:
                go_on(i)
    return [results[i] for i in range(len(computations))]


def _add_up(vectors: Sequence[Tensor], group: ProcessGroup) -> None:
    if len(vectors) == 1:
        all_reduce(vectors[0], group=group)
        return
    message = torch.cat(list(vectors))
    all_reduce(message, group=group)
    for vector, part in zip(vectors, torch.split(message, [len(v) for v in vectors]), strict=True):
        vector.copy_(part)
