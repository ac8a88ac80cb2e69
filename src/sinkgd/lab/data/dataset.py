"""Reading token shards: memory-mapped, checked when they are opened."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sinkgd.lab.data.documents import DataError
from sinkgd.lab.data.manifest import Manifest, offsets_file

# Up to this size, opening reads every byte and compares its hash: a few tenths of a second.
_ALWAYS_VERIFIED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of one split, as one long sequence of documents that each end with eos.

    Attributes:
        name: ``"train"`` or ``"validation"``.
        tokens: Length of the sequence.
        offsets: Where each document starts, and the end of the last: (documents + 1,).
        text_bytes: Length of the documents' text in UTF-8.
        pad_id: Fills rows that a document leaves unfilled.
    """

    name: str
    tokens: int
    offsets: NDArray[np.int64]
    text_bytes: int
    pad_id: int
    _shards: tuple[NDArray[Any], ...]
    _shard_tokens: int

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def read(self, start: int, length: int) -> NDArray[Any]:
        """Return ``length`` ≥ 1 tokens from ``start`` on, (length,), in the shards' own type."""
        if not 0 <= start < start + length <= self.tokens:
            raise IndexError(
                f"positions {start} to {start + length} leave the {self.tokens} tokens "
                f"of {self.name}"
            )
        index, offset = divmod(start, self._shard_tokens)
        if offset + length <= self._shard_tokens:
            return self._shards[index][offset : offset + length]
        head = self._shards[index][offset:]
        return np.concatenate([head, self.read(start + len(head), length - len(head))])


class TokenDataset:
    """A folder that `prepare` made. Open it with `TokenDataset.open`.

    Attributes:
        folder: Where it is.
        manifest: What is in it: vocabulary, special ids, tokens, documents and bytes of text.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a folder, checking that every file has its size, and its hash below 256 MiB in all.

        Raises:
            DataError: If the folder has no manifest, or a file is missing or damaged.
        """
        dataset = cls(folder, Manifest.read(folder))
        dataset._check_sizes()
        if dataset.manifest.total_bytes < _ALWAYS_VERIFIED_BYTES:
            dataset.verify()
        return dataset

    def split(self, name: str) -> TokenSplit:
        """Map one split's files into memory; ``name`` is ``"train"`` or ``"validation"``."""
        manifest = self.manifest
        if name not in manifest.splits:
            raise DataError(f"{self.folder} has no split {name!r}, only {list(manifest.splits)}")
        entry = manifest.splits[name]
        shards = [self._map(file, manifest.token_dtype) for file in manifest.shard_files(name)]
        return TokenSplit(
            name=name,
            tokens=entry.tokens,
            offsets=self._map(offsets_file(name), np.dtype("<i8")),
            text_bytes=entry.text_bytes,
            pad_id=manifest.pad_id,
            _shards=tuple(shards),
            _shard_tokens=manifest.shard_tokens,
        )

    def verify(self) -> None:
        """Compare the sha256 of every file with the manifest's.

        Raises:
            DataError: If one differs.
        """
        for name, entry in self.manifest.files.items():
            with (self.folder / name).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != entry.sha256:
                    raise self._damaged(name, "its sha256 is not the manifest's")

    def _map(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        # A plain array over the map: slicing a np.memmap itself is several times slower.
        entries = self._expected_sizes()[name] // dtype.itemsize
        try:
            return np.asarray(np.memmap(self.folder / name, dtype, mode="r", shape=(entries,)))
        except ValueError as error:  # its size was right when the folder was opened
            raise self._damaged(name, f"it changed while it was read ({error})") from error

    def _check_sizes(self) -> None:
        for name, expected in self._expected_sizes().items():
            path = self.folder / name
            if not path.is_file():
                raise self._damaged(name, "it is missing")
            size = path.stat().st_size
            if size != expected:
                raise self._damaged(name, f"it has {size} bytes instead of {expected}")

    def _expected_sizes(self) -> dict[str, int]:
        manifest = self.manifest
        sizes = {name: entry.size_bytes for name, entry in manifest.files.items()}
        for split, entry in manifest.splits.items():
            sizes[offsets_file(split)] = 8 * (entry.documents + 1)
            for i, name in enumerate(manifest.shard_files(split)):
                tokens = min(manifest.shard_tokens, entry.tokens - i * manifest.shard_tokens)
                sizes[name] = tokens * manifest.token_dtype.itemsize
        return sizes

    def _damaged(self, name: str, how: str) -> DataError:
        return DataError(
            f"{self.folder / name} is damaged: {how}; "
            f"remove {self.folder} and make it again with `sinkgd prepare`"
        )
