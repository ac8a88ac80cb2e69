"""SR-Sinkhorn of sharded matrices: ranks add up vectors, and each finds its shard's scales.

With S = G∘G an iteration is r² = n / (S c²), c² = m / (Sᵀ r²). A rank has its shard of G, and the
scales of its own rows and columns. It lacks the sums over the other shards. So ranks exchange
vectors, one number per row or column of a shard, and never a matrix.

Letters, everywhere in this file:
    r2, c2: the squares of the scales of this rank's rows and columns, float64, of all matrices
    live: how many rows or columns of a matrix are not zero, over all ranks

Zero rows and columns have the scale 0. If they counted, the other scales would drift: r by a factor
per iteration, c by its inverse. So m and n are counted without them, except in the first half step,
which uses the true n, and in the last half step of each matrix, which uses the true m. All ranks of
a matrix make the same decisions, since they decide by sums that all of them know.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.distributed.all_reduce import all_ranks_agree
from sinkgd.distributed.shards import Sharding
from sinkgd.exchange import Steps, computation, sums_in_turn
from sinkgd.kernels import Backend, Descent, Matrices, Scales
from sinkgd.kernels.eager import no_movement
from sinkgd.kernels.equilibrate import scales_of


@computation
def solve_sharded(
    backend: Backend,
    shardings: Sequence[Sharding],
    matrices: Matrices,
    num_iters: int,
    *,
    tol: float | None = None,
) -> Steps[Descent]:
    """Find the scales of sharded matrices, and which gradients are finite on all ranks.

    A computation for `exchange`.

    Args:
        backend: The backend that computes the sums of this rank's shards.
        shardings: How the matrices are sharded, in the order of the matrices.
        matrices: As for `Backend.descend_`. Parameters are not written.
        num_iters: Iterations L.
        tol: As for `Backend.scales`.
    """
    scales, flags = yield find_scales(
        matrices.grads, shardings, backend, num_iters, tol=tol, starts=matrices.starts
    )
    finite = torch.stack([flags[own.start : own.stop].all() for own in matrices.ranges])
    # Ranks that hold other matrices of a batch did not take part in the sums.
    others = [shardings[own.start].batch_groups for own in matrices.ranges]
    finite = yield all_ranks_agree(finite, others)
    return Descent(finite, scales)


class Found(NamedTuple):
    """The result of the iterations for some matrices."""

    scales: list[Scales]  # of this rank's rows and columns
    finite: Tensor  # (matrices,) bool: whether gradients are finite on all ranks that share them


@computation
def find_scales(
    grads: Sequence[Tensor],
    shardings: Sequence[Sharding],
    backend: Backend,
    num_iters: int,
    *,
    tol: float | None = None,
    starts: Sequence[Tensor | None] | None = None,
) -> Steps[Found]:
    """Find the scales of sharded matrices.

    A computation for `exchange`: every rank that holds a shard of a matrix must run it, with the
    same matrices in the same order. It costs ``num_iters`` messages per process group, or fewer if
    ``tol`` stops it, whatever the number of matrices. It costs one more message if a group shards
    rows of some matrices and columns of others, and no order of the groups suits all of them.

    Args:
        grads: This rank's shards, ``(..., m, n)``; some may be empty.
        shardings: How the matrices are sharded.
        backend: The backend that computes the sums of this rank's shards.
        num_iters: Iterations L.
        tol: As in `sinkgd.kernels.Backend.scales`. Each iteration then waits for the device.
        starts: As in `sinkgd.kernels.Backend.scales`, for this rank's shards.
    """
    begin = [None] * len(grads) if starts is None else list(starts)
    kinds: dict[object, list[int]] = {}
    for i, sharding in enumerate(shardings):
        kinds.setdefault((sharding.sum_groups, grads[i].device), []).append(i)
    computations = [
        _iterate(
            [grads[i] for i in members],
            [shardings[i] for i in members],
            [begin[i] for i in members],
            backend,
            num_iters,
            tol,
        )
        for members in kinds.values()
    ]
    results = yield computations
    by_index = {
        i: (scales, flag)
        for members, found in zip(kinds.values(), results, strict=True)
        for i, scales, flag in zip(members, found.scales, found.finite.unbind(), strict=True)
    }
    pairs = [by_index[i] for i in range(len(grads))]
    return Found([scales for scales, _ in pairs], torch.stack([flag for _, flag in pairs]))


@computation
def _iterate(
    grads: Sequence[Tensor],
    shardings: Sequence[Sharding],
    starts: Sequence[Tensor | None],
    backend: Backend,
    num_iters: int,
    tol: float | None,
) -> Steps[Found]:
    """Find the scales of matrices whose sums are added up over the same groups."""
    groups_over_cols, groups_over_rows = shardings[0].sum_groups
    sums = backend.sums(grads)
    device = grads[0].device
    rows = _Vectors([(*grad.shape[:-1], 1) for grad in grads], device)
    cols = _Vectors([(*grad.shape[:-2], 1, grad.shape[-1]) for grad in grads], device)
    m = rows.of_matrices([sharding.rows for sharding in shardings])
    n = rows.of_matrices([sharding.cols for sharding in shardings])
    low, high = no_movement(0.0 if tol is None else tol)
    r2, c2 = rows.ones(), _initial_c2(cols, starts)
    live_cols = n
    moving = torch.ones_like(m, dtype=torch.bool)
    for number in range(num_iters):
        row_sums = torch.cat([sums.of_rows(c2), live_cols])
        yield from sums_in_turn(row_sums, groups_over_cols, groups_over_rows)
        row_sums, counted = torch.split(row_sums, [rows.length, len(m)])
        last, new = r2, _inverse(rows.spread(counted if number else n), row_sums)
        moved = rows.count(~((new >= low * last) & (new <= high * last)))
        r2 = new if tol is None else torch.where(rows.spread(moving), new, last)
        live_rows = rows.count((r2 != 0) + 0 * r2)  # the count is not finite if a scale is not
        col_sums = torch.cat([sums.of_cols(r2), live_rows, moved])
        yield from sums_in_turn(col_sums, groups_over_rows)
        col_sums, live_rows, moved = torch.split(col_sums, [cols.length, len(m), len(m)])
        converged = (moved == 0) & (tol is not None and number > 0)
        length = m if number == num_iters - 1 else torch.where(converged, m, live_rows)
        new = _inverse(cols.spread(length), col_sums)
        c2 = new if tol is None else torch.where(cols.spread(moving), new, c2)
        live_cols = cols.count(c2 != 0)
        moving = moving & ~converged
        if tol is not None and not bool(moving.any()):
            break
    scales = _scales_of(rows.split(r2.sqrt()), cols.split(c2.sqrt()), [x.dtype for x in grads])
    return Found(scales, rows.all_of(live_rows.isfinite()))


def _scales_of(
    rows: Sequence[Tensor], cols: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> list[Scales]:
    """Call `scales_of` once for all gradients of one shape and dtype."""
    alike: dict[object, list[int]] = {}
    for i, (row, col) in enumerate(zip(rows, cols, strict=True)):
        alike.setdefault((row.shape, col.shape, dtypes[i]), []).append(i)
    found: dict[int, Scales] = {}
    for own in alike.values():
        together = scales_of(
            torch.stack([rows[i] for i in own]),
            torch.stack([cols[i] for i in own]),
            torch.promote_types(dtypes[own[0]], torch.float32),
        )
        pairs = zip(together.row.unbind(), together.col.unbind(), strict=True)
        found.update(zip(own, map(Scales._make, pairs), strict=True))
    return [found[i] for i in range(len(rows))]


def _initial_c2(cols: "_Vectors", starts: Sequence[Tensor | None]) -> Tensor:
    """Return the squares of the initial column scales: 1 if no start is given."""
    c2 = cols.ones()
    for own, start in zip(cols.split(c2), starts, strict=True):
        if start is not None:
            own.copy_(start.double().square())
    return c2


class _Vectors:
    """One number per row, or per column, of all matrices, in one flat tensor.

    Args:
        shapes: The shape of each batch of vectors, ``(..., m, 1)`` or ``(..., 1, n)``.
        device: The device of the vectors.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        self.shapes = [torch.Size(shape) for shape in shapes]
        self.counts = [shape[:-2].numel() for shape in self.shapes]  # matrices in each batch
        lengths = [shape[-2:].numel() for shape in self.shapes]
        self.length = sum(shape.numel() for shape in self.shapes)
        self._owners = _owners(tuple(lengths), tuple(self.counts), device)

    def ones(self) -> Tensor:
        return torch.ones(self.length, dtype=torch.float64, device=self._owners.device)

    def split(self, flat: Tensor) -> list[Tensor]:
        parts = torch.split(flat, [shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def of_matrices(self, numbers: Sequence[int]) -> Tensor:
        """Repeat the number of each batch for every matrix in it."""
        return _repeated(tuple(numbers), tuple(self.counts), self._owners.device)

    def spread(self, numbers: Tensor) -> Tensor:
        """Repeat the number of each matrix for every entry of its vector."""
        return numbers.index_select(0, self._owners)

    def count(self, flat: Tensor) -> Tensor:
        """Add up the entries of each matrix's vector."""
        total = torch.zeros(sum(self.counts), dtype=torch.float64, device=flat.device)
        return total.index_add_(0, self._owners, flat.double())

    def all_of(self, flags: Tensor) -> Tensor:
        """Return for each batch whether the flags of all its matrices are True."""
        if len(flags) == len(self.counts):
            return flags
        return torch.stack([own.all() for own in torch.split(flags, self.counts)])


# Indices are computed on the host and copied to a device once, so that later steps do not wait for
# a copy. They take four bytes per row or column. Every step, or every flush of GradientRelease,
# needs the same indices.
@lru_cache(maxsize=256)
def _owners(lengths: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the index of the matrix of each entry, given each vector's length and batch size.

    >>> _owners((3, 1), (1, 2), torch.device("cpu"))
    tensor([0, 0, 0, 1, 2], dtype=torch.int32)
    """
    whole = [length for length, count in zip(lengths, counts, strict=True) for _ in range(count)]
    places = torch.arange(len(whole), dtype=torch.int32, device="cpu")
    repeats = torch.tensor(whole, dtype=torch.int64, device="cpu")
    return places.repeat_interleave(repeats, output_size=sum(whole)).to(device)


@lru_cache(maxsize=256)
def _repeated(numbers: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Repeat each number as often as its count says, as float64."""
    flat = [number for number, count in zip(numbers, counts, strict=True) for _ in range(count)]
    return torch.tensor(flat, dtype=torch.float64, device="cpu").to(device)


def _inverse(length: Tensor, sums: Tensor) -> Tensor:
    # Only a zero row or column has the sum zero; its scale is then zero. An infinite sum gives NaN:
    # no scale is right for a row with an infinite entry.
    return torch.where(sums == 0, sums, length / sums + 0 * sums)
