"""The processes that train together, and what they tell each other besides tensors.

What is told here is small and travels over gloo. All of it is collective: every rank makes the same
calls in the same order.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sinkgd.lab.launch import launched_ranks
from sinkgd.lab.train.parallel.watch import Watch

T = TypeVar("T")


class World:
    """The ranks, and this one's number among them.

    Args:
        rank: This process, 0 for the first.
        size: How many there are.
        group: Of them all, over gloo; None for a process that is alone.
        watch: Finds those that are lost.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        group: dist.ProcessGroup | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.rank, self.size, self.group, self.watch = rank, size, group, watch

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes results."""
        return self.rank == 0

    def from_first(self, function: Callable[[], T]) -> T:
        """Call on the first rank alone. All return what it returned, or raise what it raised."""
        if self.group is None:
            return function()
        told: list[Any] = [_outcome(function) if self.is_first else None]
        dist.broadcast_object_list(told, src=0, group=self.group)
        result: T = _settle(told[0])
        return result

    def first_before_others(self, function: Callable[[], T]) -> T:
        """Call on the first rank, and then on the others, which find what it has made."""
        made: list[T] = []
        self.from_first(lambda: made.append(function()))
        return made[0] if self.is_first else function()

    def from_each(self, function: Callable[[], T]) -> list[T]:
        """Call on every rank. All return what each returned, or raise what the first one raised."""
        if self.group is None:
            return [function()]
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, _outcome(function), group=self.group)
        return [_settle(outcome) for outcome in told]

    def total(self, *numbers: float) -> list[float]:
        """Return the sum over all ranks of each number, in float64."""
        return self._reduce(numbers, dist.ReduceOp.SUM)

    def highest(self, number: int) -> int:
        """Return the largest of all ranks' numbers."""
        return int(self._reduce([number], dist.ReduceOp.MAX)[0])

    def another(self) -> "World":
        """Return the same ranks with messages of their own, for another thread."""
        if self.group is None:
            return self
        return World(self.rank, self.size, dist.new_group(backend="gloo"), self.watch)

    def explain(self, error: Exception) -> Exception:
        """Return the reason for an error: the loss of a rank, where that is what it comes from."""
        return error if self.watch is None else self.watch.explain(error)

    def _reduce(self, numbers: Any, operation: dist.ReduceOp.RedOpType) -> list[float]:
        values = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        if self.group is not None:
            dist.all_reduce(values, operation, group=self.group)
        found: list[float] = values.tolist()
        return found


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Join the other processes that torchrun started; without torchrun a process is alone.

    A process group that is there already is used, and left there.

    Args:
        device: What this rank computes on.
    """
    found = dist.is_initialized()
    if (dist.get_world_size() if found else launched_ranks()) == 1:
        yield World()
        return
    if not found:
        _start_process_group(device)
    world = World(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))
    with Watch.of(world.rank, world.from_each) as watch:
        world.watch = watch
        yield world
        watch.wait_for_all()
    if not found:
        dist.destroy_process_group()


def _start_process_group(device: torch.device) -> None:
    store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    # torchrun's store outlives a restart (torch 2.13), and the addresses of ranks that are gone lie
    # there: each start has keys of its own.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"start {start}", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
    )


def _outcome(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:  # noqa: BLE001  all ranks raise it
        return None, error


def _settle(outcome: tuple[T, Exception | None]) -> T:
    result, error = outcome
    if error is not None:
        raise error
    return result
