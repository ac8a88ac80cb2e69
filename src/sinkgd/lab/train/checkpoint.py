"""Checkpoints: every rank writes its shards, and any number of ranks can read them.

The files are those of `torch.distributed.checkpoint`. They are written to a folder whose
name ends in ``.partial``, and forced to the disk; the complete folder is then renamed. A `Saver`
writes checkpoints while training waits, or while training goes on.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils._pytree import tree_map_only

from sinkgd.lab.disk import remedy_of, sync_folder
from sinkgd.lab.models.lora import base_name
from sinkgd.lab.train.checkpoint_validation import (
    CHECKSUMS,
    CheckpointError,
    SafePlanner,
    SafeReader,
    UnsafeCheckpointError,
    checkpoints,
    checksums,
)
from sinkgd.lab.train.state import TrainingState
from sinkgd.lab.train.world import World

Content = dict[str, Any]  # a result of `TrainingState.as_dict`, or its "model" alone
_PARTIAL = ".partial"  # suffix of a folder that is being written


def save_checkpoint(
    folder: Path, content: Content, *, keep: int, world: World | None = None
) -> Path:
    """Write ``folder/step-…`` and delete all checkpoints but it and the ``keep`` - 1 before it.

    This is a collective call.

    Raises:
        CheckpointError: If the checkpoint cannot be written, e.g. on a full disk; no part of it is
            left.
    """
    world = World() if world is None else world
    path = folder / f"step-{content['progress']['step']:08d}"
    try:
        partial = world.from_first(lambda: _prepare_folder(path))
        _write(content, partial, world)
        sums = world.from_each(lambda: _own_checksums(partial, world))
        every = {name: value for part in sums for name, value in part.items()}
        world.from_first(lambda: _publish(partial, path, every, keep=keep))
    except (OSError, CheckpointException) as error:
        world.from_first(lambda: _discard(path))
        raise CheckpointError(
            f"cannot write checkpoint {path}: {_reason(error)}; {_remedy(error)}. "
            "The checkpoints before it are untouched"
        ) from error
    return path


def load_checkpoint(path: Path, state: TrainingState, world: World | None = None) -> None:
    """Read a valid checkpoint into ``state``; a collective call.

    Raises:
        CheckpointError: If the checkpoint belongs to another model or optimizer, or its metadata
            cannot be read.
        UnsafeCheckpointError: If loading the checkpoint could run code.
    """
    with _fitting(path):
        state.load_dict(_read(state.as_dict(), path, World() if world is None else world))


def load_weights(path: Path, model: nn.Module, world: World) -> None:
    """Read the weights of a valid checkpoint into a model, with or without adapters.

    A collective call. Adapters stay as they are.

    Raises:
        CheckpointError: If the checkpoint belongs to another model, or its metadata cannot be read.
        UnsafeCheckpointError: If loading it could run code.
    """
    own = get_model_state_dict(model)
    names = {name: base for name in own if (base := base_name(name)) is not None}
    with _fitting(path):
        content = _read({"model": {names[name]: own[name] for name in names}}, path, world)
        read = {name: content["model"][base] for name, base in names.items()}
        set_model_state_dict(model, read, options=StateDictOptions(strict=False))


def _read(content: Content, path: Path, world: World) -> Content:
    """Read the tensors that ``content`` holds, in place, and its other values."""
    with _quiet(world):
        reader = SafeReader(path)
        metadata = reader.read_metadata()  # its errors already have a message for the user
        # A run that was begun on a CPU has no state of a GPU's generator, and may continue on a
        # GPU. That generator then keeps the state that the run's seed gave it.
        if "random.cuda" not in metadata.state_dict_metadata:
            content.get("random", {}).pop("cuda", None)
        load(
            content,
            storage_reader=reader,
            planner=SafePlanner(),
            process_group=world.group,
            no_dist=world.size == 1,
        )
    return content


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Raise errors of loading a checkpoint as `CheckpointError`, with reason and remedy."""
    try:
        yield
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


def _prepare_folder(path: Path) -> Path:
    """Delete unfinished checkpoints and return an empty folder to write to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_behind in path.parent.glob(f"step-*{_PARTIAL}"):
        _clear(left_behind)
    partial = _partial_of(path)
    partial.mkdir()
    return partial


def _write(content: Content, folder: Path, world: World) -> None:
    with _quiet(world):
        save(
            content,
            storage_writer=FileSystemWriter(folder, sync_files=True),
            # The first rank saves values that all ranks hold, since its clock measures the run.
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            process_group=world.group,
            no_dist=world.size == 1,
        )


def _own_checksums(folder: Path, world: World) -> dict[str, str]:
    files = list(folder.glob(f"__{world.rank}_*"))
    return checksums([*files, folder / ".metadata"] if world.is_first else files)


def _publish(partial: Path, path: Path, sums: dict[str, str], *, keep: int) -> None:
    """Give a complete checkpoint its name, and delete all but it and the ``keep`` - 1 before it.

    Later checkpoints are those that the run could not resume from because they are damaged.

    Args:
        partial: Folder that holds the files.
        path: Final path of the checkpoint.
        sums: Checksums of all files.
        keep: Number of checkpoints to keep.
    """
    with (partial / CHECKSUMS).open("w", encoding="utf-8") as file:
        json.dump(sums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(partial)
    _clear(path)  # there may be an older, damaged checkpoint of the same step
    partial.rename(path)
    sync_folder(path.parent)
    found = checkpoints(path.parent)
    end = found.index(path) + 1
    for unneeded in (*found[end:], *found[: max(0, end - keep)]):
        _clear(unneeded)


def _clear(path: Path) -> None:
    """Delete the folder at ``path``; a file there is not from a run, so it is moved aside."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.rename(path.with_name(f"{path.name}.aside"))


def _partial_of(path: Path) -> Path:
    return path.with_name(f"{path.name}{_PARTIAL}")


def _discard(path: Path) -> None:
    """Delete the files of a checkpoint that could not be completed."""
    shutil.rmtree(_partial_of(path), ignore_errors=True)


def _reason(error: BaseException) -> str:
    """Describe an error; for one that the checkpoint library wrapped, describe its cause."""
    if isinstance(error, CheckpointException):
        return "; ".join(_reason(cause) for cause in _causes(error))
    return str(error) or repr(error)


def _remedy(error: BaseException) -> str:
    """Return the remedy of the first cause that has a known remedy."""
    causes = [cause for cause in (error, *_causes(error)) if isinstance(cause, OSError)]
    if not causes:  # torch's writer reports only that a file is too short
        return "make room there, or give another --out"
    remedies = (remedy for cause in causes if (remedy := remedy_of(cause)) is not None)
    return next(remedies, "give another --out")


def _unsafe_cause(error: BaseException) -> UnsafeCheckpointError | None:
    causes = _causes(error)
    return next((cause for cause in causes if isinstance(cause, UnsafeCheckpointError)), None)


def _causes(error: BaseException) -> list[BaseException]:
    """List the errors that the checkpoint library wrapped."""
    return [cause for cause, _ in getattr(error, "failures", {}).values()]


@contextmanager
def _quiet(world: World) -> Iterator[None]:
    """Silence torch's warning on every save and load of a single process."""
    with warnings.catch_warnings():
        if world.size == 1:
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


class Saver:
    """Writes the checkpoints of a run; every call is collective.

    Args:
        folder: Folder of the checkpoints.
        world: The ranks that write.
        keep: Number of checkpoints to keep.
        asynchronous: Whether to write a copy while training goes on. Leaving the context without
            an error waits until the copy is written.
    """

    def __init__(self, folder: Path, world: World, *, keep: int, asynchronous: bool) -> None:
        self._folder, self._keep = folder, keep
        self._asynchronous = asynchronous
        # The messages of the writing thread must not mix with those of training.
        self._world = world.with_own_group() if asynchronous else world
        self._running: Future[Path] | None = None

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint, or begin to write it, once the previous one is written.

        Raises:
            CheckpointError: If this checkpoint or the previous one cannot be written.
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
        """Wait for a checkpoint in progress; do not wait after an error: a rank may be lost."""
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
            except BaseException as error:  # noqa: BLE001  raised again by `_wait`
                future.set_exception(error)
            else:
                future.set_result(path)

        Thread(target=write, daemon=True).start()
        return future


def _copy(content: Content) -> Content:
    """Copy tensors to host memory; the rest of the state is a copy already."""
    copied: Content = tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), content)
    return copied
