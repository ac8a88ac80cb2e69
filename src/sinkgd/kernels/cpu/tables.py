"""The tables that tell the compiled loops what to do, and the Python classes that fill them.

A table has a row of int64 fields for each matrix or tensor. The constants below are the fields'
offsets in bytes. A loop receives the address of the job's header, which has the address of the
table.

Letters, everywhere in the loops. A matrix is seen as it is stored in memory:
    P, Q: its rows in memory and their length; the last stride is 1
    LD: bytes from one row in memory to the next
    U, V: addresses of the float32 scales of rows and columns in memory; of their squares, while
        the scales are being found
    TRANSPOSED: a row in memory is a column of the matrix, so an iteration finds V first
"""

from array import array
from typing import NamedTuple

import torch

from sinkgd.kernels.cpu.launch import launch, scratch
from sinkgd.kernels.cpu.layout import MatrixLayout
from sinkgd.kernels.eager import no_movement

# A gradient G, and the parameter W that it updates; W is 0 if there is none.
#     DTYPE: `F32` or `BF16` of `sinkgd.kernels.cpu.layout`
#     STARTED: the column scales, squared, are given
#     FAILED: set by the loops if they found no scales
#     ALLOWED: address of a bool that allows the update, or 0
#     KEYED: round stochastically, by KEY. INDEX is the position of the first entry in the
#         parameter, read row by row
#     CAUTIOUS: the factor of W is `sinkgd.kernels.backend.Cautious`
#     RANK: the rank of a matrix LEFT @ RIGHT that is added to U∘G∘V, or 0. LEFT is (P, RANK); RIGHT
#         is (Q/16, RANK, 16): RANK vectors for every sixteen columns
(
    G, P, Q, LD, DTYPE, TRANSPOSED, U, V, STARTED, FAILED,
    W, WLD, WDTYPE, ALLOWED, KEYED, KEY, CAUTIOUS, INDEX, RANK, LEFT, RIGHT,
) = range(0, 168, 8)  # fmt: skip
GRADIENT_FIELDS = 21
# A contiguous tensor X to check. NONFINITE is set by the loops.
(X, ENTRIES, XDTYPE, NONFINITE) = range(0, 32, 8)
FINITE_FIELDS = 4
# A gradient whose squares are summed with weights. If ALONG, each row in memory is summed, with
# WEIGHTS of columns and into SUMS of rows; else each column, with weights of rows and into sums of
# columns.
(SG, SP, SQ, SLD, SDTYPE, ALONG, WEIGHTS, SUMS) = range(0, 64, 8)
SUMS_FIELDS = 8
# An update X = U∘G∘V to multiply with BLOCKS blocks of sixteen vectors.
#     COL_VECTORS: (Q, 16·BLOCKS), or 0 if ROW_VECTORS is given
#     ROW_VECTORS: (P, 16·BLOCKS), given, or receives X @ COL_VECTORS
#     COL_PRODUCTS: (Q, 16·BLOCKS), receives Xᵀ @ ROW_VECTORS, or 0
#     SQUARES: (P,), receives the sums of squares of rows of X, if COL_VECTORS is given
(
    MG, MP, MQ, MLD, MDTYPE, MU, MV, BLOCKS, COL_VECTORS, ROW_VECTORS, COL_PRODUCTS, SQUARES,
) = range(0, 96, 8)  # fmt: skip
PRODUCTS_FIELDS = 12
# The header of a job. Every job has the fields up to NEXT, which is the number of the next matrix
# or block to claim.
#     FLOATS: address of four doubles: the factors of parameter and update, then the least and the
#         largest quotient of squared scales that count as no movement (0: not tested)
#     TILES: scratch of `TILE_BYTES` per thread
#     ITERS: number of iterations
#     SCRATCH: STRIDE bytes per thread
#     SHARED_ABOVE: all threads share a matrix with more entries; one thread processes a smaller one
(TABLE, COUNT, WORKERS, NEXT, FLOATS, TILES, ITERS, SCRATCH, STRIDE, SHARED_ABOVE) = range(0, 80, 8)
ARRIVED = 256  # number of arrivals of threads at barriers; on a cache line of its own

VECTORS = 16  # vectors in a block: as many as a SIMD vector has lanes

# A tile of an update. Two tiles and their vectors stay in an L1 cache of 32 KiB.
TILE_ROWS, TILE_COLUMNS = 16, 128
TILE_BYTES = 4 * TILE_ROWS * (TILE_COLUMNS + VECTORS)  # and sixteen numbers for each row

# A pass over a matrix of up to this many entries costs less than the barriers between threads that
# would share it.
SINGLE_THREAD = 1 << 16


class Target(NamedTuple):
    """A parameter that is updated by a gradient of the same shape and order in memory."""

    param: int  # address
    layout: MatrixLayout
    flag: int = 0  # address of a bool that allows the update, or 0
    key: int | None = None  # for stochastic rounding
    rank: int = 0  # rank of the correction that is added to the update
    left: int = 0  # addresses of the factors from `low_rank_factors`
    right: int = 0
    is_cautious: bool = False  # as `sinkgd.kernels.backend.Cautious`


class GradientTable:
    """Gradients whose scales are to be found, or that are to update parameters, or both.

    Args:
        keep: The factor of the parameters.
        step: The factor of the updates, which are added to the parameters.
    """

    def __init__(self, keep: float = 1.0, step: float = 0.0) -> None:
        self.factors = keep, step
        self.fields: list[int] = []
        self.longest = 0
        self.entries = 0

    def add(
        self,
        grad: int,
        layout: MatrixLayout,
        scales: tuple[int, int],
        target: Target | None = None,
        *,
        started: bool = False,
    ) -> None:
        """Add every matrix of a gradient.

        Args:
            grad: Address of the gradient.
            layout: Layout of the gradient.
            scales: Addresses of its row and column scales: float32, matrix by matrix.
            target: The parameter that the gradient updates.
            started: Whether the column scales are already set to the first c².
        """
        P, Q, ld, dtype, transposed, offsets = layout[:6]
        u, v = (scales[1], scales[0]) if transposed else scales
        if target is None:
            params, how = (0,) * len(offsets), (0, 0, 0, 0, 0, 0)
            rank = left = right = 0
        else:
            param, written, flag, key, rank, left, right, is_cautious = target
            params = tuple(param + offset for offset in written.offsets)
            how = (written.ld, written.dtype, flag, key is not None, key or 0, is_cautious)
        index = 0
        for offset, param in zip(offsets, params, strict=True):
            self.fields += (
                grad + offset, P, Q, ld, dtype, transposed, u, v, started, 0, param, *how, index,
                rank, left, right,
            )  # fmt: skip
            u += 4 * P
            v += 4 * Q
            left += 4 * P * rank
            right += 4 * rank * -(-Q // VECTORS) * VECTORS
            index += P * Q
        self.longest = max(self.longest, Q)
        self.entries += index

    def find_scales(self, num_iters: int, tol: float | None = None) -> list[int]:
        """Find the scales, and update the targets of the matrices whose scales were found.

        Returns:
            The indices of the matrices for which no scales were found, in the order of `add`.
        """
        # Two vectors per thread, each after 128 bytes for flags. No two threads share a cache line.
        stride = 2 * 128 * (4 * self.longest // 128 + 2)
        buffer = scratch(torch.get_num_threads() * stride)
        quotients = (0.0, 0.0) if tol is None else no_movement(tol)
        table = self._launch("find_scales", quotients, 0, num_iters, buffer, stride, SINGLE_THREAD)
        failed = table[FAILED // 8 :: GRADIENT_FIELDS]
        return [i for i, status in enumerate(failed) if status] if any(failed) else []

    def update(self) -> None:
        """Update the parameters by known scales."""
        tiles = scratch(torch.get_num_threads() * TILE_BYTES)
        self._launch("update", (0.0, 0.0), tiles)

    def _launch(self, function: str, quotients: tuple[float, float], *more: int) -> "array[int]":
        floats = array("d", (*self.factors, *quotients))
        table = array("q", self.fields)
        address, _ = floats.buffer_info()
        launch(function, table, GRADIENT_FIELDS, self.entries, address, *more)
        return table


class SumsTable:
    """A table, built once and run repeatedly, of gradients whose squares are summed with weights.

    The buffers of weights and sums are float32, matrix by matrix.
    """

    def __init__(self) -> None:
        self.fields: list[int] = []
        self.longest = 0
        self.entries = 0
        self._table: array[int] | None = None

    def add(self, grad: int, layout: MatrixLayout, weights: int, sums: int, *, rows: bool) -> None:
        """Add every matrix of a gradient.

        Args:
            grad: Address of the gradient.
            layout: Layout of the gradient.
            weights: Address of the weights: of columns for sums of ``rows``, else of rows.
            sums: Address of the sums.
            rows: Whether rows are summed.
        """
        P, Q, ld, dtype, transposed, offsets = layout[:6]
        along = rows != transposed
        for offset in offsets:
            self.fields += (grad + offset, P, Q, ld, dtype, along, weights, sums)
            weights += 4 * (Q if along else P)
            sums += 4 * (P if along else Q)
        self.longest = max(self.longest, Q)
        self.entries += P * Q * len(offsets)

    def run(self) -> None:
        """Compute the sums."""
        if self._table is None:
            self._table = array("q", self.fields)
        stride = 128 * (4 * self.longest // 128 + 2)
        buffer = scratch(torch.get_num_threads() * stride)
        launch("weighted_sums", self._table, SUMS_FIELDS, self.entries, 0, 0, 0, buffer, stride)


class Vectors(NamedTuple):
    """Addresses of the vectors that a matrix is multiplied with, and of the products; 0 if absent.

    Shapes and contents of the buffers are as in the table of products above.
    """

    blocks: int  # of sixteen vectors each
    col_vectors: int
    row_vectors: int
    col_products: int
    squares: int


class ProductsTable:
    """Updates X = row * grad * col to multiply with a few vectors, in one pass."""

    def __init__(self) -> None:
        self.fields: list[int] = []
        self.longest = 0
        self.entries = 0

    def add(
        self, grad: int, layout: MatrixLayout, scales: tuple[int, int], vectors: Vectors, *, i: int
    ) -> None:
        """Add the ``i``-th matrix of a gradient.

        Args:
            grad: Address of the gradient.
            layout: Layout of the gradient.
            scales: Addresses of the row and column scales of this matrix, float32.
            vectors: What the matrix is multiplied with, and the products.
            i: The index of the matrix in the gradient.
        """
        P, Q, ld, dtype, transposed, offsets = layout[:6]
        u, v = (scales[1], scales[0]) if transposed else scales
        self.fields += (grad + offsets[i], P, Q, ld, dtype, u, v, *vectors)
        length = VECTORS * vectors.blocks * Q if vectors.col_products else 0
        self.longest = max(self.longest, length)
        self.entries += P * Q

    def run(self) -> None:
        """Compute the products."""
        # Two buffers of sums per thread, used alternately. No two threads share a cache line.
        stride, threads = 2 * 128 * (4 * self.longest // 128 + 2), torch.get_num_threads()
        buffer = scratch(threads * (stride + TILE_BYTES))
        more = 0, buffer + threads * stride, 0, buffer, stride, SINGLE_THREAD
        launch("multiply", array("q", self.fields), PRODUCTS_FIELDS, self.entries, *more)


class FiniteTable:
    """Tensors to check for NaN and infinity."""

    def __init__(self) -> None:
        self.fields: list[int] = []
        self.entries = 0

    def add(self, address: int, entries: int, dtype: int) -> None:
        """Add a contiguous tensor."""
        self.fields += (address, entries, dtype, 0)
        self.entries += entries

    def run(self) -> list[bool]:
        """Return, for each tensor in the order of `add`, whether all its entries are finite."""
        table = array("q", self.fields)
        launch("isfinite", table, FINITE_FIELDS, self.entries)
        return [not bad for bad in table[NONFINITE // 8 :: FINITE_FIELDS]]
