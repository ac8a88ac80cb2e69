"""The processes that train together, and the small messages they exchange besides tensors.

Messages travel over gloo. Every method of `World` that sends messages is collective: all ranks
make the same calls in the same order.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sinkgd.lab.launch import launched_ranks
from sinkgd.lab.train.heartbeat import Heartbeat

T = TypeVar("T")

# Others wait for a slow rank, such as the first while it prepares a large text, which may take
# longer than torch's default of 30 minutes. Lost ranks are detected by their heartbeats.
_TIMEOUT = timedelta(days=365)


class World:
    """The ranks that train together, and the number of this rank.

    Args:
        rank: Number of this process, from 0.
        size: Number of ranks.
        group: Process group of all ranks, over gloo; None for a single process.
        heartbeat: Detects lost ranks; None for a single process.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        group: dist.ProcessGroup | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.rank, self.size, self.group, self.heartbeat = rank, size, group, heartbeat

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes results."""
        return self.rank == 0

    def from_first(self, function: Callable[[], T]) -> T:
        """Call a function on the first rank; on all ranks, return its result or raise its error."""
        if self.group is None:
            return function()
        sent: list[Any] = [_outcome(function) if self.is_first else None]
        dist.broadcast_object_list(sent, src=0, group=self.group)
        result: T = _unwrap(sent[0])
        return result

    def first_before_others(self, function: Callable[[], T]) -> T:
        """Call a function on the first rank, then on the others; return each rank's own result.

        The later calls can use what the first call made, such as files.
        """
        made: list[T] = []
        self.from_first(lambda: made.append(function()))
        return made[0] if self.is_first else function()

    def from_each(self, function: Callable[[], T]) -> list[T]:
        """Call a function on every rank; on each, return all results, or raise the first error."""
        if self.group is None:
            return [function()]
        sent: list[Any] = [None] * self.size
        dist.all_gather_object(sent, _outcome(function), group=self.group)
        return [_unwrap(outcome) for outcome in sent]

    def total(self, *numbers: float) -> list[float]:
        """Return the sum of each number over all ranks, in float64."""
        return self._reduce(numbers, dist.ReduceOp.SUM)

    def highest(self, number: int) -> int:
        """Return the largest of all ranks' numbers."""
        return int(self._reduce([number], dist.ReduceOp.MAX)[0])

    def with_own_group(self) -> "World":
        """Return the same ranks with a separate process group, for another thread."""
        if self.group is None:
            return self
        return World(self.rank, self.size, _new_group(), self.heartbeat)

    def explain(self, error: Exception) -> Exception:
        """Return the cause of an error: a lost rank if there is one, else the error itself."""
        return error if self.heartbeat is None else self.heartbeat.explain(error)

    def _reduce(self, numbers: Any, operation: dist.ReduceOp.RedOpType) -> list[float]:
        values = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        if self.group is not None:
            dist.all_reduce(values, operation, group=self.group)
        found: list[float] = values.tolist()
        return found


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Join the other processes that torchrun started; without torchrun this process is alone.

    An existing process group is used and not destroyed.

    Args:
        device: Device of this rank.

    Raises:
        ConfigError: If there are several processes, and MASTER_ADDR or MASTER_PORT is not set.
    """
    found = dist.is_initialized()
    if (dist.get_world_size() if found else launched_ranks()) == 1:
        yield World()
        return
    if not found:
        _start_process_group(device)
    world = World(dist.get_rank(), dist.get_world_size(), _new_group())
    with Heartbeat.connect(world.rank, world.from_each) as heartbeat:
        world.heartbeat = heartbeat
        yield world
        heartbeat.wait_for_all()
    if not found:
        dist.destroy_process_group()


def _start_process_group(device: torch.device) -> None:
    store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    # torchrun's store outlives a restart (torch 2.13) and keeps the addresses of ranks that are
    # gone, so each start uses its own keys.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"start {start}", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
    )


def _new_group() -> dist.ProcessGroup:
    """Return a new process group of all ranks, for messages."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    return group


def _outcome(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:  # noqa: BLE001  raised on all ranks
        return None, error


def _unwrap(outcome: tuple[T, Exception | None]) -> T:
    result, error = outcome
    if error is not None:
        raise error
    return result
