"""Checkpoints: written beside, checked by checksums, named only when whole.

A checkpoint is a folder ``step-00000100`` of `torch.distributed.checkpoint` files, which another
number of ranks can read too, and ``checksums.json``. It is made under another name, forced to the
disk and then renamed, so that a folder of that name is a whole one, unless the disk damaged it
later: that is what the checksums are for.
"""

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from sinkgd.lab.disk import sync_folder
from sinkgd.lab.results import Memory
from sinkgd.lab.train.memory import measure_memory
from sinkgd.lab.train.optimizer_state import load_optimizer_state, optimizer_state

CHECKSUMS = "checksums.json"
_PARTIAL = ".partial"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, with the file and the remedy."""


@dataclass
class TrainingState:
    """All that a run needs to go on as if it had never stopped."""

    model: nn.Module
    optimizer: Optimizer
    step: int = 0  # steps taken
    seconds: float = 0.0  # of training
    wall_seconds: float = 0.0  # of everything, up to the checkpoint
    memory: Memory = field(default_factory=lambda: Memory(0, 0, 0, 0))  # the most of each part
    clock: float = field(default_factory=time.perf_counter)  # wall_seconds counts up to here

    def take_stock(self, device: torch.device) -> None:
        """Bring ``wall_seconds`` and ``memory`` up to now."""
        now = time.perf_counter()
        self.wall_seconds += now - self.clock
        self.clock = now
        held = measure_memory(self.model, self.optimizer, device)
        self.memory = Memory.largest([self.memory, held])

    def as_dict(self) -> dict[str, Any]:
        """Return the state; its tensors are the model's and the optimizer's own."""
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": optimizer_state(self.model, self.optimizer),
            "progress": {
                "step": self.step,
                "seconds": self.seconds,
                "wall_seconds": self.wall_seconds,
                "memory": asdict(self.memory),
            },
            "random": _random_state(),
        }

    def load_dict(self, content: dict[str, Any]) -> None:
        """Take over what `as_dict` returned."""
        set_model_state_dict(self.model, content["model"])
        load_optimizer_state(self.model, self.optimizer, content["optimizer"])
        progress = content["progress"]
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.wall_seconds = progress["wall_seconds"]
        self.memory = Memory(**progress["memory"])
        _set_random_state(content["random"])


@dataclass(frozen=True)
class Found:
    """The latest whole checkpoint, and why each later one was passed over."""

    path: Path
    damages: tuple[str, ...]


def save_checkpoint(folder: Path, state: TrainingState, *, keep: int) -> Path:
    """Write ``folder/step-…`` and delete all but the last ``keep`` checkpoints.

    Raises:
        CheckpointError: If it cannot be written, e.g. on a full disk; nothing of it is left.
    """
    path = folder / f"step-{state.step:08d}"
    partial = folder / f"{path.name}{_PARTIAL}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_partial(folder)
        with _one_process():
            writer = FileSystemWriter(partial, sync_files=True)
            save(state.as_dict(), storage_writer=writer, no_dist=True)
        _write_checksums(partial)
        _move_into_place(partial, path)
    except (OSError, RuntimeError, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"cannot write checkpoint {path}: {_reason(error)}. Make room there; "
            "the checkpoints before it are untouched"
        ) from error
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def load_checkpoint(path: Path, state: TrainingState) -> None:
    """Read a whole checkpoint into ``state``.

    Raises:
        CheckpointError: If it belongs to another model or optimizer.
    """
    content = state.as_dict()
    try:
        with _one_process():
            load(content, storage_reader=FileSystemReader(path), no_dist=True)
        state.load_dict(content)
    except (RuntimeError, ValueError, KeyError, CheckpointException) as error:
        raise CheckpointError(
            f"{path} does not fit this model and optimizer: {_reason(error)}. "
            "Give the configuration that wrote it, or another --out"
        ) from error


def latest_whole(folder: Path) -> Found | None:
    """Return the latest checkpoint whose checksums hold; None where there is no checkpoint.

    Raises:
        CheckpointError: If there are checkpoints, and every one is damaged.
    """
    damages: list[str] = []
    for path in reversed(_checkpoints(folder)):
        damage = find_damage(path)
        if damage is None:
            return Found(path, tuple(damages))
        damages.append(damage)
    if damages:
        raise CheckpointError(
            f"no whole checkpoint in {folder}: {'; '.join(damages)}. "
            f"Delete {folder} to begin again from the first step"
        )
    return None


def find_damage(path: Path) -> str | None:
    """Compare every file of a checkpoint with its checksum; name the first that differs."""
    try:
        checksums = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
        for name, expected in checksums.items():
            if _checksum(path / name) != expected:
                return f"{path / name} is damaged: its checksum differs"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (ValueError, AttributeError) as error:
        return f"{path / CHECKSUMS} is damaged: {error}"
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints, the oldest first; half-written ones are none."""
    return sorted(p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit())


def _remove_partial(folder: Path) -> None:
    for partial in folder.glob(f"*{_PARTIAL}"):
        shutil.rmtree(partial)


def _write_checksums(folder: Path) -> None:
    checksums = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    with (folder / CHECKSUMS).open("w", encoding="utf-8") as file:
        json.dump(checksums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _move_into_place(partial: Path, path: Path) -> None:
    sync_folder(partial)
    if path.exists():  # a damaged one that a resumed run has come to again
        shutil.rmtree(path)
    partial.rename(path)
    sync_folder(path.parent)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _reason(error: BaseException) -> str:
    """Say what went wrong; of a failure that the checkpoint library wrapped, the cause."""
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
        return "; ".join(_reason(cause) for cause in causes)
    return str(error) or repr(error)


@contextmanager
def _one_process() -> Iterator[None]:
    """Silence what torch says on every save and load that no process group takes part in."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
