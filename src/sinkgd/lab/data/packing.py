"""Packing: how a split's tokens become rows of fixed length, inputs and targets.

T is the length of a row, the model's sequence length. A target is the token after its input, or
``IGNORE_INDEX``, which the loss leaves out.

    concat   documents one after the other, an eos between; row k reads tokens kT … kT+T, so no
             position is wasted and, but for the first token and a tail that fills no row, each
             token is a target once
    none     one document a row, its eos included, padded to T tokens; of a longer one the first
             T-1 tokens and its eos, as T5's tokenizer truncates; s tokens give s-1 targets, so
             every row has one at least
"""

from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

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
        """Return rows; pads, and the last token of each row, have no target."""
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
        DataError: If the length or the packing is not possible.
    """
    if sequence_length < 2:
        raise DataError(f"sequence_length must be at least 2, got {sequence_length}")
    match packing:
        case "concat":
            return ConcatRows(split, sequence_length)
        case "none":
            return DocumentRows(split, sequence_length)
    raise DataError(f"packing must be 'concat' or 'none', got {packing!r}")
