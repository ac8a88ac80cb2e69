"""Where things lie: gradients in memory, their scales among those of all, rows in a table.

Letters: those of `sinkgd.kernels.triton.fields`.
"""

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.kernels.layout import Layout

FLOATS = 4  # in 16 bytes: vectors of scales and sums begin at a multiple of these


class Source(NamedTuple):
    """A gradient as the kernels read it."""

    dtype: torch.dtype
    layout: Layout
    aligned: bool  # its first entry, to 16 bytes


class Part(NamedTuple):
    """Rows of the plan's table: where they begin, and how many."""

    begin: int
    rows: int


class TableRows:
    """Rows of int64 of all buckets, one after the other."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.size = 0

    def add(self, *rows: Tensor) -> Part:
        """Append rows, and return where they begin."""
        part = Part(self.size, sum(len(some) for some in rows))
        self.parts.extend(some.flatten() for some in rows)
        self.size += sum(some.numel() for some in rows)
        return part

    def joined(self) -> Tensor:
        """Return all rows as one vector, on the host."""
        return (
            torch.cat(self.parts) if self.parts else torch.empty(0, dtype=torch.int64, device="cpu")
        )


def padded(length: int) -> int:
    """Return the least multiple of 16 bytes that holds ``length`` floats."""
    return -(-length // FLOATS) * FLOATS


def places_of_scales(shapes: Iterable[torch.Size]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return where each tensor's row scales begin, its column scales, and the end of all."""
    rows, cols, end = [], [], 0
    for *batch, m, n in shapes:
        rows.append(end)
        cols.append(end + padded(prod(batch) * m))
        end = cols[-1] + padded(prod(batch) * n)
    return tuple(rows), tuple(cols), end


def vector_of(widest: int, *places: tuple[Source, int]) -> int:
    """Return ``widest`` where loads of so many entries are aligned in every source, else 1.

    A single row in memory is followed by none, so the distance to it does not matter.
    """
    aligned = all(
        source.aligned
        and offset % widest == 0
        and source.layout.Q % widest == 0
        and (source.layout.ld % widest == 0 or source.layout.P == 1)
        for source, offset in places
    )
    return widest if aligned else 1
