"""The plan of a call: matrices in buckets, and the tables that tell the kernels where they lie.

A plan depends on shapes, strides, types and alignment alone, so steps share it. A bucket is what
one launch works on: matrices of one type and one shape of tile, so few that their gradients stay in
the cache from one half of an iteration to the next. A matrix has the same bits in any bucket.

Letters: those of `sinkgd.kernels.triton.fields`.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sinkgd.kernels.triton.fields import Matrix, Target
from sinkgd.kernels.triton.places import (
    FLOATS,
    Part,
    Source,
    TableRows,
    padded,
    places_of_scales,
    vector_of,
)
from sinkgd.kernels.triton.tiles import (
    AREA,
    NARROWEST,
    Tile,
    lines,
    reach_of,
    tile_of,
    tile_of_product,
)

Row = TypeVar("Row")


class Taken(NamedTuple):
    """A matrix of low rank that is subtracted from an update, as its two sides lie."""

    rank: int
    left: tuple[int, ...]  # strides
    right: tuple[int, ...]
    aligned: bool  # the first entries of both, to 16 bytes

    @property
    def width(self) -> int:
        """Return the rank rounded up to what kernels are compiled for."""
        return max(NARROWEST, 1 << (self.rank - 1).bit_length())

    @property
    def is_dense(self) -> bool:
        """Whether rows of numbers fill that width, and all of them are aligned."""
        steps = [step for side in (self.left, self.right) for step in side[:-1]]
        full = self.rank == self.width and self.left[-1] == self.right[-1] == 1
        return self.aligned and full and all(step % FLOATS == 0 for step in steps)


class Destination(NamedTuple):
    """A parameter as the kernels write it, and its gradient beside it."""

    param: Source
    grad: Source
    taken: Taken | None = None


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    dtypes: tuple[torch.dtype, ...]
    tile: Tile
    turned: bool
    vector: int  # entries of the narrowest type in 16 bytes where loads are that wide, else 1
    width: int = 0  # of what an update subtracts, `Taken.width`; 0 where nothing is
    is_dense: bool = False  # as in `Taken`


class Bucket(NamedTuple):
    """What one launch works on."""

    kind: Kind
    matrices: Part
    for_rows: Part  # programs that sum rows in memory, walking down; in an update, all there are
    for_cols: Part  # programs that sum columns, walking along


class Plan(NamedTuple):
    """Buckets, and the sizes of what they share."""

    buckets: tuple[Bucket, ...]
    table: Tensor  # int64, on the host
    rows: tuple[int, ...] = ()  # of each tensor, where its row scales begin among all scales
    cols: tuple[int, ...] = ()
    scales: int = 0  # entries, of all of them
    sums: int = 0  # entries, of the partial sums of one bucket
    matrices: int = 0


@lru_cache(maxsize=64)
def plan_of_scales(sources: tuple[Source, ...], shapes: tuple[torch.Size, ...], room: int) -> Plan:
    """Plan the iterations on gradients of ``shapes``; a bucket has ``room`` bytes of them."""
    rows, cols, entries = places_of_scales(shapes)
    found: list[tuple[Kind, int, Matrix]] = []
    for owner, (source, shape) in enumerate(zip(sources, shapes, strict=True)):
        P, Q, ld, turned, offsets = source.layout
        size = source.dtype.itemsize
        u, v = (cols[owner], rows[owner]) if turned else (rows[owner], cols[owner])
        for i, offset in enumerate(offsets):
            vector = vector_of(16 // size, (source, offset))
            kind = Kind((source.dtype,), tile_of(P, Q, _area(vector)), turned, vector)
            scales = u + i * P, v + i * Q, i * shape[-1]
            found.append((kind, P * Q * size, Matrix(owner, offset, P, Q, ld, *scales)))
    table = TableRows()
    buckets, sums, number = [], 0, 0
    for kind, matrices in _fill(found, room):
        size = kind.dtypes[0].itemsize
        placed, for_rows, for_cols, end = [], [], [], 0
        for i, matrix in enumerate(matrices):
            tall, wide = kind.tile.counts(matrix.P, matrix.Q)
            middle = end + wide * padded(matrix.P)
            placed.append(matrix._replace(row_sums=end, col_sums=middle, number=number + i))
            end = middle + tall * padded(matrix.Q)
            for_rows.append(lines(i, wide, tall, reach_of(wide, tall, kind.tile.BM, size)))
            for_cols.append(lines(i, tall, wide, reach_of(tall, wide, kind.tile.BN, size)))
        parts = (
            table.add(torch.tensor(placed, dtype=torch.int64, device="cpu")),
            table.add(*for_rows),
            table.add(*for_cols),
        )
        buckets.append(Bucket(kind, *parts))
        sums, number = max(sums, end), number + len(placed)
    return Plan(tuple(buckets), table.joined(), rows, cols, entries, sums, number)


@lru_cache(maxsize=64)
def plan_of_update(
    destinations: tuple[Destination, ...], shapes: tuple[torch.Size, ...], room: int
) -> Plan:
    """Plan the update of parameters of ``shapes``; a bucket has ``room`` bytes of gradients."""
    found: list[tuple[Kind, int, Target]] = []
    for owner, (to, shape) in enumerate(zip(destinations, shapes, strict=True)):
        P, Q, ld, turned, offsets = to.param.layout
        dtypes = to.param.dtype, to.grad.dtype
        step = (1, shape[-1]) if turned else (shape[-1], 1)
        widest = 16 // min(dtype.itemsize for dtype in dtypes)
        for i, (at, grad_at) in enumerate(zip(offsets, to.grad.layout.offsets, strict=True)):
            vector = vector_of(widest, (to.param, at), (to.grad, grad_at))
            scales = i * P, i * Q
            target = Target(
                owner, at, grad_at, P, Q, ld, to.grad.layout.ld, *scales, i * P * Q, *step
            )
            if to.taken is None:
                kind = Kind(dtypes, tile_of(P, Q, _area(vector) // 2), turned, vector)
            else:
                target = target._replace(**_taken(to.taken, shape, i, turned=turned))
                area = _area(vector) // (4 if to.taken.width <= NARROWEST else 8)
                tile = tile_of_product(P, Q, area)
                lower = to.taken.width, to.taken.is_dense
                kind = Kind(dtypes, tile, turned, vector, *lower)
            found.append((kind, P * Q * dtypes[1].itemsize, target))
    table = TableRows()
    buckets = []
    for kind, targets in _fill(found, room):
        tiles = [lines(i, *kind.tile.counts(to.P, to.Q), 1) for i, to in enumerate(targets)]
        parts = table.add(torch.tensor(targets, dtype=torch.int64, device="cpu")), table.add(*tiles)
        buckets.append(Bucket(kind, *parts, Part(0, 0)))
    return Plan(tuple(buckets), table.joined())


def _taken(taken: Taken, shape: torch.Size, number: int, *, turned: bool) -> dict[str, int]:
    """Return what a target knows of what is subtracted from the ``number``-th matrix."""
    rest = number
    index: list[int] = []
    for size in reversed(shape[:-2]):
        rest, place = divmod(rest, size)
        index.insert(0, place)
    tall, wide = (taken.right, taken.left) if turned else (taken.left, taken.right)
    begin = [sum(i * s for i, s in zip(index, own[:-2], strict=True)) for own in (tall, wide)]
    return {
        "rank": taken.rank,
        "factor": number,
        "tall": begin[0],
        "tall_ld": tall[-2],
        "tall_apart": tall[-1],
        "wide": begin[1],
        "wide_ld": wide[-2],
        "wide_apart": wide[-1],
    }


def _area(vector: int) -> int:
    """Return the entries of a tile; where loads are narrow, their addresses fill registers."""
    return AREA if vector > 1 else AREA // 2


def _fill(found: Iterable[tuple[Kind, int, Row]], room: int) -> list[tuple[Kind, list[Row]]]:
    """Put rows of one kind together, in order, until they exceed ``room`` bytes."""
    buckets: list[tuple[Kind, list[Row]]] = []
    open_: dict[Kind, tuple[list[Row], int]] = {}
    for kind, size, row in found:
        rows, filled = open_.get(kind, ([], 0))
        if not rows or filled + size > room:
            rows, filled = [], 0
            buckets.append((kind, rows))
        rows.append(row)
        open_[kind] = rows, filled + size
    return buckets
