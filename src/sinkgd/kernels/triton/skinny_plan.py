"""The plan of products with a few vectors: where matrices and their vectors lie.

A plan depends on shapes, strides, types and alignment alone, so steps share it.

Letters: those of `sinkgd.kernels.triton.fields`.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.kernels.triton.places import Source, vector_of

BLOCK, ROWS = 128, 64  # those of `sinkgd.kernels.triton.skinny_matmul`


class Kind(NamedTuple):
    """What kernels are compiled for."""

    dtype: torch.dtype
    turned: bool  # a row in memory is a column of the matrix
    vector: int  # entries in 16 bytes where loads are that wide, else 1


class Bucket(NamedTuple):
    """Matrices whose gradients stay in the cache from one product to the other."""

    kind: Kind
    rows: range  # blocks of vectors with an entry for each row
    cols: range


class Plan(NamedTuple):
    """Where matrices and vectors lie."""

    buckets: tuple[Bucket, ...]
    table: Tensor  # int64, on the host: matrices, owners of the blocks of rows and of columns
    matrices: int
    first: tuple[int, ...]  # of each tensor, its first matrix
    rows: tuple[int, ...]  # where the vectors of its rows begin
    cols: tuple[int, ...]
    ends: tuple[int, int]  # of all
    counts: tuple[Tensor, Tensor]  # blocks of each matrix, int64 on the host
    sides: Tensor  # of each matrix the lesser one, and its entries: (2, matrices) float64 there
    tensors: Tensor | None  # matrices of each tensor, int64 there; None where each has one


def padded(length: int) -> int:
    """Return the rows of vectors that a side of ``length`` fills."""
    return -(-length // BLOCK) * BLOCK


@lru_cache(maxsize=64)
def plan_of_products(
    sources: tuple[Source, ...],
    shapes: tuple[torch.Size, ...],
    given: tuple[int, ...],
    room: int,
) -> Plan:
    """Plan products with gradients of ``shapes``, in buckets of ``room`` bytes.

    Args:
        sources: The gradients.
        shapes: Theirs.
        given: Where each one's first vectors lie, with an entry for each column, among all of them.
        room: Bytes of gradients in a bucket; a larger gradient is alone in one.
    """
    buckets = _buckets(sources, shapes, room)
    number = end = row_end = col_end = 0
    places: dict[int, tuple[int, int, int]] = {}
    matrices: list[tuple[int, ...]] = []
    found = []
    for kind, tensors in buckets:
        begin = row_end, col_end
        for i in tensors:
            places[i] = number, row_end, col_end
            (m, n), layout = shapes[i][-2:], sources[i].layout
            for k, offset in enumerate(layout.offsets):
                row = 3 * i + 1, k * m, row_end, 2 * number, 0
                col = 3 * i + 2, k * n, col_end, 2 * number + 1, given[i]
                tall, wide = (col, row) if layout.turned else (row, col)
                sides = [x for pair in zip(tall, wide, strict=True) for x in pair]
                matrices.append((3 * i, offset, layout.P, layout.Q, layout.ld, *sides))
                number, row_end, col_end = number + 1, row_end + padded(m), col_end + padded(n)
        blocks = (
            range(start // BLOCK, stop // BLOCK)
            for start, stop in zip(begin, (row_end, col_end), strict=True)
        )
        found.append(Bucket(kind, *blocks))
        end = number
    sizes = [
        (min(m, n), m * n, padded(m) // BLOCK, padded(n) // BLOCK)
        for _, tensors in buckets
        for i in tensors
        for m, n in [shapes[i][-2:]] * len(sources[i].layout.offsets)
    ]
    numbers = torch.tensor(sizes, dtype=torch.int64, device="cpu").unbind(1)
    *least_and_entries, row_counts, col_counts = numbers
    batches = [len(sources[i].layout.offsets) for _, tensors in buckets for i in tensors]
    every = torch.arange(end, dtype=torch.int64, device="cpu")
    table = torch.cat(
        [
            torch.tensor(matrices, dtype=torch.int64, device="cpu").flatten(),
            every.repeat_interleave(row_counts),
            every.repeat_interleave(col_counts),
        ]
    )
    first, rows, cols = zip(*(places[i] for i in range(len(sources))), strict=True)
    return Plan(
        tuple(found), table, end, first, rows, cols, (row_end, col_end),
        (row_counts.contiguous(), col_counts.contiguous()), torch.stack(least_and_entries).double(),
        None if len(batches) == end else torch.tensor(batches, dtype=torch.int64, device="cpu"),
    )  # fmt: skip


def _buckets(
    sources: tuple[Source, ...], shapes: tuple[torch.Size, ...], room: int
) -> list[tuple[Kind, list[int]]]:
    """Put tensors of one kind together; those whose vectors are split alike stand in a row."""
    buckets: list[tuple[Kind, list[int]]] = []
    open_: dict[Kind, tuple[list[int], int]] = {}
    for i, (source, shape) in enumerate(zip(sources, shapes, strict=True)):
        wide = 16 // source.dtype.itemsize
        vector = min(vector_of(wide, (source, offset)) for offset in source.layout.offsets)
        kind = Kind(source.dtype, source.layout.turned, vector)
        size = shape.numel() * source.dtype.itemsize
        tensors, full = open_.get(kind, ([], 0))
        if not tensors or full + size > room:
            tensors, full = [], 0
            buckets.append((kind, tensors))
        tensors.append(i)
        open_[kind] = tensors, full + size
    return sorted(buckets, key=lambda bucket: bucket[0].dtype != torch.bfloat16)
