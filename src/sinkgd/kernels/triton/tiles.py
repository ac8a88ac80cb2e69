"""How a matrix is cut into tiles, and tiles are dealt to programs.

Letters: those of `sinkgd.kernels.triton.fields`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Entries of an iteration's tile; each of the threads holds 64 of them in float32. An update's has
# half as many, of the gradient and of the parameter.
AREA = 1 << 14
THREADS = 256
NARROWEST = 16  # sides that a product of matrices has at least
PROGRAMS = 256  # about two for each processor of a large GPU


class Tile(NamedTuple):
    """One shape of tile for a whole launch, by the matrix's shape alone, as sums depend on it."""

    BM: int
    BN: int

    def counts(self, P: int, Q: int) -> tuple[int, int]:
        """Return how many rows and columns of tiles cover a matrix."""
        return -(-P // self.BM), -(-Q // self.BN)


def tile_of(P: int, Q: int, area: int) -> Tile:
    """Return a tile of ``area`` entries: long where the matrix is narrow, else near square."""
    for side in (8, 32):
        if side >= Q:
            return Tile(area // side, side)
        if side >= P:
            return Tile(side, area // side)
    return Tile(area // 128, 128)


def tile_of_product(P: int, Q: int, area: int) -> Tile:
    """Return the same of an update that a product of matrices is subtracted from.

    A square needs the fewest of their rows; a side has at least 16.
    """
    side = NARROWEST
    while side * side < area and side < min(P, Q):
        side *= 2
    return Tile(area // side, side) if Q <= P else Tile(side, area // side)


def lines(matrix: int, count: int, tiles: int, reach: int) -> Tensor:
    """Deal ``count`` lines of ``tiles`` each to programs of ``reach`` tiles: rows of `Program`."""
    line = torch.arange(count, dtype=torch.int64, device="cpu")
    first = torch.arange(0, tiles, reach, dtype=torch.int64, device="cpu")
    line, first = line.repeat(len(first)), first.repeat_interleave(count)
    return torch.stack(
        [torch.full_like(line, matrix), line, first, (first + reach).clamp(max=tiles)], dim=1
    )


def reach_of(count: int, tiles: int, side: int, entry_bytes: int) -> int:
    """Return how many tiles a program takes of one of ``count`` lines of ``tiles``.

    Before it reads a tile it reads ``tiles`` partial sums of 4 bytes for each scale across the
    line. The tiles that it takes, of ``side`` entries for each scale, hold eight times as many
    bytes, as far as there are programs enough for a whole GPU.
    """
    reach = min(-(-tiles * 8 * 4 // (side * entry_bytes)), count * tiles // PROGRAMS)
    return max(1, reach)
