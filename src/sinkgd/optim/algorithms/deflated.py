"""Updates whose leading singular values are lowered to the next one, without state.

A backend multiplies the update X = r G c with k + 1 vectors; small matrices of one shape are taken
together. The result is a pair of scales of root-mean-square 1 and k directions that the update
subtracts as it writes the parameter. On a mesh k + 1 numbers a row and a column are summed across
ranks, never a matrix. All matrices share the messages, as far as the memory for their vectors goes.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.deflation import (
    Leading,
    LowRank,
    PackedProducts,
    Products,
    find_leading,
    find_packed_leading,
    fixed_block,
)
from sinkgd.exchange import Computation, Steps, computation, immediate
from sinkgd.kernels import Backend, Lowered, Scales, Shared, Stack
from sinkgd.kernels.eager import nothing_to_take
from sinkgd.newton_schulz import is_transposed, or_one
from sinkgd.number_check import check_whole_number
from sinkgd.optim.algorithms.across import over_columns, over_rows
from sinkgd.optim.algorithms.contract import Context, Group, Slot, local, most_held_shape, on_mesh
from sinkgd.optim.algorithms.few_at_a_time import MESH_VECTOR_BYTES, SCRATCH_BYTES, cut
from sinkgd.optim.algorithms.layout import dims_of, rows_then_columns
from sinkgd.optim.algorithms.parts import Part, spread_columns

# A larger matrix goes alone: it keeps the threads busy by itself, as many small ones do together.
# Products of a stack of larger ones would also have other bits than theirs alone.
STACKED_ENTRIES = 1 << 18

# Bytes a row or column of a piece that are used at once for each direction that is followed, most
# of them float64: 17.4 measured; tests/lab/plan/test_traffic.py.
MESH_DIRECTION = 18

DEFLATION_OPTIONS = MappingProxyType[str, object]({"deflated_rank": 0})


def check_deflation(group: Group) -> None:
    """Refuse a rank out of range."""
    rank = group["deflated_rank"]
    check_whole_number("deflated_rank", rank)
    if rank < 0:
        raise ValueError(f"deflated_rank must be a whole number of at least 0, got {rank!r}")


def deflation_runs(
    slots: Sequence[Slot], owners: Sequence[range], group: Group, context: Context
) -> list[slice]:
    """Return which parameters on a mesh are deflated together: all ranks return the same."""
    sizes = [_held(slot, own, group) for slot, own in zip(slots, owners, strict=True)]
    sharers = context.sharers if on_mesh(slots[0].param) else 1
    return mesh_runs(sizes, sharers=sharers)


def mesh_runs(sizes: Sequence[int], *, sharers: int = 1) -> list[slice]:
    """Cut parameters on a mesh, which need so many bytes at once, into runs to deflate together."""
    return cut(sizes, MESH_VECTOR_BYTES // sharers)


def vector_bytes(rows: int, cols: int, rank: int) -> int:
    """Return what the vectors of a matrix, or a piece of it, need at once."""
    return MESH_DIRECTION * (rank + 1) * (rows + cols)


def _held(slot: Slot, own: range, group: Group) -> int:
    """Return what deflation needs for a parameter, on the rank that holds most of it."""
    param = slot.param
    shape = most_held_shape(param)
    (row_dim,), col_dims = dims_of(param.ndim, group["layout"])
    cols = prod(shape[dim] for dim in col_dims)
    batch = prod(shape) // max(1, shape[row_dim] * cols)
    found = batch * vector_bytes(shape[row_dim], len(own) * cols, group["deflated_rank"])
    # An operator norm is found of copies, which remain until its messages have come.
    return found + (4 * prod(shape) if group["operator_norm"] is not None else 0)


def blocks_of(slots: Sequence[Slot], owners: Sequence[range], group: Group) -> list[Tensor]:
    """Return Ω of every part, ``(..., n, k + 1)`` float64: the rows of this rank's columns.

    Parameters that lie alike share theirs.
    """
    made: dict[tuple[object, ...], Tensor] = {}
    blocks: list[Tensor] = []
    for slot, own in zip(slots, owners, strict=True):
        param = slot.param
        kind: tuple[object, ...] = (param.shape, local(param).stride(), param.device)
        if on_mesh(param):
            kind = (*kind, param.device_mesh, param.placements)
        if kind not in made:
            made[kind] = _block_of(param, group)
        blocks += [made[kind]] * len(own)
    return blocks


def _block_of(param: Tensor, group: Group) -> Tensor:
    """Return Ω of the matrices of a parameter."""
    return _make_block(param, param.device, group["layout"], group["deflated_rank"] + 1)


def _make_block(param: Tensor, device: torch.device, layout: str, k: int) -> Tensor:
    (row_dim,), cols = dims_of(param.ndim, layout)
    # One block, k by n, for all matrices of a parameter: spread along the other dimensions.
    sizes = {row_dim: k, **{dim: param.shape[dim] for dim in cols}}
    block = fixed_block(tuple(sizes.values()), device)
    in_order = block.permute(sorted(range(block.ndim), key=list(sizes).__getitem__))
    dims = range(param.ndim)
    whole = in_order.view([sizes.get(dim, 1) for dim in dims])
    whole = whole.expand([sizes.get(dim, param.shape[dim]) for dim in dims])
    piece = local(spread_columns(param, row_dim, whole.contiguous()))
    view = rows_then_columns(piece, local(param), layout)
    return view.flatten(view.ndim - len(cols)).mT.contiguous()


class _Lying(NamedTuple):
    """What Ω of a whole parameter depends on, beside k."""

    shape: torch.Size
    stride: tuple[int, ...]
    layout: str


@lru_cache(maxsize=64)
def _shared_blocks(kinds: tuple[_Lying, ...], k: int, width: int) -> Shared:
    """Return ``width`` of the k columns of Ω of matrices of these kinds, on the host."""
    first: dict[_Lying, int] = {}
    blocks, end = [], 0
    for kind in kinds:
        if kind not in first:
            first[kind] = end
            probe = torch.empty_strided(kind.shape, kind.stride, dtype=torch.float32, device="meta")
            block = _make_block(probe, torch.device("cpu"), kind.layout, k)
            blocks.append(block.view(-1, *block.shape[-2:])[0])  # the same for a whole batch
            end += block.shape[-2]
    return Shared(torch.cat(blocks)[:, :width].contiguous(), tuple(first[kind] for kind in kinds))


class Deflated(NamedTuple):
    """Deflated updates, one for each part."""

    scales: list[Scales | Lowered]
    finite: list[Tensor]  # 0-dim bool each: whether the update is finite; equal on all ranks


class Deflating(NamedTuple):
    """Matrices to deflate: lists of one length, but for the first two."""

    slots: Sequence[Slot]
    owners: Sequence[range]  # of each parameter, which of the parts are its own
    parts: Sequence[Part]  # the gradients, rows the out-features
    scales: Sequence[Scales]  # for which ``row * grad * col`` is normalized


def deflate_parts(some: Deflating, backend: Backend, group: Group) -> Computation[Deflated]:
    """Return scales of deflated updates, of root-mean-square 1.

    Args:
        some: What is deflated.
        backend: What multiplies the updates of this rank's pieces.
        group: Its options.
    """
    if backend.packs_vectors and not on_mesh(some.slots[0].param):
        found = _deflate_packed(some, backend, group)
        if found is not None:
            return immediate(found)
    return _deflate_stacks(
        some.parts, some.scales, blocks_of(some.slots, some.owners, group), backend
    )


def _deflate_packed(some: Deflating, backend: Backend, group: Group) -> Deflated | None:
    """Deflate whole matrices, in as many calls of torch however many they are.

    None where the backend does not multiply packed vectors.
    """
    kinds = [
        _Lying(slot.param.shape, slot.param.stride(), group["layout"])
        for slot, own in zip(some.slots, some.owners, strict=True)
        for _ in own
    ]
    by_width: dict[int, list[int]] = {}
    for i, part in enumerate(some.parts):
        if min(part.shape) > 1:  # there is nothing to lower in others
            by_width.setdefault(min(group["deflated_rank"] + 1, *part.shape), []).append(i)
    found: list[Scales | Lowered] = [*some.scales]
    finite = [some.parts[0].grad.new_ones((), dtype=torch.bool)] * len(found)
    for width, own in by_width.items():
        shared = _shared_blocks(tuple(kinds[i] for i in own), group["deflated_rank"] + 1, width)
        scales = [some.scales[i] for i in own]
        products = backend.packed_products([some.parts[i].grad for i in own], scales, shared)
        if products is None:
            return None
        lowered, flags = _lowered_packed(scales, products)
        for i, one, flag in zip(own, lowered, flags, strict=True):
            found[i], finite[i] = one, flag
    return Deflated(found, finite)


def _lowered_packed(
    scales: Sequence[Scales], products: PackedProducts
) -> tuple[list[Lowered], list[Tensor]]:
    """Bring updates to root-mean-square 1, and say which of them are finite."""
    leading = find_packed_leading(products)
    stretch = (products.entries / or_one(leading.square)).sqrt_()
    left = leading.taken.times(leading.factors * stretch).blocks.flatten(0, 1).float()
    right = leading.right.blocks.flatten(0, 1).float()
    numbers = stretch.flatten()
    sides = products.by_tensor(left, of_rows=True), products.by_tensor(right, of_rows=False)
    factors = products.numbers_by_tensor(numbers.float())
    lowered = [
        Lowered(*own, LowRank(*pair), factor)
        for own, *pair, factor in zip(scales, *sides, factors, strict=True)
    ]
    return lowered, products.all_by_tensor(numbers.isfinite())


@computation
def _deflate_stacks(
    parts: Sequence[Part],
    scales: Sequence[Scales],
    blocks: Sequence[Tensor],
    backend: Backend,
) -> Steps[Deflated]:
    """Deflate matrices that may lie in pieces, those that lie alike together."""
    found: list[Scales | Lowered] = [*scales]
    finite = [torch.ones((), dtype=torch.bool, device=parts[0].grad.device)] * len(parts)
    stacks = _alike(parts)
    firsts = [parts[own[0]] for own in stacks]
    is_whole = not any(part.place and part.place.row_groups for part in firsts)
    directions = yield find_leading(
        _products(
            backend,
            [Stack([parts[i].grad for i in own], [scales[i] for i in own]) for own in stacks],
        ),
        [
            _together([blocks[i] for i in own], min(first.shape))
            for own, first in zip(stacks, firsts, strict=True)
        ],
        [first.shape for first in firsts],
        lambda numbers: over_rows(numbers, _each(firsts, numbers)),
        None if is_whole else lambda numbers: over_columns(numbers, _each(firsts, numbers)),
    )
    for own, first in zip(stacks, firsts, strict=True):
        leading = directions.pop(0)  # so that it is freed
        lowered, flags = _stretched([scales[i] for i in own], prod(first.shape), leading)
        for i, one, flag in zip(own, lowered, flags.unbind(), strict=True):
            found[i], finite[i] = one, flag
    return Deflated(found, finite)


def _together(blocks: Sequence[Tensor], width: int) -> Tensor:
    """Return Ω of a stack; one that all share is not copied."""
    first = blocks[0][..., :width].contiguous()
    if all(block is blocks[0] for block in blocks):
        return first.expand(len(blocks), *first.shape)
    return torch.stack([block[..., :width] for block in blocks])


def _products(backend: Backend, stacks: Sequence[Stack]) -> Products:
    """Return the products of updates, for which at most `SCRATCH_BYTES` are copied at a time."""
    copied = [
        0 if backend.packs_vectors and stack.grads[0].dtype != torch.float64 else 4 * _size(stack)
        for stack in stacks
    ]
    runs = cut(copied, SCRATCH_BYTES)
    if len(runs) <= 1:
        return backend.products(stacks)
    return _ProductsByRuns(backend, [stacks[run] for run in runs])


def _size(stack: Stack) -> int:
    return sum(grad.numel() for grad in stack.grads)


class _ProductsByRuns:
    """Products of a run of updates after the other; each time, the backend is asked anew.

    Args:
        backend: What multiplies, and may copy what it multiplies.
        runs: Of stacks.
    """

    def __init__(self, backend: Backend, runs: Sequence[Sequence[Stack]]) -> None:
        self._backend, self._runs = backend, runs
        self._squares: list[Tensor] = []

    def of_rows(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return X V of each."""
        return [
            found
            for run, own in zip(self._runs, self._split(blocks), strict=True)
            for found in self._backend.products(run).of_rows(own)
        ]

    def of_cols(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return Xᵀ Y of each."""
        squares: list[Tensor] = []
        found: list[Tensor] = []
        for run, own in zip(self._runs, self._split(blocks), strict=True):
            products = self._backend.products(run)
            found += products.of_cols(own)
            if not self._squares:  # known once there was a product of either kind
                products.of_rows([_zeros(stack, y) for stack, y in zip(run, own, strict=True)])
                squares += products.squares()
        self._squares = self._squares or squares
        return found

    def of_both(self, blocks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return X V and Xᵀ X V of each."""
        rows: list[Tensor] = []
        cols: list[Tensor] = []
        squares: list[Tensor] = []
        for run, own in zip(self._runs, self._split(blocks), strict=True):
            products = self._backend.products(run)
            both = products.of_both(own)
            rows += both[0]
            cols += both[1]
            squares += products.squares()
        self._squares = squares
        return rows, cols

    def squares(self) -> list[Tensor]:
        """Return the square of each Frobenius norm."""
        return self._squares

    def _split(self, blocks: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        first = 0
        for run in self._runs:
            yield blocks[first : first + len(run)]
            first += len(run)


def _zeros(stack: Stack, y: Tensor) -> Tensor:
    """Return vectors that can be multiplied where ``y`` was by the transpose: ``(..., n, k)``."""
    return y.new_zeros(*y.shape[:-2], stack.grads[0].shape[-1], y.shape[-1])


def _stretched(
    scales: Sequence[Scales], entries: int, leading: Leading
) -> tuple[list[Lowered], Tensor]:
    """Bring the updates of a stack to root-mean-square 1, and say which of them are finite.

    The factor goes into the row scales. Where it would overflow one of them, as rows of 1e-38 have
    scales near the largest float, it goes into the column scales.
    """
    stretch = (entries / or_one(leading.square)).sqrt_()
    left = leading.taken.left * stretch
    rows, cols = (torch.stack(own) for own in zip(*scales, strict=True))
    factor = stretch.to(rows.dtype)
    held = rows.shape[-2] > 0  # a rank may hold no row
    fits = (rows.amax(-2, keepdim=True) * factor).isfinite() if held else factor.isfinite()
    rows = rows * torch.where(fits, factor, 1)
    cols = cols * torch.where(fits, 1, factor)
    cols = cols.clamp(max=torch.finfo(cols.dtype).max)
    left = left.to(rows.dtype)
    right = leading.taken.right.mT.to(rows.dtype).contiguous().mT  # one direction after the other
    flags = stretch.isfinite().flatten(1).all(-1)
    lowered = [
        Lowered(row, col, LowRank(*pair))
        for row, col, *pair in zip(rows, cols, left, right, strict=True)
    ]
    return lowered, flags


def with_scales_alone(
    parts: Sequence[Part], scales: Sequence[Scales | Lowered]
) -> tuple[list[Part], list[Scales]]:
    """Return updates that are lowered as gradients, for what reads them again, and their scales."""
    grads, pairs = nothing_to_take([part.grad for part in parts], scales)
    return [part._replace(grad=grad) for part, grad in zip(parts, grads, strict=True)], pairs


def _each(parts: Sequence[Part], numbers: Sequence[Tensor]) -> list[Part]:
    """Return the part of each number, where parts have as many each, one after the other."""
    return [*parts] * (len(numbers) // len(parts)) if parts else []


def _alike(parts: Sequence[Part]) -> list[list[int]]:
    """List, by their places in ``parts``, the matrices that lie alike, to be taken together.

    A matrix in pieces stays alone, so that all ranks send the same in the same order. One with a
    single row or column has nothing to lower, and is left out.
    """
    stacks: dict[tuple[object, ...], list[int]] = {}
    for i, part in enumerate(parts):
        if min(part.shape) > 1:
            kind = (part.grad.shape, part.grad.dtype, is_transposed(part.grad))
            alone = part.place is not None or part.grad.numel() > STACKED_ENTRIES
            stacks.setdefault((i,) if alone else kind, []).append(i)
    return list(stacks.values())
