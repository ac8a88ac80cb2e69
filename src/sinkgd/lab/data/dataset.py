"""A folder of token shards: its manifest, and the tokens of each split as a memory map.

The folder holds
    manifest.json           what the folder contains; written last
    tokenizer.json          the tokenizer
    train-00000.bin ...     token ids, little-endian uint16 (uint32 if the vocabulary has more than
                            65,536 tokens). Every document ends with one eos. All shards of a split
                            except the last hold ``shard_tokens`` tokens
    train-offsets.bin       the start of each document, and the end of the last one: documents + 1
                            numbers, int64
    validation-...          the same for validation
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sinkgd.lab.data.documents import DataError
from sinkgd.lab.disk import parse_json

FORMAT_VERSION = 2
_WITHOUT_LARGEST_ID = 1  # number of the previous format, which can still be read
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class SplitEntry:
    """The size of one split."""

    tokens: int  # including one eos per document
    documents: int
    text_bytes: int  # size of the documents in UTF-8

    @property
    def bytes_per_token(self) -> float:
        """Mean number of bytes of text per token."""
        return self.text_bytes / self.tokens


@dataclass(frozen=True)
class FileEntry:
    """Expected size and hash of a file."""

    size_bytes: int
    sha256: str  # hex


@dataclass(frozen=True)
class Manifest:
    """Everything about a folder of shards except the tokens themselves."""

    vocab_size: int
    eos_id: int
    pad_id: int
    bos_id: int | None
    largest_id: int | None  # the largest id in the shards; None in format 1, which lacks it
    tokenizer_sha256: str  # hash of tokenizer.json, hex
    shard_tokens: int
    sources: tuple[str, ...]
    splits: dict[str, SplitEntry]
    files: dict[str, FileEntry]
    format_version: int = FORMAT_VERSION
    # Fraction held out at the end of each document; None if whole documents are held out.
    cut_fraction: float | None = None

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """The type of the ids in the shards."""
        return token_dtype(self.vocab_size)

    @property
    def rows_needed(self) -> int:
        """Number of rows that an embedding needs for all ids that can occur in a batch.

        A tokenizer may have ids that never occur, such as the sentinels of T5's tokenizer. If the
        manifest did not record the largest id, the whole vocabulary counts.
        """
        if self.largest_id is None:
            return self.vocab_size
        return max(self.largest_id, self.pad_id) + 1

    @property
    def total_bytes(self) -> int:
        """Size of all files except the manifest."""
        return sum(entry.size_bytes for entry in self.files.values())

    @property
    def content_sha256(self) -> str:
        """Hash of the tokens, the document offsets and the tokenizer, hex.

        Shards that were moved, or prepared again from the same text in the same way, have the same
        hash.
        """
        about = {"sources", "largest_id", "format_version", "cut_fraction"}
        content = {key: value for key, value in asdict(self).items() if key not in about}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()

    def shard_files(self, split: str) -> list[str]:
        """Names of a split's shards, in order."""
        count = -(-self.splits[split].tokens // self.shard_tokens)
        return [shard_file(split, i) for i in range(count)]

    def to_json(self) -> str:
        """Return the content of ``manifest.json``."""
        fields = asdict(self)
        if self.cut_fraction is None:
            del fields["cut_fraction"]  # older manifests do not have it
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of ``folder``.

        Raises:
            DataError: If the manifest is missing, damaged or of a format that cannot be read.
        """
        path = folder / MANIFEST_FILE
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"no {MANIFEST_FILE} in {folder}, so it is not a complete folder of shards; "
                "make one with `sinkgd prepare`"
            ) from None
        try:
            fields = parse_json(content)
            version = fields["format_version"]
            readable = version in (_WITHOUT_LARGEST_ID, FORMAT_VERSION)
            manifest = cls._from_fields(fields) if readable else None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} is damaged ({error!r}); make the folder again with `sinkgd prepare`"
            ) from error
        if manifest is None:
            raise DataError(
                f"{path} is of format {version}, but this sinkgd reads only {_WITHOUT_LARGEST_ID} "
                f"and {FORMAT_VERSION}; make the folder again with `sinkgd prepare`"
            )
        return manifest

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Self:
        if fields["format_version"] == _WITHOUT_LARGEST_ID:
            fields["largest_id"] = None
        fields["sources"] = tuple(fields["sources"])
        fields["splits"] = {name: SplitEntry(**row) for name, row in fields["splits"].items()}
        fields["files"] = {name: FileEntry(**row) for name, row in fields["files"].items()}
        for name in fields["files"]:
            if name != Path(name).name:
                raise ValueError(f"{name!r} lies outside the folder")
        return cls(**fields)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the integer type of ids below ``vocab_size``: uint16 if it holds them, else uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def shard_file(split: str, index: int) -> str:
    """Return the name of a split's ``index``-th shard."""
    return f"{split}-{index:05d}.bin"


def offsets_file(split: str) -> str:
    """Return the name of a split's document offsets."""
    return f"{split}-offsets.bin"


# Below this total size, opening a folder also compares the hash of every file, which takes a few
# tenths of a second.
_ALWAYS_VERIFIED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of one split: one long sequence of documents, each ending with eos.

    Attributes:
        name: ``"train"`` or ``"validation"``.
        tokens: Length of the sequence.
        offsets: Start of each document, and the end of the last one; (documents + 1,).
        text_bytes: Length of the documents' text in UTF-8.
        pad_id: Token that pads rows.
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
        """Return ``length`` ≥ 1 tokens that begin at ``start``, (length,), in the shards' dtype."""
        if not 0 <= start < start + length <= self.tokens:
            raise IndexError(
                f"positions {start} to {start + length} are not within the {self.tokens} tokens "
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
        folder: Path of the folder.
        manifest: The vocabulary, special ids, and counts of tokens, documents and bytes of text.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a folder and check the size of every file and, below 256 MiB in all, the hashes.

        Raises:
            DataError: If the folder has no manifest, or a file is missing or damaged.
        """
        dataset = cls(folder, Manifest.read(folder))
        dataset._check_sizes()
        if dataset.manifest.total_bytes < _ALWAYS_VERIFIED_BYTES:
            dataset.verify()
        return dataset

    def split(self, name: str) -> TokenSplit:
        """Map one split's files into memory; ``name`` is ``"train"`` or ``"validation"``.

        Raises:
            DataError: If there is no such split, or a file is shorter than it should be.
        """
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
        """Compare the sha256 of every file with the one in the manifest.

        Raises:
            DataError: If a hash differs.
        """
        for name, entry in self.manifest.files.items():
            with (self.folder / name).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != entry.sha256:
                    raise self._damaged(name, "its sha256 differs from the manifest's")

    def _map(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        # The map is wrapped in a plain array, because slicing a np.memmap is several times slower.
        entries = self._expected_sizes()[name] // dtype.itemsize
        try:
            return np.asarray(np.memmap(self.folder / name, dtype, mode="r", shape=(entries,)))
        except ValueError as error:  # the file's size was right when the folder was opened
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
