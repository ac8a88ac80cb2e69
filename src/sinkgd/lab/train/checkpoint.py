"""Checkpoints: every rank writes its pieces, and any other number of ranks can read them.

The files are those of `torch.distributed.checkpoint`. They are written beside, forced to the disk,
and named when all of them are there. A `Saver` writes them at once, or while training goes on.
"""

import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils._pytree import tree_map_only

from sinkgd.lab.disk import remedy_of
from sinkgd.lab.train import whole
from sinkgd.lab.train.parallel import World
from sinkgd.lab.train.safe_reader import SafePlanner, SafeReader, UnsafeCheckpointError
from sinkgd.lab.train.state import TrainingState
from sinkgd.lab.train.whole import CheckpointError

Content = dict[str, Any]  # as of `TrainingState.as_dict`


def save_checkpoint(
    folder: Path, content: Content, *, keep: int, world: World | None = None
) -> Path:
    """Write ``folder/step-…`` and delete all but the last ``keep`` checkpoints.

    A collective call.

    Raises:
        CheckpointError: If it cannot be written, e.g. on a full disk; nothing of it is left.
    """
    world = World() if world is None else world
    path = folder / f"step-{content['progress']['step']:08d}"
    try:
        partial = world.from_first(lambda: whole.begin(path))
        _write(content, partial, world)
        sums = world.from_each(lambda: _own_checksums(partial, world))
        every = {name: value for part in sums for name, value in part.items()}
        world.from_first(lambda: whole.finish(partial, path, every, keep=keep))
    except (OSError, CheckpointException) as error:
        world.from_first(lambda: whole.abandon(path))
        raise CheckpointError(
            f"cannot write checkpoint {path}: {_reason(error)}; {_remedy(error)}. "
            "The checkpoints before it are untouched"
        ) from error
    return path


def load_checkpoint(path: Path, state: TrainingState, world: World | None = None) -> None:
    """Read a whole checkpoint into ``state``; a collective call.

    Raises:
        CheckpointError: If it belongs to another model or optimizer.
        UnsafeCheckpointError: If loading it could run code.
    """
    world = World() if world is None else world
    content = state.as_dict()
    try:
        with _quiet(world):
            reader = SafeReader(path)
            reader.read_metadata()  # what is refused here has a message of its own
            load(
                content,
                storage_reader=reader,
                planner=SafePlanner(),
                process_group=world.group,
                no_dist=world.size == 1,
            )
        state.load_dict(content)
    except CheckpointError:
        raise
    except (RuntimeError, ValueError, KeyError, CheckpointException) as error:
        if (unsafe := _unsafe_cause(error)) is not None:
            raise UnsafeCheckpointError(
                f"{path} is refused: {unsafe}. Do not use it unless you trust its source; give "
                "another --out"
            ) from error
        raise CheckpointError(
            f"{path} does not fit this model and optimizer: {_reason(error)}. "
            "Give the configuration that wrote it, or another --out"
        ) from error


def _write(content: Content, folder: Path, world: World) -> None:
    with _quiet(world):
        save(
            content,
            storage_writer=FileSystemWriter(folder, sync_files=True),
            # What all ranks hold alike is the first one's, whose clock is the run's.
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            process_group=world.group,
            no_dist=world.size == 1,
        )


def _own_checksums(folder: Path, world: World) -> dict[str, str]:
    files = list(folder.glob(f"__{world.rank}_*"))
    return whole.checksums([*files, folder / ".metadata"] if world.is_first else files)


def _reason(error: BaseException) -> str:
    """Say what went wrong; of a failure that the checkpoint library wrapped, the cause."""
    if isinstance(error, CheckpointException):
        return "; ".join(_reason(cause) for cause in _causes(error))
    return str(error) or repr(error)


def _remedy(error: BaseException) -> str:
    """Say what to do about the first cause that tells."""
    causes = [cause for cause in (error, *_causes(error)) if isinstance(cause, OSError)]
    if not causes:  # torch's writer of tensors says no more than that a file became too short
        return "make room there, or give another --out"
    remedies = (remedy for cause in causes if (remedy := remedy_of(cause)) is not None)
    return next(remedies, "give another --out")


def _unsafe_cause(error: BaseException) -> UnsafeCheckpointError | None:
    causes = _causes(error)
    return next((cause for cause in causes if isinstance(cause, UnsafeCheckpointError)), None)


def _causes(error: BaseException) -> list[BaseException]:
    """List what the checkpoint library wrapped."""
    return [cause for cause, _ in getattr(error, "failures", {}).values()]


@contextmanager
def _quiet(world: World) -> Iterator[None]:
    """Silence what torch says on every save and load of a process that is alone."""
    with warnings.catch_warnings():
        if world.size == 1:
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


class Saver:
    """Writes the checkpoints of a run; every call is collective.

    Args:
        folder: Of the checkpoints.
        world: The ranks that write.
        keep: How many checkpoints there may be.
        asynchronous: Whether to write a copy while training goes on. Leaving waits for it.
    """

    def __init__(self, folder: Path, world: World, *, keep: int, asynchronous: bool) -> None:
        self._folder, self._keep = folder, keep
        self._asynchronous = asynchronous
        # The thread's messages must not mix with those of training.
        self._world = world.another() if asynchronous else world
        self._running: Future[Path] | None = None

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint, or begin to, after the one before is written.

        Raises:
            CheckpointError: If this one, or the one before, cannot be written.
        """
        self._wait()
        if self._asynchronous:
            self._running = self._begin(_copy(state.as_dict()))
        else:
            save_checkpoint(self._folder, state.as_dict(), keep=self._keep, world=self._world)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for what is being written, unless something went wrong: a rank may be lost."""
        if error is None:
            self._wait()

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _begin(self, content: Content) -> "Future[Path]":
        future: Future[Path] = Future()

        def write() -> None:
            try:
                path = save_checkpoint(self._folder, content, keep=self._keep, world=self._world)
            except BaseException as error:  # noqa: BLE001  whoever waits raises it
                future.set_exception(error)
            else:
                future.set_result(path)

        Thread(target=write, daemon=True).start()
        return future


def _copy(content: Content) -> Content:
    """Copy tensors to the memory of the host; the rest of the state is a copy already."""
    copied: Content = tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), content)
    return copied
