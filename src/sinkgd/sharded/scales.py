"""Scales of matrices that lie in pieces: sums of the pieces, added up over their groups.

With S = G∘G an iteration is r² = n / (S c²), c² = m / (Sᵀ r²). A rank knows its piece of G, and the
scales of its own rows and columns; what it does not know are the sums over the other pieces. So
vectors travel, one number a row or column of a piece, and never a matrix.

Letters, everywhere in this file:
    r2, c2: the squares of the scales of this rank's rows and columns, float64, all matrices' in one
    live: how many rows or columns of a matrix are not zero, over all ranks

Zero rows or columns take no part, and the others would then drift: r by a factor an iteration, c by
its inverse. So lengths are counted without them, and the true length is taken in the last half of
the last iteration, which is where it shows. Everything that decides is known to all ranks of a
matrix alike: it is added up, or follows from what is.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.exchange import Steps, computation, sums_in_turn
from sinkgd.kernels import Backend, Scales
from sinkgd.kernels.eager import no_movement
from sinkgd.kernels.equilibrate import scales_of
from sinkgd.sharded.place import Place


class Found(NamedTuple):
    """What is known of some matrices after the iterations."""

    scales: list[Scales]  # of this rank's rows and columns
    finite: Tensor  # (matrices,) bool: whether their gradients are finite on every rank


@computation
def find_scales(
    grads: Sequence[Tensor],
    places: Sequence[Place],
    backend: Backend,
    num_iters: int,
    *,
    tol: float | None = None,
    starts: Sequence[Tensor | None] | None = None,
) -> Steps[Found]:
    """Find the scales of matrices that lie in pieces.

    A computation for `exchange`: every rank that holds a piece of a matrix must run it, with the
    same matrices in the same order. It costs ``num_iters`` messages a process group, whatever the
    number of matrices; one more where some shard rows over a group that shards columns of others,
    and no order of the groups suits both.

    Args:
        grads: This rank's pieces, ``(..., m, n)``; some may be empty.
        places: How they lie.
        backend: What adds up this rank's pieces.
        num_iters: Iterations L.
        tol: As in `sinkgd.kernels.Backend.scales`; a device is then waited for.
        starts: As there, this rank's piece.
    """
    begin = [None] * len(grads) if starts is None else list(starts)
    kinds: dict[object, list[int]] = {}
    for i, place in enumerate(places):
        kinds.setdefault((place.kind, grads[i].device), []).append(i)
    computations = [
        _iterate(
            [grads[i] for i in members],
            [places[i] for i in members],
            [begin[i] for i in members],
            backend,
            num_iters,
            tol,
        )
        for members in kinds.values()
    ]
    results = yield computations
    by_place = {
        i: (scales, flag)
        for members, found in zip(kinds.values(), results, strict=True)
        for i, scales, flag in zip(members, found.scales, found.finite.unbind(), strict=True)
    }
    pairs = [by_place[i] for i in range(len(grads))]
    return Found([scales for scales, _ in pairs], torch.stack([flag for _, flag in pairs]))


@computation
def _iterate(
    grads: Sequence[Tensor],
    places: Sequence[Place],
    starts: Sequence[Tensor | None],
    backend: Backend,
    num_iters: int,
    tol: float | None,
) -> Steps[Found]:
    """Find the scales of matrices whose sums are added up over the same groups."""
    row_groups, col_groups = places[0].kind
    sums = backend.sums(grads)
    device = grads[0].device
    rows = _Vectors([(*grad.shape[:-1], 1) for grad in grads], device)
    cols = _Vectors([(*grad.shape[:-2], 1, grad.shape[-1]) for grad in grads], device)
    m = rows.of_matrices([place.rows for place in places])
    n = rows.of_matrices([place.cols for place in places])
    low, high = no_movement(0.0 if tol is None else tol)
    r2, c2 = rows.ones(), _started(cols, starts)
    live_cols = n
    moving = torch.ones_like(m, dtype=torch.bool)
    for number in range(num_iters):
        row_sums = torch.cat([sums.of_rows(c2), live_cols])
        yield from sums_in_turn(row_sums, row_groups, col_groups)
        row_sums, counted = torch.split(row_sums, [rows.length, len(m)])
        last, new = r2, _inverse(rows.spread(counted if number else n), row_sums)
        moved = rows.count(~((new >= low * last) & (new <= high * last)))
        r2 = new if tol is None else torch.where(rows.spread(moving), new, last)
        live_rows = rows.count((r2 != 0) + 0 * r2)  # not finite where a scale is not
        col_sums = torch.cat([sums.of_cols(r2), live_rows, moved])
        yield from sums_in_turn(col_sums, col_groups)
        col_sums, live_rows, moved = torch.split(col_sums, [cols.length, len(m), len(m)])
        settled = (moved == 0) & (tol is not None and number > 0)
        length = m if number == num_iters - 1 else torch.where(settled, m, live_rows)
        new = _inverse(cols.spread(length), col_sums)
        c2 = new if tol is None else torch.where(cols.spread(moving), new, c2)
        live_cols = cols.count(c2 != 0)
        moving = moving & ~settled
        if tol is not None and not bool(moving.any()):
            break
    scales = _scales_of(rows.split(r2.sqrt()), cols.split(c2.sqrt()), [x.dtype for x in grads])
    return Found(scales, rows.all_of(live_rows.isfinite()))


def _scales_of(
    rows: Sequence[Tensor], cols: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> list[Scales]:
    """Return what `scales_of` does of each gradient, of all that are alike in the same calls."""
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


def _started(cols: "_Vectors", starts: Sequence[Tensor | None]) -> Tensor:
    """Return the squares of the column scales to begin from, 1 where none are given."""
    c2 = cols.ones()
    for own, start in zip(cols.split(c2), starts, strict=True):
        if start is not None:
            own.copy_(start.double().square())
    return c2


class _Vectors:
    """Vectors of matrices ``(..., m, n)``, end to end, and numbers that each matrix has one of.

    Args:
        shapes: Of the vectors, ``(..., m, 1)`` or ``(..., 1, n)``: one for each matrix of a batch.
        device: Of all.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        self.shapes = [torch.Size(shape) for shape in shapes]
        self.counts = [shape[:-2].numel() for shape in self.shapes]  # matrices of each batch
        lengths = [shape[-2:].numel() for shape in self.shapes]
        self.length = sum(shape.numel() for shape in self.shapes)
        self._owners = _owners(tuple(lengths), tuple(self.counts), device)

    def ones(self) -> Tensor:
        return torch.ones(self.length, dtype=torch.float64, device=self._owners.device)

    def split(self, flat: Tensor) -> list[Tensor]:
        parts = torch.split(flat, [shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def of_matrices(self, numbers: Sequence[int]) -> Tensor:
        """Give every matrix of each batch the number of the batch."""
        return _repeated(tuple(numbers), tuple(self.counts), self._owners.device)

    def spread(self, numbers: Tensor) -> Tensor:
        """Give every entry the number of its matrix."""
        return numbers.index_select(0, self._owners)

    def count(self, flat: Tensor) -> Tensor:
        """Add up the entries of each matrix."""
        total = torch.zeros(sum(self.counts), dtype=torch.float64, device=flat.device)
        return total.index_add_(0, self._owners, flat.double())

    def all_of(self, flags: Tensor) -> Tensor:
        """Say of each batch whether the flags of all its matrices are True."""
        if len(flags) == len(self.counts):
            return flags
        return torch.stack([own.all() for own in torch.split(flags, self.counts)])


# What is counted on the host reaches a device once, and no step waits for it. An entry takes four
# bytes a row or column, and every step needs the same few; with GradientRelease, every flush.
@lru_cache(maxsize=32)
def _owners(lengths: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return of each entry its matrix, for vectors of so many entries and matrices of each batch.

    >>> _owners((3, 1), (1, 2), torch.device("cpu"))
    tensor([0, 0, 0, 1, 2], dtype=torch.int32)
    """
    whole = [length for length, count in zip(lengths, counts, strict=True) for _ in range(count)]
    places = torch.arange(len(whole), dtype=torch.int32, device="cpu")
    repeats = torch.tensor(whole, dtype=torch.int64, device="cpu")
    return places.repeat_interleave(repeats, output_size=sum(whole)).to(device)


@lru_cache(maxsize=32)
def _repeated(numbers: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers, float64, each as often as its count says."""
    flat = [number for number, count in zip(numbers, counts, strict=True) for _ in range(count)]
    return torch.tensor(flat, dtype=torch.float64, device="cpu").to(device)


def _inverse(length: Tensor, sums: Tensor) -> Tensor:
    # A sum is zero for a zero row or column alone; its scale is then zero. Of one that is infinite
    # it is not a number, as an infinite entry has no place in any row.
    return torch.where(sums == 0, sums, length / sums + 0 * sums)
