"""The plan of products of updates with a few vectors: where matrices and their vectors are stored.

The vectors of all matrices are stored in two tensors: one for vectors with an entry for each row of
a matrix, one for those with an entry for each column. The vectors of a matrix fill whole blocks of
128 rows of these tensors, padded with zeros. A plan depends only on shapes, strides, types and
alignment, so steps share it.

Letters: as in `sinkgd.kernels.triton.tables`.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.kernels.triton.tables import Operand, ProductMatrix, vector_width

BLOCK = 128  # rows of vectors; each matrix fills whole blocks
ROWS = 64  # rows of a product that one program computes


class Kind(NamedTuple):
    """What kernels are compiled for."""

    dtype: torch.dtype
    transposed: bool  # a row in memory is a column of the matrix
    vector: int  # entries in 16 bytes if loads are that wide, else 1


class Bucket(NamedTuple):
    """Matrices that are multiplied by vectors in the same launches.

    If their gradients are small enough, these stay in the cache from one product to the other.
    """

    kind: Kind
    rows: range  # blocks of vectors with an entry for each row
    cols: range


class Plan(NamedTuple):
    """Where matrices and vectors are stored."""

    buckets: tuple[Bucket, ...]
    # int64, on the host: the numbers of every `ProductMatrix`; then, for each block of rows and
    # each block of columns, the index of its matrix
    table: Tensor
    matrices: int
    first: tuple[int, ...]  # for each tensor, the index of its first matrix
    ends: tuple[int, int]  # how many rows the two tensors of vectors have
    counts: tuple[Tensor, Tensor]  # numbers of blocks of each matrix, int64 on the host
    # For each matrix, its shorter side and its number of entries: (2, matrices) float64 on the host
    sides: Tensor
    # The number of matrices of each tensor, int64 on the host; None if each has one matrix
    tensors: Tensor | None


def padded_rows(length: int) -> int:
    """Return how many rows of vectors a side of ``length`` fills."""
    return -(-length // BLOCK) * BLOCK


@lru_cache(maxsize=64)
def plan_of_products(
    grads: tuple[Operand, ...],
    shapes: tuple[torch.Size, ...],
    shared: tuple[int, ...],
    bucket_bytes: int,
) -> Plan:
    """Plan products with gradients of ``shapes``, in buckets of up to ``bucket_bytes``.

    Args:
        grads: The gradients.
        shapes: Shapes of the gradients.
        shared: For each gradient, where its vectors begin in the tensor of the vectors that several
            gradients use. These have an entry for each column.
        bucket_bytes: Most bytes of gradients in a bucket; a larger gradient has its own bucket.
    """
    filled = _fill(grads, shapes, bucket_bytes)
    number = row_end = col_end = 0
    first: dict[int, int] = {}
    matrices: list[ProductMatrix] = []
    sizes: list[tuple[int, int, int, int]] = []
    buckets = []
    for kind, tensors in filled:
        begin = row_end, col_end
        for i in tensors:
            first[i] = number
            (m, n), layout = shapes[i][-2:], grads[i].layout
            for k, offset in enumerate(layout.offsets):
                row = 3 * i + 1, k * m, row_end, 2 * number, 0
                col = 3 * i + 2, k * n, col_end, 2 * number + 1, shared[i]
                tall, wide = (col, row) if kind.transposed else (row, col)
                sides = [x for pair in zip(tall, wide, strict=True) for x in pair]
                matrices.append(ProductMatrix(3 * i, offset, layout.P, layout.Q, layout.ld, *sides))
                sizes.append((min(m, n), m * n, padded_rows(m) // BLOCK, padded_rows(n) // BLOCK))
                number += 1
                row_end, col_end = row_end + padded_rows(m), col_end + padded_rows(n)
        blocks = (
            range(start // BLOCK, stop // BLOCK)
            for start, stop in zip(begin, (row_end, col_end), strict=True)
        )
        buckets.append(Bucket(kind, *blocks))
    *sides_and_entries, row_counts, col_counts = _int64(sizes).unbind(1)
    owners = torch.arange(number, dtype=torch.int64, device="cpu")
    table = torch.cat(
        [
            _int64(matrices).flatten(),
            owners.repeat_interleave(row_counts),
            owners.repeat_interleave(col_counts),
        ]
    )
    batches = [len(grads[i].layout.offsets) for _, tensors in filled for i in tensors]
    return Plan(
        tuple(buckets), table, number, tuple(first[i] for i in range(len(grads))),
        (row_end, col_end), (row_counts.contiguous(), col_counts.contiguous()),
        torch.stack(sides_and_entries).double(),
        None if len(batches) == number else _int64(batches),
    )  # fmt: skip


def _fill(
    grads: tuple[Operand, ...], shapes: tuple[torch.Size, ...], bucket_bytes: int
) -> list[tuple[Kind, list[int]]]:
    """Put tensors of one kind together.

    The buckets of bfloat16 come first, so that few launches scale the vectors of all buckets.
    """
    buckets: list[tuple[Kind, list[int]]] = []
    open_: dict[Kind, tuple[list[int], int]] = {}
    for i, (grad, shape) in enumerate(zip(grads, shapes, strict=True)):
        wide = 16 // grad.dtype.itemsize
        vector = min(vector_width(wide, (grad, offset)) for offset in grad.layout.offsets)
        kind = Kind(grad.dtype, grad.layout.transposed, vector)
        size = shape.numel() * grad.dtype.itemsize
        tensors, full = open_.get(kind, ([], 0))
        if not tensors or full + size > bucket_bytes:
            tensors, full = [], 0
            buckets.append((kind, tensors))
        tensors.append(i)
        open_[kind] = tensors, full + size
    return sorted(buckets, key=lambda bucket: bucket[0].dtype != torch.bfloat16)


def _int64(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu")
