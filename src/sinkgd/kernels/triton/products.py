"""Products of updates with a few vectors by the kernels of `skinny_matmul`.

The vectors of all matrices lie in two tensors, those with an entry for each row of a matrix and
those with one for each column. A matrix fills whole blocks of 128 rows; zeros follow its own.

Letters: those of `sinkgd.kernels.triton.fields`.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.deflation import Packed
from sinkgd.kernels.backend import Scales
from sinkgd.kernels.triton import launch
from sinkgd.kernels.triton.plan import Source, _vector

BLOCK, ROWS = 128, 64  # those of `sinkgd.kernels.triton.skinny_matmul`
MOST = 32  # vectors of a launch


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
    least: Tensor  # the lesser side of each matrix, (matrices, 1, 1) float64 on the host


@cache
def kernels() -> ModuleType:
    """Return the kernels; they need triton, which takes a while to import."""
    return import_module("sinkgd.kernels.triton.skinny_matmul")


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
    sides = [
        (min(shapes[i][-2:]), *(padded(side) // BLOCK for side in shapes[i][-2:]))
        for _, tensors in buckets
        for i in tensors
        for _ in sources[i].layout.offsets
    ]
    least, row_counts, col_counts = torch.tensor(sides, dtype=torch.int64, device="cpu").unbind(1)
    numbers = torch.arange(end, dtype=torch.int64, device="cpu")
    table = torch.cat(
        [
            torch.tensor(matrices, dtype=torch.int64, device="cpu").flatten(),
            numbers.repeat_interleave(row_counts),
            numbers.repeat_interleave(col_counts),
        ]
    )
    first, rows, cols = zip(*(places[i] for i in range(len(sources))), strict=True)
    return Plan(
        tuple(found), table, end, first, rows, cols, (row_end, col_end),
        (row_counts.contiguous(), col_counts.contiguous()), least.double().view(-1, 1, 1),
    )  # fmt: skip


def _buckets(
    sources: tuple[Source, ...], shapes: tuple[torch.Size, ...], room: int
) -> list[tuple[Kind, list[int]]]:
    """Put tensors of one kind together; those whose vectors are split alike stand in a row."""
    buckets: list[tuple[Kind, list[int]]] = []
    open_: dict[Kind, tuple[list[int], int]] = {}
    for i, (source, shape) in enumerate(zip(sources, shapes, strict=True)):
        wide = 16 // source.dtype.itemsize
        vector = min(_vector(wide, (source, offset)) for offset in source.layout.offsets)
        kind = Kind(source.dtype, source.layout.turned, vector)
        size = shape.numel() * source.dtype.itemsize
        tensors, full = open_.get(kind, ([], 0))
        if not tensors or full + size > room:
            tensors, full = [], 0
            buckets.append((kind, tensors))
        tensors.append(i)
        open_[kind] = tensors, full + size
    return sorted(buckets, key=lambda bucket: bucket[0].dtype != torch.bfloat16)


class SkinnyProducts:
    """Products of the updates of some gradients, on one device.

    Args:
        plan: Of these gradients.
        table: The plan's, on the device.
        counts: The plan's, on the device.
        addresses: Of each gradient, its row scales and its column scales.
        kept: What these are the addresses of.
    """

    def __init__(
        self,
        plan: Plan,
        table: Tensor,
        counts: tuple[Tensor, Tensor],
        addresses: Tensor,
        kept: object,
    ) -> None:
        self.plan, self.device = plan, table.device
        self._kept = kept
        self._addresses, self._matrices = addresses, table
        ends = [end // BLOCK for end in plan.ends]
        self.row_owners, self.col_owners = table[-sum(ends) :].split(ends)
        self._counts = counts
        self._sizes = self._empty(2 * plan.matrices)
        self._squares: Tensor | None = None
        self._start("balance", plan.matrices, {}, self._sizes)

    def of_rows(self, vectors: Tensor, *, shared: bool = False) -> Packed:
        """Return X V of each matrix.

        Args:
            vectors: ``(cols, k)`` float64, with an entry for each column of each matrix.
            shared: Whether the matrices share vectors, which lie where the plan says.
        """
        rows, _ = self._products(vectors, shared=shared, rows=True)
        return self._packed(rows, vectors.shape[-1], of_rows=True)

    def of_cols(self, vectors: Tensor) -> Packed:
        """Return Xᵀ Y of each matrix."""
        _, cols = self._products(vectors, cols=True)
        return self._packed(cols, vectors.shape[-1], of_rows=False)

    def of_both(self, vectors: Tensor, *, shared: bool = False) -> tuple[Packed, Packed]:
        """Return X V and Xᵀ X V of each matrix."""
        rows, cols = self._products(vectors, shared=shared, rows=True, cols=True)
        k = vectors.shape[-1]
        return self._packed(rows, k, of_rows=True), self._packed(cols, k, of_rows=False)

    def squares(self) -> Tensor:
        """Return the square of each Frobenius norm, ``(matrices, 1, 1)`` float64."""
        if self._squares is None:
            none = torch.zeros(self.plan.ends[1], 1, dtype=torch.float64, device=self.device)
            self.of_rows(none)
        assert self._squares is not None
        squares = self._squares.double().view(-1, BLOCK, 1).sum(1, keepdim=True)
        return Packed(squares, self.row_owners, self._counts[0]).sums()

    def _packed(self, vectors: Tensor, k: int, *, of_rows: bool) -> Packed:
        owners = self.row_owners if of_rows else self.col_owners
        blocks = vectors.view(-1, BLOCK, vectors.shape[-1])[..., :k].double()
        return Packed(blocks, owners, self._counts[0 if of_rows else 1])

    def _products(
        self, vectors: Tensor, *, shared: bool = False, rows: bool = False, cols: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Multiply: X by ``vectors`` where ``rows`` are asked for, else Xᵀ; or both in turn."""
        width = vectors.shape[-1]
        K = 16 if width <= 16 else MOST
        results = tuple(
            self._empty(end, K) if asked else self._sizes
            for end, asked in zip(self.plan.ends, (rows, cols), strict=True)
        )
        folded = {
            parts: tuple(
                self._empty(end, parts * K, dtype=_dtype(parts)) if used else self._sizes
                for end, used in zip(self.plan.ends, (cols, rows), strict=True)
            )
            for parts in {self._parts(bucket.kind) for bucket in self.plan.buckets}
        }
        squares = rows and self._squares is None
        if squares:
            self._squares = self._empty(self.plan.ends[0])
        for kind, blocks in self._runs(of_rows=not rows):
            parts = self._parts(kind)
            self._start(
                "fold", len(blocks), {"OF_ROWS": kind.turned == rows, "SHARED": shared, "K": K}
                | {"PARTS": parts},
                self.row_owners if not rows else self.col_owners,
                self._sizes, vectors, folded[parts][rows], blocks.start, width,
            )  # fmt: skip
        for bucket in self.plan.buckets:
            for of_rows in [True] * rows + [False] * cols:
                self._multiply(
                    bucket, results, folded[self._parts(bucket.kind)], K, of_rows=of_rows,
                    squares=of_rows and squares, fold=of_rows and cols,
                )  # fmt: skip
        return results[0], results[1]

    def _multiply(
        self,
        bucket: Bucket,
        results: tuple[Tensor, ...],
        folded: tuple[Tensor, ...],
        K: int,
        *,
        of_rows: bool,
        squares: bool,
        fold: bool,
    ) -> None:
        kind, blocks = bucket.kind, bucket.rows if of_rows else bucket.cols
        along = of_rows != kind.turned
        wide = kind.vector > 1 and kind.dtype.itemsize == 2
        self._start(
            "along" if along else "down",
            len(blocks) * (BLOCK // ROWS),
            {
                "DTYPE": launch.loops().DTYPES[kind.dtype],
                "K": K,
                "BN" if along else "BM": 128 if wide else 64,
                "PARTS": self._parts(kind),
                "SQUARES": squares,
                "FOLD": fold,
                "VECTOR": kind.vector,
            },
            self.row_owners if of_rows else self.col_owners,
            self._sizes,
            folded[1 if of_rows else 0],
            results[0 if of_rows else 1],
            folded[0] if fold else self._sizes,
            self._squares if squares else self._sizes,
            blocks.start,
            1.0,
        )

    def _runs(self, *, of_rows: bool) -> list[tuple[Kind, range]]:
        """Return the blocks of buckets that lie alike and follow each other, as one."""
        runs: list[tuple[Kind, range]] = []
        for kind, rows, cols in self.plan.buckets:
            blocks = rows if of_rows else cols
            if runs and _alike(runs[-1][0], kind):
                runs[-1] = kind, range(runs[-1][1].start, blocks.stop)
            else:
                runs.append((kind, blocks))
        return runs

    def _parts(self, kind: Kind) -> int:
        """Return how many numbers a vector's entry is split into."""
        if kind.dtype == torch.bfloat16:
            return 3
        return 1 if self.device.type == "cuda" and torch.version.hip else 2

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def _start(
        self, name: str, programs: int, constants: dict[str, object], *arguments: object
    ) -> None:
        launch.launch(
            getattr(kernels(), name), programs, self._addresses, self._matrices, *arguments,
            **constants, **options(self.device),
        )  # fmt: skip


def _alike(one: Kind, other: Kind) -> bool:
    return (one.dtype == torch.bfloat16, one.turned) == (
        other.dtype == torch.bfloat16,
        other.turned,
    )


def _dtype(parts: int) -> torch.dtype:
    return torch.bfloat16 if parts == 3 else torch.float32


def options(device: torch.device) -> dict[str, object]:
    """Return the compiler's options for a launch on ``device``."""
    if device.type == "cpu":
        return {}
    hip = torch.version.hip is not None
    warp = getattr(torch.cuda.get_device_properties(device), "warp_size", 32)
    return options_of("hip" if hip else "cuda", warp)


def options_of(target: str, warp: int) -> dict[str, object]:
    """Return the compiler's options: 128 threads, or 256 on ROCm, and tiles fetched ahead."""
    return {
        "num_warps": (128 if target == "cuda" else 256) // warp,
        "num_stages": 3 if target == "cuda" else 2,
        "enable_fp_fusion": True,
    }


def scales_are_usual(scales: Sequence[Scales], device: torch.device) -> bool:
    """Whether the kernels read scales as they are."""
    return all(
        x.dtype == torch.float32 and x.is_contiguous() and x.device == device
        for pair in scales
        for x in pair
    )
