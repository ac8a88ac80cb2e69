"""What a method costs: state, messages, passes over memory, matrix products.

A method is an optimizer, or LoRA. A pass is one read or one write of all entries of a matrix.

Letters:
    m, n: rows and columns of a matrix
    r: rank of a projection
    L: iterations of SR-Sinkhorn
    k: number of directions whose singular values deflation lowers
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sinkgd.contrib.adamw_8bit import BLOCK, MIN_8BIT_SIZE

_FLOAT32 = 4  # bytes
ITERATIONS = 5  # L: Scetbon et al., algorithm 4

# What ranks exchange about the matrices whose shards they hold. "vectors": sums of rows and columns
# in each iteration; "rows": only sums of rows, once; "projections": matrices of low rank.
Exchange = Literal["nothing", "vectors", "rows", "matrices", "projections"]


class Sides(NamedTuple):
    """The part of a matrix that a rank holds."""

    m: int
    n: int
    r: int  # `Method.memory_rank`, but at most the sides of the whole matrix


@dataclass(frozen=True)
class Sums:
    """Numbers of each matrix that a message adds up, besides those of the iterations."""

    # Over ranks that hold other columns, or other rows; "sides": over each of them, in one message
    # if a group shards rows of some matrices and columns of others.
    over: Literal["columns", "rows", "sides"]
    numbers: Callable[[Sides], int]


@dataclass(frozen=True)
class Method:
    """A method's costs for hidden matrices and for all other parameters.

    By default the other parameters cost what they cost with AdamW.
    """

    name: str
    title: str
    formula: str  # the size of the state, as text for people
    source: str
    matrix: float = 0.0  # numbers kept for each entry of a matrix
    column: float = 0.0  # float32 numbers kept for each column of a matrix
    row: float = 0.0  # the same for each row
    each: int = 0  # float32 numbers kept for each matrix
    # Whether numbers kept for matrices, embeddings and head are float32 for weights of every type.
    always_float32: bool = False
    rest: float = 2.0  # numbers kept for each entry of other parameters, such as norms
    # Replaces the four fields from `matrix` to `each`: numbers kept for a whole matrix, given its
    # shorter side, longer side and r.
    low_rank: Callable[[int, int, int], float] | None = None
    # Replaces `rest` for embeddings and head: numbers kept for a whole embedding or head, given its
    # shorter and its longer side.
    embedding: Callable[[int, int], float] | None = None
    head_only: bool = False  # `embedding` applies only to the head; embeddings keep no state
    scalars: int = 0  # further numbers kept for each parameter
    # The parameters that have step counters.
    step_counters_of: Literal["all", "rest", "vectors", "none"] = "rest"
    counters: int = 1  # float32 counters of each such parameter
    eight_bit: Literal["all", "rest", "none"] = "none"  # the parameters whose moments take 8 bits
    adapter_rank: int = 0  # of LoRA adapters; above 0, only the adapters are trained
    can_release: bool = False  # whether gradients can be applied inside backward
    least_micro_batches: int = 1  # of a step
    exchange: Exchange = "nothing"
    iterations: int = ITERATIONS  # exchanges of vectors in a step
    sums: tuple[Sums, ...] = ()  # further messages of a step that exchanges vectors, in order
    # How flags for non-finite gradients, one for each matrix, are sent before the iterations: in a
    # message of their own, or in the first of `sums`.
    flags: Literal["none", "alone", "shared"] = "none"
    in_parts: bool = False  # whether a few matrices at a time take the step, with own messages
    memory_rank: int = 0  # r of `Sides`
    passes: int = 7  # reads and writes of a matrix in a step
    scratch: float = 0.0  # float32 copies of the largest matrix during its update
    copies: int = 0  # number of float32 copies of all updates that are processed together
    batched: bool = False  # whether small matrices of one shape are updated together
    directions: int = 0  # k; 0 without deflation; `peak_memory` computes deflation's scratch
    keeps_directions: bool = False  # whether deflation starts from directions of the last step
    everywhere: bool = False  # whether embeddings and head are updated like matrices
    flops: Callable[[int, int], float] = lambda short, long: (
        0.0 * short * long
    )  # operations of matrix products

    def state_bytes(self, m: int, n: int, itemsize: int, r: int) -> float:
        """Return the bytes of a matrix's state; 8-bit Adam keeps `eight_bit_bytes` instead.

        Args:
            m: Rows of the matrix if `low_rank` is set, else of its shard.
            n: Columns.
            itemsize: Bytes of each weight.
            r: Rank of a projection.
        """
        if self.low_rank is not None:
            return itemsize * self.low_rank(min(m, n), max(m, n), r)
        vectors = self.row * m + self.column * n + self.each
        return self._size(itemsize) * self.matrix * m * n + _FLOAT32 * vectors

    def embedding_bytes(self, m: int, n: int, itemsize: int, *, is_head: bool) -> float:
        """Return the bytes of the state of an embedding or a head, from `embedding`."""
        assert self.embedding is not None
        if self.head_only and not is_head:
            return 0.0
        return self._size(itemsize) * self.embedding(min(m, n), max(m, n))

    def has_step_counter(self, *, is_matrix: bool, is_embedding: bool) -> bool:
        """Whether a parameter of this kind has a step counter.

        Args:
            is_matrix: Whether the parameter is a hidden matrix.
            is_embedding: Whether the parameter is an embedding or a head.
        """
        return {
            "all": True,
            "rest": not is_matrix,
            "vectors": not (is_matrix or is_embedding),
            "none": False,
        }[self.step_counters_of]

    def is_eight_bit(self, *, is_matrix: bool) -> bool:
        """Whether the moments of a parameter of this kind take 8 bits."""
        return self.eight_bit == "all" or (self.eight_bit == "rest" and not is_matrix)

    def _size(self, itemsize: int) -> int:
        return max(itemsize, _FLOAT32) if self.always_float32 else itemsize


def eight_bit_bytes(entries: int) -> float:
    """Return the bytes of 8-bit Adam's state: two per entry, and two float32 per 256 entries.

    Tensors below 4,096 entries have float32 state (bitsandbytes, ``min_8bit_size``).
    """
    return 8.0 * entries if entries < MIN_8BIT_SIZE else 2.0 * entries + 8.0 * -(-entries // BLOCK)


def usual_rank(hidden_size: int) -> int:
    """Return r as in GaLore's benchmark: a quarter of the hidden size, but 256 at size 768."""
    return 256 if hidden_size == 768 else max(1, hidden_size // 4)
