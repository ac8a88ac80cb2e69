"""Finding complete and undamaged checkpoints, and reading them without running code in them.

A checkpoint is a folder such as ``step-00000100`` that was written under another name and renamed
when complete. Its ``checksums.json`` holds the SHA-256 of every other file, because a disk may
damage files later.

torch's own reader and planner unpickle ``.metadata`` and all values that are not tensors, and
allow every class there, so a checkpoint from somebody else could run any code. Here ``.metadata``
may name only the classes that torch's writer puts there, and dtypes. Every value is loaded with
``weights_only=True``.
"""

import errno
import hashlib
import io
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from sinkgd.lab.disk import is_special, parse_json

CHECKSUMS = "checksums.json"
METADATA = ".metadata"  # file name of torch's writer
_NAME = re.compile(r"step-([0-9]{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message gives the file and the remedy."""


@dataclass(frozen=True)
class ValidCheckpoint:
    """The latest valid checkpoint, and what is wrong with each later checkpoint."""

    path: Path
    damages: tuple[str, ...]


def latest_valid(folder: Path) -> ValidCheckpoint | None:
    """Return the latest checkpoint whose checksums match; None if there is no checkpoint at all.

    Raises:
        CheckpointError: If there are checkpoints and all are damaged.
    """
    damages: list[str] = []
    for path in reversed(checkpoints(folder)):
        damage = find_damage(path)
        if damage is None:
            return ValidCheckpoint(path, tuple(damages))
        damages.append(damage)
    if damages:
        raise CheckpointError(
            f"no undamaged checkpoint in {folder}: {'; '.join(damages)}. "
            f"Delete {folder} to begin again from the first step"
        )
    return None


def find_damage(path: Path) -> str | None:
    """Compare files with their checksums; describe the first damage, or return None."""
    file = path / CHECKSUMS
    try:
        sums = parse_json(_regular_file(file).read_bytes())
        if METADATA not in sums:
            return f"{path / CHECKSUMS} is damaged: it lacks {METADATA}"
        for name, expected in sums.items():
            if name != Path(name).name:
                return f"{path / CHECKSUMS} is damaged: {name!r} lies outside of the checkpoint"
            file = path / name
            if _checksum(_regular_file(file)) != expected:
                return f"{file} is damaged: its checksum differs"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    except (ValueError, AttributeError, TypeError) as error:
        return f"{path / CHECKSUMS} is damaged: {error}"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """List the folders of complete checkpoints in the order of their steps."""
    found = {path: _NAME.fullmatch(path.name) for path in folder.glob("step-*") if path.is_dir()}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=steps.__getitem__)


def checksums(files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file, by name."""
    return {path.name: _checksum(path) for path in sorted(files)}


def _regular_file(path: Path) -> Path:
    """Return ``path``; refuse a pipe or a device there, because reading it may never end."""
    if is_special(path):
        raise OSError(errno.EINVAL, "it is not a regular file")
    return path


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
# The classes that torch's writer (2.6 to 2.13) names in .metadata, besides dtypes.
_ALLOWED = frozenset(
    {
        (_METADATA_MODULE, "BytesStorageMetadata"),
        (_METADATA_MODULE, "ChunkStorageMetadata"),
        (_METADATA_MODULE, "Metadata"),
        (_METADATA_MODULE, "MetadataIndex"),
        (_METADATA_MODULE, "StorageMeta"),
        (_METADATA_MODULE, "TensorProperties"),
        (_METADATA_MODULE, "TensorStorageMetadata"),
        (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
    }
)
# Classes of a path: torch's writer stores the path of its folder, which is never opened here.
_PATHS = frozenset(
    (module, name)
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
)


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint contains more than tensors and plain values, or names a file outside it."""


class SafeReader(FileSystemReader):
    """`FileSystemReader` that refuses metadata with unknown classes or files outside its folder.

    Args:
        path: The checkpoint's folder.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._folder = path

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        """Return the checkpoint's description of its tensors and files.

        Raises:
            UnsafeCheckpointError: If the description is not torch's `Metadata`, or names a class
                outside the allow-list or a file outside the checkpoint.
            CheckpointError: If the description cannot be read.
        """
        path = self._folder / METADATA
        with path.open("rb") as file:
            metadata = _unpickle(file, path)
        _check_files(metadata, path)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """`DefaultLoadPlanner` that loads values other than tensors with ``weights_only=True``."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value that is not a tensor into the state.

        Raises:
            UnsafeCheckpointError: If the value contains anything but plain values and tensors.
        """
        name = read_item.dest_index.fqn
        try:
            loaded = torch.load(value, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            reason = str(error).splitlines()
            raise UnsafeCheckpointError(
                f"the value {name!r} is not made of tensors and plain values, and loading it may "
                f"run code: {_first_reason(reason)}"
            ) from error
        set_element(self.original_state_dict, self.mappings[name], loaded)


# This is Python's implementation of pickle, because the one in C cannot refuse the opcode BUILD,
# which could change torch's own classes.
class _MetadataUnpickler(pickle._Unpickler):
    """Unpickles dtypes, paths and the classes in `_ALLOWED`, and refuses every other name."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PATHS:
            return PurePosixPath
        if (module, name) in _ALLOWED:
            return getattr(import_module(module), name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise UnsafeCheckpointError(
            f"it names {module}.{name}, which no checkpoint of torch's needs; loading it may run "
            "code"
        )

    def _build(self) -> None:
        built = self.stack[-2]  # type: ignore[attr-defined]
        if isinstance(built, type) or type(built).__module__ not in _BUILT_IN:
            raise UnsafeCheckpointError(f"it changes {built!r}, which no checkpoint needs")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = _build  # type: ignore[assignment]


_BUILT_IN = {module for module, _ in _ALLOWED}


def _unpickle(file: io.BufferedReader, path: Path) -> Metadata:
    remedy = "Do not use this checkpoint unless you trust its source; give another --out"
    try:
        metadata = _MetadataUnpickler(file).load()
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f"{path} is refused: {error}. {remedy}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(
            f"{path} is damaged: {error!r}. Delete its folder to go on from the checkpoint before"
        ) from error
    if not isinstance(metadata, Metadata):
        raise UnsafeCheckpointError(
            f"{path} is refused: it holds {type(metadata).__name__} instead of torch's Metadata. "
            f"{remedy}"
        )
    return metadata


def _check_files(metadata: Metadata, path: Path) -> None:
    """Refuse metadata that sends the reader to files outside the checkpoint."""
    for info in metadata.storage_data.values():
        name = info.relative_path
        if not isinstance(name, str) or name != Path(name).name:
            raise UnsafeCheckpointError(
                f"{path} is refused: it reads the file {name!r}, which lies outside of the "
                "checkpoint. Do not use this checkpoint unless you trust its source"
            )


def _first_reason(lines: list[str]) -> str:
    return next((line.strip() for line in lines if "GLOBAL" in line), lines[0] if lines else "")
