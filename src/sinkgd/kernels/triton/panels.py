"""How a matrix is cut into panels of whole rows, and panels are dealt to programs.

Letters: those of `sinkgd.kernels.triton.fields`, and
    A, B: columns of the two tiles side by side that hold a row; B is 0 where one is enough
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.kernels.triton.tiles import AREA, PROGRAMS

LONGEST = 1 << 14  # entries of a row that a program's registers hold
FEWEST_THREADS, MOST_THREADS = 64, 512
NARROWEST = 4  # columns of a tile
# Rows of a program at least: its partial sums, of 5 bytes a column in the first launch and of 4 in
# the others, are then an eighth or a tenth of its entries in bfloat16.
FEWEST = 20
FAN_IN = 8  # programs whose partial sums one of them adds up, and groups of programs again
# Entries of a panel, a thread. Half as many where loads are narrow, whose addresses take registers,
# and in panels of few rows, where a thread has scales and sums of nearly as many columns.
ENTRIES, FEW_ROWS = 64, 4


class Panel(NamedTuple):
    """BM whole rows in memory, as two tiles; by the matrix's shape alone, as sums depend on it."""

    BM: int
    A: int
    B: int


def panel_of(P: int, Q: int) -> Panel:
    """Return the panel of a matrix whose rows are at most `LONGEST`."""
    A = max(NARROWEST, _power_of_two_from(Q + 1) // 2)
    B = 0
    if Q > A:
        B = max(NARROWEST, A // 16, _power_of_two_from(Q - A))
    if B >= A:
        A, B = 2 * A, 0
    area = AREA if B == 0 and _wide(Q) else AREA // 2  # two tiles take more registers
    BM = _power_of_two_from(area // (A + B) + 1) // 2
    return Panel(max(1, min(BM, _power_of_two_from(P))), A, B)


def threads_of(panel: Panel, Q: int) -> int:
    """Return how many threads hold a panel."""
    entries = ENTRIES if _wide(Q) and panel.BM >= FEW_ROWS else ENTRIES // 2
    whole = _power_of_two_from(panel.BM * (panel.A + panel.B))
    return min(max(FEWEST_THREADS, whole // entries), MOST_THREADS)


def _wide(Q: int) -> bool:
    """Whether loads of 16 bytes may divide a row; addresses of narrow ones fill registers."""
    return Q % 8 == 0


def halved(panel: Panel, threads: int) -> tuple[Panel, int]:
    """Return half a panel, where it has rows enough, and half its threads, at more registers."""
    if threads <= FEWEST_THREADS:
        return panel, threads
    return panel._replace(BM=max(1, panel.BM // 2)), threads // 2


def walks(block: int, P: int, panel: Panel) -> Tensor:
    """Deal the rows of a matrix to programs: rows of `Walk`.

    A program has so many rows that its partial sums are a small part of its entries; a large matrix
    has programs enough for a whole GPU, a small one shares the GPU with others.
    """
    rows = -(-max(FEWEST, P // PROGRAMS) // panel.BM) * panel.BM
    first = torch.arange(0, P, rows, dtype=torch.int64, device="cpu")
    number = torch.arange(len(first), dtype=torch.int64, device="cpu")
    return torch.stack(
        [torch.full_like(first, block), number, first, (first + rows).clamp(max=P)], dim=1
    )


def _power_of_two_from(x: int) -> int:
    """Return the least power of two that is not below ``x``."""
    return 1 << max(0, x - 1).bit_length()
