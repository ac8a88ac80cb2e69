"""What a method keeps between steps, for how long, and where that is said.

Letters, everywhere in this file:
    m, n: the sides of a matrix, rows and columns
    r: the rank of a projection
    L: iterations of SR-Sinkhorn
    k: directions whose singular values are lowered
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

_FLOAT32 = 4  # bytes
ITERATIONS = 5  # L: Scetbon et al., algorithm 4

# What ranks tell each other about the matrices of which they hold pieces.
# "rows": sums of rows alone, once.
Exchange = Literal["nothing", "vectors", "rows", "matrices", "projections"]


@dataclass(frozen=True)
class Method:
    """An optimizer: what it does to the matrices of blocks; the rest is AdamW's, or its own."""

    name: str
    title: str
    formula: str  # of the state
    source: str
    matrix: float = 0.0  # numbers that an entry of a matrix keeps
    column: float = 0.0  # float32 that a column of a matrix keeps
    wide: bool = False  # what an entry of a matrix or table keeps is float32, whatever the weight's
    rest: float = 2.0  # that an entry outside of the matrices keeps
    # Numbers for a whole matrix instead, from its shorter and its longer side and r.
    low_rank: Callable[[int, int, int], float] | None = None
    # Numbers for a whole embedding or head instead, from its shorter and its longer side.
    table: Callable[[int, int], float] | None = None
    head_alone: bool = False  # of the tables, keeps it
    scalars: int = 0  # numbers of every parameter besides
    counted: Literal["all", "rest", "vectors", "none"] = "rest"  # which parameters count steps
    counts: int = 1  # float32 that each of them counts with
    eight_bit: bool = False  # both moments in 8 bits, of all entries
    can_release: bool = False  # in `sinkgd.lab.train.recipes`, or as published
    exchange: Exchange = "nothing"
    iterations: int = ITERATIONS  # of an exchange of vectors
    passes: int = 7  # readings and writings of a matrix in a step
    scratch: float = 0.0  # matrices in float32 while one is updated, the largest that there is
    batched: bool = False  # small matrices of one shape are updated together
    directions: int = 0  # k that are deflated, for a few gradients at a time
    everywhere: bool = False  # embedding and head are updated as matrices are
    flops: Callable[[int, int], float] = lambda short, long: 0.0 * short * long  # of its products

    def state_bytes(self, m: int, n: int, itemsize: int, r: int) -> float:
        """Return what a matrix keeps; 8-bit Adam keeps `eight_bit_bytes` instead.

        Args:
            m: Rows, of a piece where the state is kept by entry.
            n: Columns.
            itemsize: Bytes of a weight.
            r: Rank of a projection.
        """
        if self.low_rank is not None:
            return itemsize * self.low_rank(min(m, n), max(m, n), r)
        return self._size(itemsize) * self.matrix * m * n + _FLOAT32 * self.column * n

    def table_bytes(self, m: int, n: int, itemsize: int, *, is_head: bool) -> float:
        """Return what an embedding or a head keeps, of a method with a rule for tables."""
        assert self.table is not None
        if self.head_alone and not is_head:
            return 0.0
        return self._size(itemsize) * self.table(min(m, n), max(m, n))

    def counts_steps(self, *, is_matrix: bool, is_table: bool) -> bool:
        """Whether a parameter of this kind counts its steps."""
        return {
            "all": True,
            "rest": not is_matrix,
            "vectors": not (is_matrix or is_table),
            "none": False,
        }[self.counted]

    def _size(self, itemsize: int) -> int:
        return max(itemsize, _FLOAT32) if self.wide else itemsize


def eight_bit_bytes(entries: int) -> float:
    """Return what 8-bit Adam keeps: two bytes an entry, two float32 for every 256 of them.

    Below 4,096 entries it keeps float32 (bitsandbytes, ``min_8bit_size``).
    """
    return 8.0 * entries if entries < 4096 else 2.0 * entries + 8.0 * entries / 256


def usual_rank(hidden_size: int) -> int:
    """Return r as GaLore's benchmark has it: a quarter of the hidden size, 256 at 768."""
    return 256 if hidden_size == 768 else max(1, hidden_size // 4)
