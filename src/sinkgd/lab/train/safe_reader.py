"""Read a checkpoint without running code that lies in it.

torch's own reader and planner unpickle a checkpoint's ``.metadata`` and its small values without
limits, so a checkpoint from somebody else could run anything. Here ``.metadata`` may name only the
classes that torch's writer puts there, and every value is loaded with ``weights_only=True``.
"""

import io
import pickle
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from sinkgd.lab.train.whole import METADATA, CheckpointError

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
# What torch's writer (2.6 to 2.13) names in .metadata, besides dtypes.
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
# The folder that was written to, for the record; nothing is opened by it.
_PATHS = frozenset(
    (module, name)
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
)


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint that asks for more than tensors and plain values."""


class SafeReader(FileSystemReader):
    """`FileSystemReader` that refuses any metadata but torch's own.

    Args:
        path: The checkpoint's folder.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._folder = path

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        """Return what the checkpoint says of its tensors and files.

        Raises:
            UnsafeCheckpointError: If it names anything outside of the allow-list, or a file outside
                of the checkpoint.
            CheckpointError: If it cannot be read.
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
    """`DefaultLoadPlanner` that loads small values as it loads tensors: weights only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value that is no tensor into the state.

        Raises:
            UnsafeCheckpointError: If it is not made of plain values and tensors.
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


# The C implementation cannot refuse a BUILD on a class, which would change torch's own classes.
class _MetadataUnpickler(pickle._Unpickler):
    """Unpickles the classes of `_ALLOWED` and dtypes; everything else is refused by its name."""

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
    """Refuse metadata that sends the reader to files beside the checkpoint's own."""
    for info in metadata.storage_data.values():
        name = info.relative_path
        if not isinstance(name, str) or name != Path(name).name:
            raise UnsafeCheckpointError(
                f"{path} is refused: it reads the file {name!r}, which lies outside of the "
                "checkpoint. Do not use this checkpoint unless you trust its source"
            )


def _first_reason(lines: list[str]) -> str:
    return next((line.strip() for line in lines if "GLOBAL" in line), lines[0] if lines else "")
