"""Half iterations and updates, tile by tile: tiles, the plan of a call, and its launches.

A bucket has the matrices that are launched together. They are of one kind. If their gradients are
small enough, they stay in the cache from one half iteration to the next. Finding the scales of a
bucket takes two launches per iteration and one more; an update takes one launch. Nothing waits for
the device. The scales of a matrix have the same bits in any bucket. A plan depends only on shapes,
strides, types and alignment, so steps share it.

Letters: as in `sinkgd.kernels.triton.tables`.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sinkgd.kernels.eager import no_movement
from sinkgd.kernels.triton import launch
from sinkgd.kernels.triton.launch import GpuTarget, kernels, multiplies_tf32
from sinkgd.kernels.triton.tables import (
    ALIGNED_FLOATS,
    HalfMatrix,
    Operand,
    TableBuilder,
    TableRows,
    UpdateMatrix,
    padded,
    scale_offsets,
    vector_width,
)

Row = TypeVar("Row")

# The most entries of a tile in an iteration; each thread has 64 of them in float32. A tile of an
# update is at most half as large, since an update loads both the gradient and the parameter.
AREA = 1 << 14
THREADS = 256
NARROWEST_DOT = 16  # the least side of a tile that is a product of matrices
PROGRAMS = 256  # about two for each processor of a large GPU


class Tile(NamedTuple):
    """The shape of a matrix's tiles, which decides the bits of sums; no other matrix affects it."""

    BM: int
    BN: int

    def counts(self, P: int, Q: int) -> tuple[int, int]:
        """Return how many rows and columns of tiles cover a matrix."""
        return -(-P // self.BM), -(-Q // self.BN)


def tile_of(P: int, Q: int, area: int) -> Tile:
    """Return a tile of ``area`` entries: long if the matrix is narrow, else nearly square."""
    for side in (8, 32):
        if side >= Q:
            return Tile(area // side, side)
        if side >= P:
            return Tile(side, area // side)
    return Tile(area // 128, 128)


def tile_of_product(P: int, Q: int, area: int) -> Tile:
    """Return a tile of ``area`` entries for an update that subtracts a product of matrices.

    A square tile needs the fewest rows of these matrices; a side has at least 16 entries.
    """
    side = NARROWEST_DOT
    while side * side < area and side < min(P, Q):
        side *= 2
    return Tile(area // side, side) if Q <= P else Tile(side, area // side)


def tiles_per_program(count: int, tiles: int, side: int, entry_bytes: int) -> int:
    """Return how many tiles of a line one program processes.

    A line is a row or a column of tiles. There are ``count`` lines of ``tiles`` tiles each.

    For each of its scales a program first reads ``tiles`` partial sums of 4 bytes. Each of its
    tiles has ``side`` entries for each scale. The program processes enough tiles for these entries
    to have eight times as many bytes as the partial sums, or fewer if a whole GPU needs more
    programs.
    """
    most = min(-(-tiles * 8 * 4 // (side * entry_bytes)), count * tiles // PROGRAMS)
    return max(1, most)


def tile_programs(matrix: int, count: int, tiles: int, per_program: int) -> Tensor:
    """Divide ``count`` lines of ``tiles`` tiles among programs; return rows of `TileProgram`."""
    line = torch.arange(count, dtype=torch.int64, device="cpu")
    first = torch.arange(0, tiles, per_program, dtype=torch.int64, device="cpu")
    line, first = line.repeat(len(first)), first.repeat_interleave(count)
    end = (first + per_program).clamp(max=tiles)
    return torch.stack([torch.full_like(line, matrix), line, first, end], dim=1)


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    dtypes: tuple[torch.dtype, ...]  # of the gradient; in an update, of parameter and gradient
    tile: Tile
    transposed: bool
    vector: int  # entries of the narrowest type in 16 bytes if loads are that wide, else 1
    rank: int = 0  # `LowRankSides.width` of the matrix that an update subtracts; 0 for none
    is_dense: bool = False  # as in `LowRankSides`


class Bucket(NamedTuple):
    """What one launch works on."""

    kind: Kind
    matrices: TableRows
    for_rows: TableRows  # programs that sum rows in memory; in an update, all programs
    for_cols: TableRows  # programs that sum columns


class Plan(NamedTuple):
    """Buckets, and the sizes of what they share."""

    buckets: tuple[Bucket, ...]
    table: Tensor  # int64, on the host
    rows: tuple[int, ...] = ()  # for each tensor, the offset of its row scales among all scales
    cols: tuple[int, ...] = ()  # the same for its column scales
    scales: int = 0  # entries of all scales
    sums: int = 0  # entries of the partial sums of the largest bucket
    matrices: int = 0  # number of matrices


def _fill(
    found: Iterable[tuple[Kind, int, Row]], bucket_bytes: int
) -> list[tuple[Kind, list[Row]]]:
    """Put table rows of one kind together, in order, up to ``bucket_bytes`` of gradients."""
    buckets: list[tuple[Kind, list[Row]]] = []
    open_: dict[Kind, tuple[list[Row], int]] = {}
    for kind, size, row in found:
        rows, filled = open_.get(kind, ([], 0))
        if not rows or filled + size > bucket_bytes:
            rows, filled = [], 0
            buckets.append((kind, rows))
        rows.append(row)
        open_[kind] = rows, filled + size
    return buckets


def _area(vector: int) -> int:
    """Return how many entries a tile has: fewer if loads are narrow and need more addresses."""
    return AREA if vector > 1 else AREA // 2


@lru_cache(maxsize=64)
def plan_of_scales(
    grads: tuple[Operand, ...], shapes: tuple[torch.Size, ...], bucket_bytes: int
) -> Plan:
    """Plan half iterations, in buckets of up to ``bucket_bytes`` of gradients."""
    rows, cols, entries = scale_offsets(shapes)
    found: list[tuple[Kind, int, HalfMatrix]] = []
    for tensor, (grad, shape) in enumerate(zip(grads, shapes, strict=True)):
        P, Q, ld, transposed, offsets = grad.layout
        size = grad.dtype.itemsize
        u, v = (cols[tensor], rows[tensor]) if transposed else (rows[tensor], cols[tensor])
        for i, offset in enumerate(offsets):
            vector = vector_width(16 // size, (grad, offset))
            kind = Kind((grad.dtype,), tile_of(P, Q, _area(vector)), transposed, vector)
            scales = u + i * P, v + i * Q, i * shape[-1]
            found.append((kind, P * Q * size, HalfMatrix(tensor, offset, P, Q, ld, *scales)))
    table = TableBuilder()
    buckets, sums, number = [], 0, 0
    for kind, matrices in _fill(found, bucket_bytes):
        size = kind.dtypes[0].itemsize
        placed, for_rows, for_cols, end = [], [], [], 0
        for i, matrix in enumerate(matrices):
            tall, wide = kind.tile.counts(matrix.P, matrix.Q)
            middle = end + wide * padded(matrix.P)
            placed.append(matrix._replace(row_sums=end, col_sums=middle, number=number + i))
            end = middle + tall * padded(matrix.Q)
            of_row = tiles_per_program(wide, tall, kind.tile.BM, size)
            of_col = tiles_per_program(tall, wide, kind.tile.BN, size)
            for_rows.append(tile_programs(i, wide, tall, of_row))
            for_cols.append(tile_programs(i, tall, wide, of_col))
        added = (
            table.add(torch.tensor(placed, dtype=torch.int64, device="cpu")),
            table.add(*for_rows),
            table.add(*for_cols),
        )
        buckets.append(Bucket(kind, *added))
        sums, number = max(sums, end), number + len(placed)
    return Plan(tuple(buckets), table.build(), rows, cols, entries, sums, number)


class Scratch(NamedTuple):
    """What the launches of a call write."""

    scales: tuple[Tensor, Tensor]  # float32, used alternately; the first has the result
    sums: Tensor  # partial sums of one bucket, float32
    nonzero: Tensor  # how many row and column scales of each matrix are not zero, int32
    # For each iteration an int32 vector: for each matrix, whether some row scale moved. None
    # without tol
    moved: Tensor | None

    def scales_of(self, iteration: int, num_iters: int) -> Tensor:
        """Return the tensor of an iteration's scales; the last iteration has the first tensor."""
        return self.scales[(num_iters - iteration) % 2]

    def moved_in(self, iteration: int, num_iters: int) -> Tensor:
        """Return whether row scales moved in an iteration; ignore the result without ``tol``."""
        if self.moved is None:
            return self.nonzero  # not read
        return self.moved[min(max(iteration, 0), num_iters)]


def new_scratch(plan: Plan, num_iters: int, tol: float | None, device: torch.device) -> Scratch:
    """Allocate what the launches of ``plan`` write."""
    scales = torch.empty(2, plan.scales, dtype=torch.float32, device=device)
    sums = torch.empty(plan.sums, dtype=torch.float32, device=device)
    nonzero = torch.zeros(2 * plan.matrices, dtype=torch.int32, device=device)
    moved = None
    if tol is not None:
        width = -(-plan.matrices // ALIGNED_FLOATS) * ALIGNED_FLOATS  # each vector is aligned
        moved = torch.zeros(num_iters + 1, width, dtype=torch.int32, device=device)
        moved[:2] = 1  # the first iteration has nothing to be compared with
    return Scratch((scales[0], scales[1]), sums, nonzero, moved)


def find_scales(
    bucket: Bucket,
    scratch: Scratch,
    table: Tensor,
    addresses: tuple[Tensor, Tensor],
    num_iters: int,
    tol: float | None,
) -> None:
    """Run ``num_iters`` iterations on a bucket.

    Args:
        bucket: Matrices of one kind.
        scratch: Receives scales and sums.
        table: The table of the plan, on the device.
        addresses: Addresses of the gradients, and of their initial column scales or 0.
        num_iters: Iterations, at least 1.
        tol: Stop iterating a matrix once no row scale changes by more than this fraction; None to
            run all iterations.
    """
    square_sums = kernels("square_sums")
    target = launch.target_of(table.device)
    bounds = no_movement(0.0 if tol is None else tol)
    origins = (square_sums.START, square_sums.LENGTHS, square_sums.LENGTHS)
    common = {
        "DTYPE": kernels("primitives").DTYPES[bucket.kind.dtypes[0]],
        "BM": bucket.kind.tile.BM,
        "BN": bucket.kind.tile.BN,
        "TOL": scratch.moved is not None,
        "VECTOR": bucket.kind.vector,
    }
    for half in range(2 * num_iters + 1):
        done, of_cols = divmod(half, 2)
        old, new = (scratch.scales_of(done + of_cols - i, num_iters) for i in (1, 0))
        in_memory = bool(of_cols) == bucket.kind.transposed  # whether rows in memory are summed
        programs = bucket.for_rows if in_memory else bucket.for_cols
        launch.launch(
            square_sums.half_iteration,
            programs.rows,
            *addresses,
            table[bucket.matrices.offset :],
            table[programs.offset :],
            *(old, new, scratch.scales[0], scratch.sums, scratch.nonzero),
            *(scratch.moved_in(i, num_iters) for i in (done - 1, done, done + 1)),
            *(done, *bounds),
            AXIS=int(in_memory),
            ROWS=not of_cols,
            FROM=origins[half] if half < len(origins) else square_sums.SQUARES,
            SUMS=half < 2 * num_iters,
            **common,
            **options_of(target, wide=bucket.kind.vector > 1, first=half < 2),
        )


class LowRankSides(NamedTuple):
    """The two sides of a matrix of low rank that an update subtracts, as stored in memory."""

    rank: int
    left: tuple[int, ...]  # strides of the left side
    right: tuple[int, ...]  # strides of the right side
    aligned: bool  # whether the first entries of both sides are aligned to 16 bytes

    @property
    def width(self) -> int:
        """Return the rank rounded up to a number that kernels are compiled for."""
        return max(NARROWEST_DOT, 1 << (self.rank - 1).bit_length())

    @property
    def is_dense(self) -> bool:
        """Whether rows are dense, have `width` entries, and begin at multiples of 16 bytes."""
        strides = [stride for side in (self.left, self.right) for stride in side[:-1]]
        full = self.rank == self.width and self.left[-1] == self.right[-1] == 1
        return self.aligned and full and all(stride % ALIGNED_FLOATS == 0 for stride in strides)


class UpdateFactors(NamedTuple):
    """The factors of an update; tensors are on the device of the gradients."""

    keep: float | Tensor = 1.0
    step: float | Tensor = 0.0
    overflow: Tensor | None = None
    is_cautious: bool = False  # whether ``keep`` is `sinkgd.kernels.backend.Cautious`


class UpdateOperands(NamedTuple):
    """What an update of one parameter reads and writes."""

    param: Operand
    grad: Operand
    subtracted: LowRankSides | None = None


@lru_cache(maxsize=64)
def plan_of_update(
    updates: tuple[UpdateOperands, ...], shapes: tuple[torch.Size, ...], bucket_bytes: int
) -> Plan:
    """Plan the update of parameters, in buckets of up to ``bucket_bytes`` of gradients."""
    found: list[tuple[Kind, int, UpdateMatrix]] = []
    for tensor, (to, shape) in enumerate(zip(updates, shapes, strict=True)):
        P, Q, ld, transposed, offsets = to.param.layout
        dtypes = to.param.dtype, to.grad.dtype
        entry_steps = (1, shape[-1]) if transposed else (shape[-1], 1)
        widest = 16 // min(dtype.itemsize for dtype in dtypes)
        for i, (at, grad_at) in enumerate(zip(offsets, to.grad.layout.offsets, strict=True)):
            vector = vector_width(widest, (to.param, at), (to.grad, grad_at))
            matrix = UpdateMatrix(
                tensor, at, grad_at, P, Q, ld, to.grad.layout.ld, i * P, i * Q,
                i * P * Q, *entry_steps,
            )  # fmt: skip
            if to.subtracted is None:
                kind = Kind(dtypes, tile_of(P, Q, _area(vector) // 2), transposed, vector)
            else:
                low_rank = _low_rank_fields(to.subtracted, shape, i, transposed=transposed)
                matrix = matrix._replace(**low_rank)
                width = to.subtracted.width
                tile = tile_of_product(P, Q, _area(vector) // (4 if width <= NARROWEST_DOT else 8))
                kind = Kind(dtypes, tile, transposed, vector, width, to.subtracted.is_dense)
            found.append((kind, P * Q * dtypes[1].itemsize, matrix))
    table = TableBuilder()
    buckets = []
    for kind, matrices in _fill(found, bucket_bytes):
        rows = torch.tensor(matrices, dtype=torch.int64, device="cpu")
        tiles = [tile_programs(i, *kind.tile.counts(x.P, x.Q), 1) for i, x in enumerate(matrices)]
        buckets.append(Bucket(kind, table.add(rows), table.add(*tiles), TableRows(0, 0)))
    return Plan(tuple(buckets), table.build())


def _low_rank_fields(
    sides: LowRankSides, shape: torch.Size, number: int, *, transposed: bool
) -> dict[str, int]:
    """Return the fields of matrix ``number`` that say what is subtracted from its update."""
    rest = number
    index: list[int] = []
    for size in reversed(shape[:-2]):
        rest, place = divmod(rest, size)
        index.insert(0, place)
    tall, wide = (sides.right, sides.left) if transposed else (sides.left, sides.right)
    begin = [sum(i * s for i, s in zip(index, own[:-2], strict=True)) for own in (tall, wide)]
    return {
        "rank": sides.rank,
        "factor": number,
        "tall": begin[0],
        "tall_ld": tall[-2],
        "tall_col_step": tall[-1],
        "wide": begin[1],
        "wide_ld": wide[-2],
        "wide_col_step": wide[-1],
    }


def update_parameters(
    bucket: Bucket,
    table: Tensor,
    addresses: Tensor,
    factors: UpdateFactors,
    *,
    rounding: bool,
) -> None:
    """Update the parameters of a bucket, as `sinkgd.kernels.backend.Backend.update_` defines.

    Args:
        bucket: Matrices of one kind.
        table: The table of the plan, on the device.
        addresses: Rows of `UpdateAddresses`, one for each parameter.
        factors: Factors of the update; tensors on the device are read there. ``overflow`` is not
            read.
        rounding: Whether bfloat16 is rounded at random, by the keys in ``addresses``.
    """
    dtypes = kernels("primitives").DTYPES
    dtype, grad_dtype = bucket.kind.dtypes
    target = launch.target_of(table.device)
    launch.launch(
        kernels("update").update,
        bucket.for_rows.rows,
        addresses,
        table[bucket.matrices.offset :],
        table[bucket.for_rows.offset :],
        factors.keep,
        factors.step,
        DTYPE=dtypes[dtype],
        GRAD_DTYPE=dtypes[grad_dtype],
        KEEP_IS_STORED=isinstance(factors.keep, Tensor),
        STEP_IS_STORED=isinstance(factors.step, Tensor),
        BM=bucket.kind.tile.BM,
        BN=bucket.kind.tile.BN,
        ROUND=rounding and dtype == torch.bfloat16,
        CAUTIOUS=factors.is_cautious,
        VECTOR=bucket.kind.vector,
        K=bucket.kind.rank,
        DENSE=bucket.kind.is_dense,
        TF32=multiplies_tf32(target),
        **options_of(target, wide=bucket.kind.vector > 1, product=bucket.kind.rank > 0),
    )


def options_of(
    target: GpuTarget | None, *, wide: bool, first: bool = False, product: bool = False
) -> dict[str, object]:
    """Return the compiler's options, such that no kernel runs out of registers.

    Args:
        target: None for the interpreter.
        wide: Whether loads are of 16 bytes; narrow loads need more registers for their addresses.
        first: Whether this is the first iteration, which finds powers of two besides the sums.
        product: Whether this is an update that subtracts a product of matrices.
    """
    if target is None:
        return {}
    threads = THREADS // 2 if product else THREADS
    if target.backend == "hip" and not wide:
        threads *= 4 if first else 2  # so that scalar registers hold the masks of all loads
    options: dict[str, object] = {"num_warps": threads // target.warp, "enable_fp_fusion": True}
    if target.backend == "cuda" and wide and not first:
        # With these limits, two programs share a processor and hide each other's latency; with a
        # product, three do.
        options["maxnreg"] = 168 if product else 128
    return options
