"""Signs of life: every rank gives one now and then, and looks for those of the others.

A rank that died or hangs shows to the others as a broken connection, or not at all. Here it gets a
name, and its end is theirs: nobody waits for it forever. A rank that is only slow goes on giving
signs, for a thread of its own does that.
"""

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self

from torch.distributed import (  # type: ignore[attr-defined]
    DistError,
    PrefixStore,
    Store,
    TCPStore,
)

BEAT_SECONDS = 2.0  # between two signs of life
PATIENCE_SECONDS = 20.0  # without one, after which a rank is lost
GRACE_SECONDS = 5.0  # for the program to end by itself, once a rank is known to be lost
_POLL_SECONDS = 0.02
_FAILED = "failed: "
_LEAVING = "leaving"


class LostRankError(RuntimeError):
    """Another rank died, hangs or failed, with its name and the remedy."""


class Watch:
    """Finds lost ranks from a thread of its own, and ends this process if it cannot go on.

    Args:
        store: Where signs of life are left, one key a rank; each rank has left its first.
        rank: This one.
        names: Of all ranks, for people.
    """

    def __init__(self, store: Store, rank: int, names: Sequence[str]) -> None:
        self.last_words: Callable[[str], None] = lambda _: None  # before this process is ended
        self._store, self._rank, self._names = store, rank, names
        self._keys = [_key(other) for other in range(len(names))]
        self._found, self._ended = threading.Event(), threading.Event()
        self._lost = ""
        self._explained: Exception | None = None
        self._thread = threading.Thread(target=self._keep_watch, daemon=True)

    @classmethod
    def of(cls, rank: int, from_each: Callable[[Callable[[], str]], list[str]]) -> Self:
        """Watch over the ranks of torchrun, whose store outlives each of them.

        Args:
            rank: This one.
            from_each: Returns what every rank says.
        """
        server = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=PATIENCE_SECONDS),
        )
        # The store outlives runs, too: each has keys of its own.
        (run, *_) = from_each(lambda: uuid.uuid4().hex)
        store = PrefixStore(f"sinkgd/watch/{run}", server)
        store.set(_key(rank), "0")
        names = from_each(lambda: f"rank {rank} ({socket.gethostname()}, process {os.getpid()})")
        return cls(store, rank, names)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Look no longer."""
        self._ended.set()
        self._thread.join()

    def wait_for_all(self) -> None:
        """Wait until every rank has come here, after which none needs an answer of another.

        Not by a barrier of the process group: a rank that leaves first would break the connection
        on which another still waits.
        """
        self._store.add(_LEAVING, 1)
        while self._store.add(_LEAVING, 0) < len(self._names):
            time.sleep(_POLL_SECONDS)

    def explain(self, error: Exception) -> Exception:
        """Return the reason for an error: the loss of a rank, where that is what it comes from.

        Broken connections are waited with until the rank behind them is known. Other errors are
        this rank's own, and are told to the others.
        """
        if error is self._explained:
            return error
        self._explained = error
        if not (type(error) is RuntimeError or isinstance(error, DistError)):
            self._store.set(_key(self._rank), f"{_FAILED}{error}")
            return error
        self._found.wait(PATIENCE_SECONDS + 2 * BEAT_SECONDS)
        return LostRankError(self._lost) if self._lost else error

    def _keep_watch(self) -> None:
        beat, last_seen = 0, {}
        seen = [""] * len(self._names)
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                signs = self._exchange_signs(beat)
            except (RuntimeError, ConnectionError) as error:
                self._end(f"the first node is lost, for its store does not answer: {error}")
                return
            now = time.monotonic()
            for rank, sign in enumerate(signs):
                if sign != seen[rank]:
                    seen[rank], last_seen[rank] = sign, now
                if rank != self._rank and sign.startswith(_FAILED):
                    self._end(f"{self._names[rank]} {sign}")
                    return
                if rank != self._rank and now - last_seen[rank] > PATIENCE_SECONDS:
                    silence = f"it gave no sign of life for {PATIENCE_SECONDS:.0f} seconds"
                    self._end(f"{self._names[rank]} is lost: {silence}")
                    return

    def _exchange_signs(self, beat: int) -> list[str]:
        if not self._store.get(_key(self._rank)).decode().startswith(_FAILED):
            self._store.set(_key(self._rank), str(beat))
        return [sign.decode() for sign in self._store.multi_get(self._keys)]

    def _end(self, reason: str) -> None:
        self._lost = (
            f"{reason}. Steps since the last checkpoint are lost; the same command goes on from it"
        )
        self._found.set()
        if not self._ended.wait(GRACE_SECONDS):  # a rank that waits for a lost one waits forever
            self.last_words(self._lost)
            sys.stderr.write(f"error: {self._lost}\n")
            sys.stderr.flush()
            os._exit(1)


def _key(rank: int) -> str:
    return f"rank {rank}"
