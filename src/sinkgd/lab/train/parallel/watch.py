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

BEAT_SECONDS = 2.0  # between two signs of life
PATIENCE_SECONDS = 20.0  # without one, after which a rank is lost
GRACE_SECONDS = 5.0  # for the program to end by itself, once a rank is known to be lost
_POLL_SECONDS = 0.05
_FAILED = "failed: "
_LEAVING = "leaving"


class LostRankError(RuntimeError):
    """Another rank died, hangs or failed, with its name and the remedy."""


@dataclass(frozen=True)
class Rank:
    """A rank, for people."""

    number: int
    host: str
    process: int

    def __str__(self) -> str:
        return f"rank {self.number} ({self.host}, process {self.process})"

    def is_gone(self) -> bool:
        """Whether its process has ended, as far as can be known: on this host."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


class Watch:
    """Finds lost ranks from a thread of its own, and ends this process if it cannot go on.

    Args:
        store: Where signs of life are left, one key a rank; each rank has left its first.
        own: Number of this rank.
        ranks: All of them.
    """

    def __init__(self, store: Store, own: int, ranks: Sequence[Rank]) -> None:
        self.last_words: Callable[[str], None] = lambda _: None  # before this process is ended
        self._store, self._own, self._ranks = store, own, ranks
        self._found, self._ended = threading.Event(), threading.Event()
        self._lost: LostRankError | None = None
        self._explained: Exception | None = None
        self._thread = threading.Thread(target=self._keep_watch, daemon=True)

    @classmethod
    def of(cls, own: int, from_each: Callable[[Callable[[], Any]], list[Any]]) -> Self:
        """Watch over the ranks of torchrun, whose store outlives each of them.

        Args:
            own: Number of this rank.
            from_each: Returns what every rank says.
        """
        server = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=PATIENCE_SECONDS),
        )
        # The store outlives runs, too: each has keys of its own.
        first, *_ = from_each(lambda: uuid.uuid4().hex)
        store = PrefixStore(f"sinkgd/watch/{first}", server)
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
        """Look no longer."""
        self._ended.set()
        self._thread.join()

    def wait_for_all(self) -> None:
        """Wait until every rank has come here, after which none needs an answer of another.

        Not by a barrier of the process group: a rank that leaves first would break the connection
        on which another still waits.
        """
        self._store.add(_LEAVING, 1)
        while self._store.add(_LEAVING, 0) < len(self._ranks):
            time.sleep(_POLL_SECONDS)

    def explain(self, error: Exception) -> Exception:
        """Return the reason for an error: the loss of a rank, where that is what it comes from.

        Where a connection broke, that waits until the rank behind it is known. Other errors are
        this rank's own, and are told to the others.
        """
        if error is self._explained:
            return error
        if type(error) is RuntimeError or isinstance(error, DistError):
            self._explained = self._behind_broken_connection() or error
        else:
            self._explained = error
            self._store.set(_key(self._own), f"{_FAILED}{error}")
        return self._explained

    def _behind_broken_connection(self) -> LostRankError | None:
        # The thread that looks may itself be late where a machine is busy.
        last_look = time.monotonic() + 1.5 * PATIENCE_SECONDS + 2 * BEAT_SECONDS
        while not self._found.wait(_POLL_SECONDS) and time.monotonic() < last_look:
            for rank in self._ranks:
                if rank.is_gone():
                    return _loss(f"{rank} is lost: its process has ended")
        return self._lost

    def _keep_watch(self) -> None:
        seen = [("", time.monotonic())] * len(self._ranks)  # of each rank, and since when
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                signs = self._exchange_signs(beat)
            except (RuntimeError, ConnectionError) as error:
                self._end(f"the first node is lost, for its store does not answer: {error}")
                return
            now = time.monotonic()
            for i, sign in enumerate(signs):
                if sign != seen[i][0]:
                    seen[i] = sign, now
            reason = self._reason(signs, [now - since for _, since in seen])
            if reason is not None:
                self._end(reason)
                return

    def _exchange_signs(self, beat: int) -> list[str]:
        """Leave a sign, unless this rank failed and said so; return all."""
        keys = [_key(rank.number) for rank in self._ranks]
        if self._explained is None:
            self._store.set(keys[self._own], str(beat))
        return [sign.decode() for sign in self._store.multi_get(keys)]

    def _reason(self, signs: Sequence[str], silent_seconds: Sequence[float]) -> str | None:
        for rank, sign, seconds in zip(self._ranks, signs, silent_seconds, strict=True):
            if rank.number == self._own:
                continue
            if sign.startswith(_FAILED):
                return f"{rank} {sign}"
            if seconds > PATIENCE_SECONDS:
                return f"{rank} is lost: it gave no sign of life for {seconds:.0f} seconds"
        return None

    def _end(self, reason: str) -> None:
        self._lost = _loss(reason)
        self._found.set()
        if not self._ended.wait(GRACE_SECONDS):  # a rank that waits for a lost one waits forever
            self.last_words(str(self._lost))
            sys.stderr.write(f"error: {self._lost}\n")
            sys.stderr.flush()
            os._exit(1)


def _loss(reason: str) -> LostRankError:
    return LostRankError(
        f"{reason}. Steps since the last checkpoint are lost; the same command goes on from it"
    )


def _key(rank: int) -> str:
    return f"rank {rank}"
