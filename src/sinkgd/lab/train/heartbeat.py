"""Heartbeats between ranks, to detect ranks that are lost.

If a rank dies or is suspended, the other ranks see only a broken connection, or nothing at all.
Heartbeats identify the lost rank and end the other processes, so that none waits for it forever. A
separate thread sends them, so a rank does not count as lost if it is merely slow, or if only its
main thread hangs.
"""

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from torch.distributed import (  # type: ignore[attr-defined]
    DistError,
    PrefixStore,
    Store,
    TCPStore,
)

from sinkgd.lab.train.config import ConfigError

BEAT_SECONDS = 2.0  # time between two heartbeats
PATIENCE_SECONDS = 20.0  # a rank counts as lost after this time without a heartbeat
GRACE_SECONDS = 5.0  # time for the program to end by itself once a rank is known to be lost
_POLL_SECONDS = 0.05
_FAILED = "failed: "
_LEAVING = "leaving"


class LostRankError(RuntimeError):
    """Another rank died, is suspended or failed; the message names it and gives the remedy."""


@dataclass(frozen=True)
class Rank:
    """A rank, as messages describe it."""

    number: int
    host: str
    process: int

    def __str__(self) -> str:
        return f"rank {self.number} ({self.host}, process {self.process})"

    def is_gone(self) -> bool:
        """Whether the rank's process has ended; False if the process is on another host."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


class Heartbeat:
    """Detects lost or failed ranks in a separate thread, and then ends this process.

    The process first has 5 seconds to end by itself.

    Args:
        store: Holds the heartbeats, one key per rank; each rank has written its first heartbeat.
        own: Number of this rank.
        ranks: All ranks.
    """

    def __init__(self, store: Store, own: int, ranks: Sequence[Rank]) -> None:
        self.before_exit: Callable[[str], None] = lambda _: None  # called with the reason
        self._store, self._own, self._ranks = store, own, ranks
        self._found, self._ended = threading.Event(), threading.Event()
        self._lost: LostRankError | None = None
        self._explained: Exception | None = None
        # Keeps a heartbeat from replacing the report of a failure in the store.
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._monitor, daemon=True)

    @classmethod
    def connect(cls, own: int, from_each: Callable[[Callable[[], Any]], list[Any]]) -> Self:
        """Connect to the store of torchrun, which outlives all ranks.

        Args:
            own: Number of this rank.
            from_each: Calls a function on every rank and returns all results.

        Raises:
            ConfigError: If the environment does not give the address of the store.
        """
        host, port = _store_address()
        server = TCPStore(
            host,
            port,
            is_master=False,
            timeout=timedelta(seconds=PATIENCE_SECONDS),
        )
        # The store also outlives runs, so each run uses its own keys.
        first, *_ = from_each(lambda: uuid.uuid4().hex)
        store = PrefixStore(f"sinkgd/heartbeat/{first}", server)
        store.set(_key(own), "0")
        return cls(store, own, from_each(lambda: Rank(own, socket.gethostname(), os.getpid())))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the thread."""
        self._ended.set()
        self._thread.join()

    def wait_for_all(self) -> None:
        """Wait until every rank has called this; from then on no rank needs the other ranks.

        A barrier of the process group is not enough: a rank that leaves first would break the
        connection on which another rank still waits.
        """
        self._store.add(_LEAVING, 1)
        while self._store.add(_LEAVING, 0) < len(self._ranks):
            time.sleep(_POLL_SECONDS)

    def explain(self, error: Exception) -> Exception:
        """Return the cause of an error: a lost rank if there is one, else the error itself.

        A plain RuntimeError or a DistError may come from a broken connection, so for such an
        error this method waits until the lost rank is known, for at most 34 seconds. Any other
        error is this rank's own, and is reported to the other ranks.
        """
        if error is self._explained:
            return error
        if type(error) is RuntimeError or isinstance(error, DistError):
            self._explained = self._behind_broken_connection() or error
        else:
            with self._writing:
                self._explained = error
                self._store.set(_key(self._own), f"{_FAILED}{error}")
        return self._explained

    def _behind_broken_connection(self) -> LostRankError | None:
        # The monitoring thread itself may be late on a busy machine.
        deadline = time.monotonic() + 1.5 * PATIENCE_SECONDS + 2 * BEAT_SECONDS
        while not self._found.wait(_POLL_SECONDS) and time.monotonic() < deadline:
            for rank in self._ranks:
                if rank.is_gone():
                    return _loss(f"{rank} is lost: its process has ended")
        return self._lost

    def _monitor(self) -> None:
        seen = [("", time.monotonic())] * len(
            self._ranks
        )  # last heartbeat of each rank, and its time
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                beats = self._exchange_heartbeats(beat)
            except (RuntimeError, ConnectionError) as error:
                self._end(f"the first node is lost: its store does not answer: {error}")
                return
            now = time.monotonic()
            for i, received in enumerate(beats):
                if received != seen[i][0]:
                    seen[i] = received, now
            reason = self._reason(beats, [now - since for _, since in seen])
            if reason is not None:
                self._end(reason)
                return

    def _exchange_heartbeats(self, beat: int) -> list[str]:
        """Write a heartbeat, unless this rank has reported a failure; return those of all ranks."""
        keys = [_key(rank.number) for rank in self._ranks]
        with self._writing:
            if self._explained is None:
                self._store.set(keys[self._own], str(beat))
        return [received.decode() for received in self._store.multi_get(keys)]

    def _reason(self, beats: Sequence[str], silent_seconds: Sequence[float]) -> str | None:
        for rank, received, seconds in zip(self._ranks, beats, silent_seconds, strict=True):
            if rank.number == self._own:
                continue
            if received.startswith(_FAILED):
                return f"{rank} {received}"
            if seconds > PATIENCE_SECONDS:
                return f"{rank} is lost: it gave no sign of life for {seconds:.0f} seconds"
        return None

    def _end(self, reason: str) -> None:
        self._lost = _loss(reason)
        self._found.set()
        # Without an exit, this rank may wait forever for the lost rank.
        if not self._ended.wait(GRACE_SECONDS):
            try:
                self._report()
            finally:
                os._exit(1)

    def _report(self) -> None:
        lines = [f"error: {self._lost}\n"]
        try:
            self.before_exit(str(self._lost))
        except Exception as error:  # noqa: BLE001  the process has to end, e.g. on a full disk
            lines.append(f"error: the end of the run cannot be recorded: {error}\n")
        sys.stderr.writelines(lines)
        sys.stderr.flush()


def _store_address() -> tuple[str, int]:
    """Return host and port of torchrun's store."""
    names = ("MASTER_ADDR", "MASTER_PORT")
    absent = [name for name in names if name not in os.environ]
    if absent:
        raise ConfigError(
            f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not set in the "
            "environment, but ranks send their heartbeats to a store at that address; start them "
            "with torchrun, or set both to the address of a torch.distributed.TCPStore that "
            "outlives the ranks"
        )
    return os.environ[names[0]], int(os.environ[names[1]])


def _loss(reason: str) -> LostRankError:
    return LostRankError(
        f"{reason}. Steps since the last checkpoint are lost; the same command goes on from that "
        "checkpoint"
    )


def _key(rank: int) -> str:
    return f"rank {rank}"
