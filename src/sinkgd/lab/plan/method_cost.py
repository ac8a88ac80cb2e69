"""What an optimizer costs on paper: state, messages, passes over memory and products.

Letters:
    m, n: sides of a matrix, rows and columns
    r: rank of a projection
    L: iterations of SR-Sinkhorn
    k: directions whose singular values are lowered
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

_FLOAT32 = 4  # bytes
ITERATIONS = 5  # L: Scetbon et al., algorithm 4

# What ranks exchange about the matrices whose shards they hold. "rows": sums of rows alone, once.
Exchange = Literal["nothing", "vectors", "rows", "matrices", "projections"]


@dataclass(frozen=True)
class Method:
    """An optimizer's costs on block matrices, and on all other parameters (AdamW's by default)."""

    name: str
    title: str
    formula: str  # of the state, as text
    source: str
    matrix: float = 0.0  # numbers kept for each entry of a matrix
    column: float = 0.0  # float32 numbers kept for each column of a matrix
    wide: bool = False  # numbers kept for matrices and tables are float32 for any type of weights
    rest: float = 2.0  # numbers kept for each entry of other parameters
    # Instead: numbers kept for a whole matrix, from its shorter side, its longer side and r.
    low_rank: Callable[[int, int, int], float] | None = None
    # Instead: numbers kept for a whole embedding or head, from its shorter and its longer side.
    table: Callable[[int, int], float] | None = None
    head_alone: bool = False  # of the tables, only the head keeps state
    scalars: int = 0  # further numbers kept for each parameter
    counted: Literal["all", "rest", "vectors", "none"] = "rest"  # which parameters count steps
    counts: int = 1  # float32 counters of each such parameter
    eight_bit: bool = False  # both moments in 8 bits, of all entries
    can_release: bool = False  # whether gradients can be applied inside backward
    exchange: Exchange = "nothing"
    iterations: int = ITERATIONS  # exchanges of vectors in a step
    passes: int = 7  # reads and writes of a matrix in a step
    scratch: float = 0.0  # float32 copies of the largest matrix during its update
    batched: bool = False  # small matrices of one shape are updated together
    directions: int = 0  # k; deflation takes a few gradients at a time
    everywhere: bool = False  # embedding and head are updated like matrices
    flops: Callable[[int, int], float] = lambda short, long: (
        0.0 * short * long
    )  # of matrix products

    def state_bytes(self, m: int, n: int, itemsize: int, r: int) -> float:
        """Return the bytes of a matrix's state; 8-bit Adam keeps `eight_bit_bytes` instead.

        Args:
            m: Rows, of a shard if the state is kept by entry.
            n: Columns.
            itemsize: Bytes of each weight.
            r: Rank of a projection.
        """
        if self.low_rank is not None:
            return itemsize * self.low_rank(min(m, n), max(m, n), r)
        return self._size(itemsize) * self.matrix * m * n + _FLOAT32 * self.column * n

    def table_bytes(self, m: int, n: int, itemsize: int, *, is_head: bool) -> float:
        """Return the bytes of the state of an embedding or a head, by the method's rule for it."""
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
    """Return the bytes of 8-bit Adam's state: two an entry, and two float32 for every 256 entries.

    Tensors below 4,096 entries have float32 state (bitsandbytes, ``min_8bit_size``).
    """
    return 8.0 * entries if entries < 4096 else 2.0 * entries + 8.0 * entries / 256


def usual_rank(hidden_size: int) -> int:
    """Return r as in GaLore's benchmark: a quarter of the hidden size, 256 at 768."""
    return 256 if hidden_size == 768 else max(1, hidden_size // 4)
