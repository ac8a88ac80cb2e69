"""Batches: the rows that a training step trains on, and those that an evaluation scores.

Rows. A split's tokens are cut into rows of T tokens, the sequence length. A target is the token
after its input, or ``IGNORE_INDEX``, which the loss ignores. There are two packings:

    concat   The documents follow one another, separated by eos; row k reads tokens kT … kT+T. No
             position is wasted. Each token is a target once, except the first token of the
             split and the last ones, which do not fill a row.
    none     One document per row, including its eos, padded to T tokens. A longer document is cut
             to its first T-1 tokens and its eos, as T5's tokenizer does. A row of s tokens has
             s-1 targets. This is at least one, because no document is empty.

Order. The batch of a step is a pure function of (seed, step, rank, world size). The global batch of
step s has B = batch_size rows; its row i is the p-th row drawn, p = s·B + i:

    epoch = p div n,   row = permutation(seed, epoch)[p mod n]      n: rows of the split

An epoch therefore draws each row once, and resuming needs no state except the step. Rank r of w
ranks takes rows r·B/w … (r+1)·B/w - 1; the global batch is the same for every w.

The permutation of 0 … n-1 needs no memory. A Feistel network permutes numbers of b bits, where 2^b
is the smallest power of two ≥ n (b = 1 if n = 1). A result of n or more goes through the network
again until it is below n ("cycle walking"); the map remains a bijection. This takes at most two
passes on average, since 2^b ≤ 2n.

    one round:  (left, right) → (right, left ⊕ F(right))    F: splitmix64's mixer, keyed

Reference: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, method 2.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sinkgd.lab.data.dataset import TokenSplit
from sinkgd.lab.data.documents import DataError

Packing = Literal["concat", "none"]
IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default


class PackedRows(NamedTuple):
    """Inputs and targets, both (rows, T)."""

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]


class Rows(Protocol):
    """A split cut into rows."""

    @property
    def count(self) -> int:
        """Number of rows."""
        ...

    def gather(self, indices: NDArray[np.int64]) -> PackedRows:
        """Return the rows with these indices, each in [0, count), in this order."""
        ...


class ConcatRows:
    """Rows of the packing ``concat``: windows of T+1 tokens that overlap in one token."""

    def __init__(self, split: TokenSplit, sequence_length: int) -> None:
        self._split, self._length = split, sequence_length
        self.count = (split.tokens - 1) // sequence_length

    def gather(self, indices: NDArray[np.int64]) -> PackedRows:
        """Return rows; every target is scored."""
        windows = np.empty((len(indices), self._length + 1), dtype=np.int64)
        for row, index in zip(windows, indices.tolist(), strict=True):
            row[:] = self._split.read(index * self._length, self._length + 1)
        return PackedRows(windows[:, :-1].copy(), windows[:, 1:].copy())


class DocumentRows:
    """Rows of the packing ``none``: row i is the beginning of document i, and ends with eos."""

    def __init__(self, split: TokenSplit, sequence_length: int) -> None:
        self._split, self._length = split, sequence_length
        self.count = split.documents

    def gather(self, indices: NDArray[np.int64]) -> PackedRows:
        """Return rows; padding and the eos of each row have no target."""
        inputs = np.full((len(indices), self._length), self._split.pad_id, dtype=np.int64)
        targets = np.full_like(inputs, IGNORE_INDEX)
        starts, ends = self._split.offsets[indices], self._split.offsets[indices + 1]
        lengths = np.minimum(ends - starts, self._length)
        bounds = zip(starts.tolist(), ends.tolist(), lengths.tolist(), strict=True)
        for i, (start, end, length) in enumerate(bounds):
            inputs[i, : length - 1] = self._split.read(start, length - 1)
            inputs[i, length - 1] = self._split.read(end - 1, 1)[0]
            targets[i, : length - 1] = inputs[i, 1:length]
        return PackedRows(inputs, targets)


def rows_of(split: TokenSplit, sequence_length: int, packing: Packing) -> Rows:
    """Cut ``split`` into rows of ``sequence_length`` tokens.

    Raises:
        DataError: If the length is below 2 or the packing is unknown.
    """
    if sequence_length < 2:
        raise DataError(f"sequence_length must be at least 2, got {sequence_length}")
    match packing:
        case "concat":
            return ConcatRows(split, sequence_length)
        case "none":
            return DocumentRows(split, sequence_length)
    raise DataError(f"packing must be 'concat' or 'none', got {packing!r}")


_ROUNDS = 8  # an even number, so that halves of unequal width end where they began

# splitmix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def permute(positions: NDArray[np.int64], n: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Map ``positions`` by the permutation of 0 … n-1 that belongs to ``(seed, epoch)``.

    Args:
        positions: Positions in [0, n), in an array of any shape.
        n: Length of the permutation, from 1 to 2^62.
        seed: Seed of the permutations, at least 0.
        epoch: Number of the epoch, at least 0; every epoch has its own permutation.

    Examples:
        >>> permute(np.arange(7), 7, seed=0, epoch=0)
        array([4, 6, 0, 2, 1, 3, 5])
    """
    bits = max(1, (n - 1).bit_length())
    keys = _round_keys(seed, epoch)
    images = _feistel(positions.astype(np.uint64).reshape(-1), bits, keys)
    walking = np.flatnonzero(images >= n)
    while walking.size:
        images[walking] = _feistel(images[walking], bits, keys)
        walking = walking[images[walking] >= n]
    return images.astype(np.int64).reshape(positions.shape)


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    # SeedSequence's output is fixed by numpy's compatibility policy.
    return tuple(np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64))


def _feistel(
    numbers: NDArray[np.uint64], bits: int, keys: tuple[np.uint64, ...]
) -> NDArray[np.uint64]:
    low, high = bits // 2, bits - bits // 2  # the widths of the right and the left half
    left, right = numbers >> np.uint64(low), numbers & _mask(low)
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & _mask(high))
        low, high = high, low
    return (left << np.uint64(low)) | right


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Batch:
    """Rows of token ids, and the token that follows each one.

    Attributes:
        inputs: (rows, sequence_length), int64.
        targets: (rows, sequence_length), int64; ``IGNORE_INDEX`` at positions that are not scored.
    """

    inputs: Tensor
    targets: Tensor

    @property
    def target_count(self) -> int:
        """Number of scored targets."""
        return int((self.targets != IGNORE_INDEX).sum())

    def part(self, number: int, parts: int) -> "Batch":
        """Return part ``number``, from 0, of ``parts`` parts of equal size.

        Copies of the last row fill up the last parts; these copies are not scored.

        Examples:
            >>> rows = torch.tensor([[1, 2], [3, 4], [5, 6]])
            >>> second = Batch(rows, rows).part(1, parts=2)
            >>> second.inputs.tolist(), second.targets.tolist()
            ([[5, 6], [5, 6]], [[5, 6], [-100, -100]])
        """
        rows, size = len(self.inputs), -(-len(self.inputs) // parts)
        if size * parts == rows:
            own = slice(number * size, (number + 1) * size)
            return Batch(self.inputs[own], self.targets[own])
        wanted = torch.arange(number * size, (number + 1) * size, dtype=torch.int64, device="cpu")
        drawn = wanted.clamp(max=rows - 1)
        targets = self.targets[drawn].masked_fill((wanted >= rows)[:, None], IGNORE_INDEX)
        return Batch(self.inputs[drawn], targets)


class Batches:
    """The training batches of a split; each depends only on its step.

    Args:
        split: A result of `TokenDataset.split`.
        sequence_length: Tokens in a row, at least 2.
        batch_size: Rows in the global batch, over all ranks.
        seed: Seed of the order, at least 0.
        packing: ``"concat"`` or ``"none"``; see the module's docstring.
        rank: Rank of this process.
        world_size: Number of processes; it divides ``batch_size``.

    Raises:
        DataError: If the split has fewer rows than one batch, or an argument is out of range.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        packing: Packing = "concat",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_shares(batch_size, rank, world_size)
        if seed < 0:
            raise DataError(f"seed must be at least 0, got {seed}")
        self._rows = rows_of(split, sequence_length, packing)
        _check_enough(split, self._rows, batch_size, sequence_length, packing)
        self._seed, self._batch_size = seed, batch_size
        share = batch_size // world_size
        self._mine = np.arange(rank * share, (rank + 1) * share, dtype=np.int64)

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows in an epoch, which draws each row once."""
        return self._rows.count

    def at(self, step: int) -> Batch:
        """Return this rank's share of the batch of ``step``, counted from 0."""
        if step < 0:
            raise DataError(f"step must be at least 0, got {step}")
        drawn = step * self._batch_size + self._mine
        epochs, positions = np.divmod(drawn, self._rows.count)
        indices = np.empty_like(positions)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            indices[here] = permute(positions[here], self._rows.count, seed=self._seed, epoch=epoch)
        return _batch(self._rows.gather(indices))


def evaluation_batches(
    split: TokenSplit,
    *,
    sequence_length: int,
    batch_size: int,
    max_tokens: int,
    packing: Packing = "concat",
) -> Iterator[Batch]:
    """Yield the split's rows in order until ``max_tokens`` targets are scored.

    The last batch may have fewer rows, and targets beyond the budget are masked. So exactly
    ``max_tokens`` targets are scored, or all targets if the split has fewer. Each call yields the
    same batches.

    Args:
        split: A result of `TokenDataset.split`.
        sequence_length: Tokens in a row, at least 2.
        batch_size: Rows in a batch.
        max_tokens: Number of targets to score.
        packing: ``"concat"`` or ``"none"``.

    Raises:
        DataError: If the split does not fill one row, or an argument is out of range.
    """
    _check_shares(batch_size, rank=0, world_size=1)
    if max_tokens < 1:
        raise DataError(f"max_tokens must be at least 1, got {max_tokens}")
    rows = rows_of(split, sequence_length, packing)
    _check_enough(split, rows, 1, sequence_length, packing)
    return _within_budget(rows, batch_size, max_tokens)


def _within_budget(rows: Rows, batch_size: int, max_tokens: int) -> Iterator[Batch]:
    remaining = max_tokens
    for first in range(0, rows.count, batch_size):
        packed = rows.gather(np.arange(first, min(first + batch_size, rows.count), dtype=np.int64))
        scored = (packed.targets != IGNORE_INDEX).cumsum().reshape(packed.targets.shape)
        packed.targets[scored > remaining] = IGNORE_INDEX
        remaining -= int(scored[-1, -1])
        if remaining > 0:
            yield _batch(packed)
            continue
        used = np.flatnonzero((packed.targets != IGNORE_INDEX).any(axis=1))[-1] + 1
        yield _batch(PackedRows(packed.inputs[:used], packed.targets[:used]))
        return


def _batch(packed: PackedRows) -> Batch:
    return Batch(torch.from_numpy(packed.inputs), torch.from_numpy(packed.targets))


def _check_shares(batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1 sequence, got {batch_size}")
    if not 0 <= rank < world_size:
        raise DataError(f"rank must be in [0, world_size = {world_size}), got {rank}")
    if batch_size % world_size:
        raise DataError(
            f"batch_size {batch_size} cannot be shared by {world_size} processes; "
            f"make it a multiple of {world_size}"
        )


def _check_enough(
    split: TokenSplit, rows: Rows, batch_size: int, sequence_length: int, packing: Packing
) -> None:
    if rows.count >= batch_size:
        return
    kind = f"rows of {sequence_length} tokens" if packing == "concat" else "documents"
    remedy = "prepare more text, or lower batch_size or sequence_length"
    if split.name == "validation":
        remedy = (
            "prepare more text, or a larger share with `sinkgd prepare --validation-fraction`, or "
            "lower sequence_length"
        )
    raise DataError(
        f"too little text for one batch: {split.name} has {split.tokens} tokens in "
        f"{split.documents} documents, which make {rows.count} {kind}, and a batch takes "
        f"{batch_size}; {remedy}"
    )


@dataclass(frozen=True)
class VocabularyShift:
    """A sudden change of vocabulary: from one step on, token ids are permuted.

    The text stays as predictable as before, but suddenly nearly every row of the embedding and of
    the head belongs to another token. The time to recover shows how long an optimizer remembers the
    past.

    Args:
        at_step: Number of steps with the original ids; the next step is the first with new ones.
        new_ids: For each token, the id that replaces it; ``(vocab_size,)``, int64.
    """

    at_step: int
    new_ids: Tensor

    @classmethod
    def drawn(
        cls, at_step: int, *, vocab_size: int, keep: Collection[int], seed: int
    ) -> "VocabularyShift":
        """Draw a permutation.

        Args:
            at_step: Number of steps with the original ids.
            vocab_size: Number of tokens.
            keep: Ids that do not change, such as the one that ends a document.
            seed: Equal seeds draw equal permutations.

        Examples:
            >>> shift = VocabularyShift.drawn(100, vocab_size=6, keep={0}, seed=0)
            >>> sorted(shift.new_ids.tolist()), shift.new_ids[0].item()
            ([0, 1, 2, 3, 4, 5], 0)
        """
        others = [i for i in range(vocab_size) if i not in keep]
        moved = torch.tensor(others, dtype=torch.int64, device="cpu")
        generator = torch.Generator(device="cpu").manual_seed(seed)
        order = torch.randperm(len(moved), generator=generator, dtype=torch.int64, device="cpu")
        new_ids = torch.arange(vocab_size, dtype=torch.int64, device="cpu")
        new_ids[moved] = moved[order]
        return cls(at_step, new_ids)

    def of_training(self, batch: Batch, step: int) -> Batch:
        """Return the batch to train on after ``step`` steps."""
        return self._renamed(batch) if step >= self.at_step else batch

    def of_evaluation(self, batch: Batch, step: int) -> Batch:
        """Return the batch to score after ``step`` steps, with the last training step's ids."""
        return self._renamed(batch) if step > self.at_step else batch

    def _renamed(self, batch: Batch) -> Batch:
        ids = batch.targets.clamp(min=0)  # IGNORE_INDEX is not an id
        targets = torch.where(batch.targets < 0, batch.targets, self.new_ids[ids])
        return Batch(self.new_ids[batch.inputs], targets)
