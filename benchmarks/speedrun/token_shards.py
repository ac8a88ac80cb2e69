"""Token shards in the layout of modded-nanogpt, and the batches that its optimization track reads.

A shard begins with 256 int32: a magic number, the version, the number of tokens, and zeros. The
tokens follow, as uint16. All integers are little-endian.

Batches follow each other through a shard, and the shards follow each other by name. A batch never
spans two shards: the rest of a shard is skipped. The boundaries of documents have no effect, so a
row of a batch may hold the end of one document and the beginning of the next.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MAGIC, VERSION = 20240520, 1
HEADER = 256  # int32
DOWNLOAD = "download it again with data/cached_fineweb10B.py of modded-nanogpt"


class ShardError(ValueError):
    """A shard is missing, damaged or too short; the message names the file and the remedy."""


def open_shard(path: Path) -> npt.NDArray[np.uint16]:
    """Map the tokens of a shard into memory.

    Raises:
        ShardError: If the header or the size of the file is wrong.
    """
    size = path.stat().st_size
    if size < 4 * HEADER:
        raise ShardError(
            f"{path} has {size} bytes, less than its header of {4 * HEADER}; {DOWNLOAD}"
        )
    magic, version, count = (int(entry) for entry in np.fromfile(path, dtype="<i4", count=3))
    if magic != MAGIC:
        raise ShardError(
            f"{path} begins with {magic}, not with {MAGIC}: it is no shard; {DOWNLOAD}"
        )
    if version != VERSION:
        raise ShardError(f"{path} has version {version} of the layout, not {VERSION}; {DOWNLOAD}")
    if size != 4 * HEADER + 2 * count:
        raise ShardError(
            f"{path} announces {count} tokens, which take {4 * HEADER + 2 * count} bytes with the "
            f"header, and has {size}; {DOWNLOAD}"
        )
    if count == 0:
        raise ShardError(f"{path} holds no token; {DOWNLOAD}")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER)


class TokenShards:
    """The shards of one split, ``fineweb_{split}_*.bin``, in the order of their names.

    Args:
        folder: The folder that holds them.
        split: ``"train"`` or ``"val"``.
        vocab_size: The number of tokens that the model knows.

    Raises:
        ShardError: If there is no shard, or one is damaged.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int) -> None:
        pattern = f"fineweb_{split}_*.bin"
        self.paths: Sequence[Path] = sorted(folder.glob(pattern))
        self.vocab_size = vocab_size
        if not self.paths:
            raise ShardError(
                f"--data {folder} holds no {pattern}; run data/cached_fineweb10B.py of "
                "modded-nanogpt and pass the folder fineweb10B that it fills"
            )
        self.shards = [open_shard(path) for path in self.paths]

    def check(self, batch_tokens: int, batches: int) -> None:
        """Refuse shards without enough batches.

        Raises:
            ShardError: If a shard has no whole batch, or all together have fewer than ``batches``.
        """
        counts = [_count_batches(len(shard), batch_tokens) for shard in self.shards]
        for path, shard, count in zip(self.paths, self.shards, counts, strict=True):
            if count == 0:
                raise ShardError(
                    f"{path} holds {len(shard)} tokens; a batch needs {batch_tokens + 2}. Remove "
                    "the shard, or use longer ones"
                )
        if sum(counts) < batches:
            raise ShardError(
                f"{len(counts)} shards in {self.paths[0].parent} hold {sum(counts)} batches of "
                f"{batch_tokens} tokens, and the run needs {batches}; download more of them (the "
                "argument of data/cached_fineweb10B.py is their number), or pass fewer --steps"
            )

    def batches(
        self, batch_tokens: int, row_tokens: int, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one rank's part of each batch: inputs and targets, int64, ``(rows, row_tokens)``.

        The parts are contiguous, in the order of the ranks. ``batch_tokens`` must be a multiple of
        ``row_tokens * ranks``.
        """
        part = batch_tokens // ranks
        for path, shard in zip(self.paths, self.shards, strict=True):
            for index in range(_count_batches(len(shard), batch_tokens)):
                begin = index * batch_tokens + rank * part
                tokens = torch.from_numpy(shard[begin : begin + part + 1].astype(np.int64))
                if tokens.max() >= self.vocab_size:
                    raise ShardError(
                        f"{path} holds the token {int(tokens.max())}, and the vocabulary has "
                        f"{self.vocab_size}; {DOWNLOAD}"
                    )
                yield tokens[:-1].view(-1, row_tokens), tokens[1:].view(-1, row_tokens)


def _count_batches(tokens: int, batch_tokens: int) -> int:
    """Return how many batches the track reads from a shard.

    A batch whose inputs would end at the second-to-last token, or later, is not read. The targets
    of a batch reach one token further than its inputs.
    """
    return max(0, tokens - 2) // batch_tokens
