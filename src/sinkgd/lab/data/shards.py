"""Write token shards: a whole folder, or nothing.

The files go to a folder next to the final one, ``NAME.partial-*``. Once they are on the disk, the
folder is renamed in one step. A killed process leaves a folder under the partial name. It is never
read, and can be deleted. If only the renaming fails, the complete folder stays under that name.
"""

import errno
import hashlib
import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sinkgd.lab.data.corpus import SPLITS, Split
from sinkgd.lab.data.dataset import (
    MANIFEST_FILE,
    TOKENIZER_FILE,
    FileEntry,
    Manifest,
    SplitEntry,
    offsets_file,
    shard_file,
    token_dtype,
)
from sinkgd.lab.data.documents import DataError
from sinkgd.lab.data.tokenizer import Tokenizer
from sinkgd.lab.disk import naming_path, sync_folder

SHARD_TOKENS = 2**27  # tokens in a full shard: 256 MiB of uint16


class FolderTakenError(DataError):
    """The folder to write exists already, and is not empty or cannot be replaced."""


class _HashedFile:
    """A new file whose size and sha256 are known when it is finished."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, content: bytes) -> None:
        with naming_path(self._path):
            self._file.write(content)
        self._digest.update(content)
        self._size += len(content)

    def finish(self) -> FileEntry:
        with naming_path(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return FileEntry(self._size, self._digest.hexdigest())

    def discard(self) -> None:
        """Close without flushing: after a full disk, a normal close would raise again."""
        self._file.raw.close()


class _SplitWriter:
    """The shards and the offsets of one split."""

    def __init__(self, folder: Path, split: Split, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._folder, self._split = folder, split
        self._dtype, self._shard_tokens = dtype, shard_tokens
        self._offsets = _HashedFile(folder / offsets_file(split))
        self._offsets.write(np.array(0, dtype="<i8").tobytes())
        self._shard: _HashedFile | None = None
        self.files: dict[str, FileEntry] = {}
        self.tokens = self.documents = self.text_bytes = 0

    def add(self, ids: NDArray[Any], text_bytes: int) -> None:
        ids = ids.astype(self._dtype)
        while ids.size:
            shard = self._shard or self._next_shard()
            room = self._shard_tokens - self.tokens % self._shard_tokens
            shard.write(ids[:room].tobytes())
            self.tokens += min(room, ids.size)
            ids = ids[room:]
            if self.tokens % self._shard_tokens == 0:
                self._finish_shard()
        self.documents += 1
        self.text_bytes += text_bytes
        self._offsets.write(np.array(self.tokens, dtype="<i8").tobytes())

    def _next_shard(self) -> _HashedFile:
        self._shard_name = shard_file(self._split, self.tokens // self._shard_tokens)
        self._shard = _HashedFile(self._folder / self._shard_name)
        return self._shard

    def _finish_shard(self) -> None:
        if self._shard:
            self.files[self._shard_name] = self._shard.finish()
            self._shard = None

    def finish(self) -> SplitEntry:
        self._finish_shard()
        self.files[offsets_file(self._split)] = self._offsets.finish()
        return SplitEntry(self.tokens, self.documents, self.text_bytes)

    def discard(self) -> None:
        self._offsets.discard()
        if self._shard:
            self._shard.discard()


class ShardWriter:
    """Writes a folder of shards; used in a ``with`` block that ends with `commit`.

    Leaving the block without `commit`, by an exception or not, removes what was written.

    Args:
        out: The folder to make. If it exists, it must be empty; a link is followed.
        tokenizer: The tokenizer that makes the ids.
        sources: The sources of the text, which the manifest records.
        shard_tokens: Tokens in a full shard.
        cut_fraction: Fraction of each document, at its end, that is validation text; None if whole
            documents are held out. The manifest records it.

    Raises:
        DataError: If ``shard_tokens`` is below 1.
        FolderTakenError: If ``out`` exists and is not an empty folder that can be replaced.
    """

    def __init__(
        self,
        out: Path,
        tokenizer: Tokenizer,
        sources: tuple[str, ...],
        *,
        shard_tokens: int = SHARD_TOKENS,
        cut_fraction: float | None = None,
    ) -> None:
        if shard_tokens < 1:
            raise DataError(f"shard_tokens must be at least 1, got {shard_tokens}")
        refuse_taken(out)
        out = out.resolve()  # a folder cannot be renamed to a link
        self._out, self._tokenizer, self._sources = out, tokenizer, sources
        self._shard_tokens, self._cut_fraction = shard_tokens, cut_fraction
        self._largest_id = tokenizer.eos_id
        self._is_complete = False
        out.parent.mkdir(parents=True, exist_ok=True)
        self._partial = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
        dtype = token_dtype(tokenizer.vocab_size)
        self._splits = {
            split: _SplitWriter(self._partial, split, dtype, shard_tokens) for split in SPLITS
        }

    def add(self, split: Split, ids: NDArray[Any], text_bytes: int) -> None:
        """Append a document. Its eos is added here and must not be in ``ids``.

        Args:
            split: ``"train"`` or ``"validation"``.
            ids: One or more token ids, (tokens,), each below the tokenizer's ``vocab_size``.
            text_bytes: Length of the text in UTF-8.

        Raises:
            DataError: If ``ids`` is empty, or an id is out of range.
        """
        vocab_size = self._tokenizer.vocab_size
        if not ids.size:
            raise DataError("a document needs at least one token, got none")
        if not 0 <= ids.min() <= ids.max() < vocab_size:
            raise DataError(
                f"token ids must be in [0, {vocab_size}), got {ids.min()} to {ids.max()}"
            )
        self._largest_id = max(self._largest_id, int(ids.max()))
        self._splits[split].add(np.append(ids, self._tokenizer.eos_id), text_bytes)

    def documents(self, split: Split) -> int:
        """Return the number of documents in ``split`` so far."""
        return self._splits[split].documents

    def commit(self) -> Manifest:
        """Write what is left, force everything to the disk, and rename the folder.

        Raises:
            DataError: If a split has no document; or if the folder cannot be renamed, which then
                stays under the name that the message gives.
            FolderTakenError: If another process made the folder in the meantime.
        """
        for split in SPLITS:
            if not self.documents(split):
                raise DataError(f"the split {split!r} has no document; add one before commit")
        splits: dict[str, SplitEntry] = {}
        files: dict[str, FileEntry] = {}
        for split, writer in self._splits.items():
            splits[split] = writer.finish()
            files |= writer.files
        files[TOKENIZER_FILE] = self._write(TOKENIZER_FILE, self._tokenizer.json)
        manifest = Manifest(
            vocab_size=self._tokenizer.vocab_size,
            eos_id=self._tokenizer.eos_id,
            pad_id=self._tokenizer.pad_id,
            bos_id=self._tokenizer.bos_id,
            largest_id=self._largest_id,
            tokenizer_sha256=self._tokenizer.sha256,
            shard_tokens=self._shard_tokens,
            sources=self._sources,
            splits=splits,
            files=files,
            cut_fraction=self._cut_fraction,
        )
        self._write(MANIFEST_FILE, manifest.to_json().encode("utf-8"))
        self._rename()
        return manifest

    def _write(self, name: str, content: bytes) -> FileEntry:
        file = _HashedFile(self._partial / name)
        file.write(content)
        return file.finish()

    def _rename(self) -> None:
        self._partial.chmod(0o777 & ~_umask())  # mkdtemp's folder is closed to everyone else
        sync_folder(self._partial)
        try:
            self._partial.rename(self._out)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                refuse_taken(self._out)
            self._is_complete = True
            raise DataError(
                f"cannot rename {self._partial} to {self._out}: {error.strerror}. The first folder "
                "is complete; use it as it is, or move it yourself"
            ) from error
        sync_folder(self._out.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._partial.exists() and not self._is_complete:
            for writer in self._splits.values():
                writer.discard()
            shutil.rmtree(self._partial)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"the disk of {self._out.parent} is full; nothing was left there. "
                "Free some space or write to another disk"
            ) from error


def refuse_taken(out: Path) -> None:
    """Raise `FolderTakenError` unless ``out`` is absent, or an empty folder that can be replaced.

    A link stands for its target.
    """
    real = Path(os.path.realpath(out))
    if not (real.is_dir() and not any(real.iterdir())):
        if os.path.lexists(real):  # includes links that point at each other
            raise FolderTakenError(f"{out} exists already; remove it or choose another folder")
        return
    why = None
    if real.is_mount():
        why = "a mount point"
    elif real.samefile(Path.cwd()):
        why = "the working folder"
    if why is not None:
        raise FolderTakenError(
            f"{out} is {why}, which the finished folder cannot replace; give a folder in it, such "
            f"as --out {shlex.quote(str(out / 'shards'))}"
        )


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
