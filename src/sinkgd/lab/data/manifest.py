"""The manifest of a folder of token shards: what is in it, and how to tell that it is whole.

A folder holds
    manifest.json           this record; written last
    tokenizer.json          the tokenizer
    train-00000.bin ...     token ids, little-endian uint16 (uint32 above 65,536 tokens); every
                            document ends with one eos; all shards of a split but its last hold
                            ``shard_tokens`` tokens
    train-offsets.bin       int64, documents + 1: where each document starts, and the end
    validation-...          the same for validation
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from sinkgd.lab.data.documents import DataError
from sinkgd.lab.disk import parse_json

FORMAT_VERSION = 2
_WITHOUT_LARGEST_ID = 1  # the format before, which is read too
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class SplitEntry:
    """The size of one split."""

    tokens: int  # one eos a document included
    documents: int
    text_bytes: int  # of the documents in UTF-8

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a token stands for, on average."""
        return self.text_bytes / self.tokens


@dataclass(frozen=True)
class FileEntry:
    """What a file must be."""

    size_bytes: int
    sha256: str  # hex


@dataclass(frozen=True)
class Manifest:
    """Everything about a folder of shards but the tokens themselves."""

    vocab_size: int
    eos_id: int
    pad_id: int
    bos_id: int | None
    largest_id: int | None  # that occurs in the shards; None where format 1 did not record it
    tokenizer_sha256: str  # of tokenizer.json, hex
    shard_tokens: int
    sources: tuple[str, ...]
    splits: dict[str, SplitEntry]
    files: dict[str, FileEntry]
    format_version: int = FORMAT_VERSION
    cut_fraction: float | None = None  # at the end of each document, for validation; None: no cut

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """The type of the ids in the shards."""
        return token_dtype(self.vocab_size)

    @property
    def rows_needed(self) -> int:
        """Rows of an embedding that every id of a batch has one of, tokens.

        A tokenizer may have ids that never occur, as the sentinels of T5's are; where the format
        did not record which ones do, all count.
        """
        if self.largest_id is None:
            return self.vocab_size
        return max(self.largest_id, self.pad_id) + 1

    @property
    def total_bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(entry.size_bytes for entry in self.files.values())

    @property
    def content_sha256(self) -> str:
        """Hash of the tokens, the documents' bounds and the tokenizer, hex.

        The same for shards that were moved, or made again from the same text.
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
            del fields["cut_fraction"]  # as before documents could be cut
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of ``folder``.

        Raises:
            DataError: If there is none, or it is damaged or of another version of the format.
        """
        path = folder / MANIFEST_FILE
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"no {MANIFEST_FILE} in {folder}, so it is no folder of whole shards; "
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
                f"{path} is of format {version}, this sinkgd reads {FORMAT_VERSION}; "
                "make the folder again with `sinkgd prepare`"
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
    """Return the smallest type of id that holds ``vocab_size`` tokens."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def shard_file(split: str, index: int) -> str:
    """Return the name of a split's ``index``-th shard."""
    return f"{split}-{index:05d}.bin"


def offsets_file(split: str) -> str:
    """Return the name of a split's document offsets."""
    return f"{split}-offsets.bin"
