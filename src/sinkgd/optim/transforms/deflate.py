"""Lower the k largest singular values of an update to the (k + 1)-th, by default without state.

A backend multiplies the update X = r G c with k + 1 vectors; small matrices of one shape are
stacked. The result is a pair of scales that give root-mean-square 1, and k directions that are
subtracted when the parameter is written. On a mesh ranks add up k + 1 numbers per row and column,
never a matrix. All matrices share the messages, as far as the memory for their vectors allows.

The search for the directions starts from a block Ω of k + 1 vectors. By default it is the same in
every step: `sinkgd.deflation.fixed_block`. With ``deflated_start="kept"`` Ω is the right directions
of the last step, so that the search continues from step to step, as the power iteration of Spectra
does (https://arxiv.org/abs/2602.11185). The first step then starts from the fixed block, and
vectors of this block replace directions that the last update lacked.

State, only if ``"kept"``: ``state[param]["leading_directions"]``, float32, (k + 1) n numbers per
matrix, as `sinkgd.optim.kept_vectors` shapes and shards them.
"""

from collections.abc import MutableMapping, Sequence
from functools import lru_cache
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

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
from sinkgd.distributed.all_reduce import sum_over_columns, sum_over_rows
from sinkgd.distributed.shards import ParamMatrix, is_dtensor, local, shard_except
from sinkgd.exchange import Steps, computation
from sinkgd.kernels import Backend, CorrectedScales, Scales, Shared, Stack
from sinkgd.matrix_views import dims_of, rows_then_columns
from sinkgd.newton_schulz import is_transposed, or_one
from sinkgd.number_check import check_whole_number
from sinkgd.optim.kept_vectors import (
    normalized_block,
    read_vectors,
    shape_of_vectors,
    write_vectors_,
)
from sinkgd.optim.method import Group
from sinkgd.optim.products_by_chunks import ProductsByChunks
from sinkgd.optim.transform import Batch, Scratch, Transform, copy_chunks, matrices_of

# A larger matrix is not stacked: it keeps the threads busy by itself, and if it were stacked, its
# products would differ in their last bits from the products of the matrix by itself.
STACKED_ENTRIES = 1 << 18

DIRECTIONS = "leading_directions"
STARTS = ("fixed", "kept")


class Deflate(Transform):
    """Lower the k leading singular values of each update; k is ``deflated_rank``."""

    options = MappingProxyType[str, object]({"deflated_rank": 0, "deflated_start": "fixed"})
    switch = "deflated_rank"
    resizable = MappingProxyType({DIRECTIONS: "row"})
    remedy = "a deflated_rank above 0, e.g. deflated_rank=15"

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse a rank out of range, and an unknown start."""
        del name, param
        check_deflated_rank(group["deflated_rank"])
        if group["deflated_start"] not in STARTS:
            raise ValueError(
                f"deflated_start must be one of {STARTS}, got {group['deflated_start']!r}"
            )

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Create Ω of each matrix, if it is kept."""
        if group["deflated_start"] == "kept":
            _directions(state, param, group, len(matrices_of(param, group)))

    def scratch(self, group: Group, *, packs_vectors: bool, sharded: bool) -> Scratch:
        """Return what is held: k + 1 vectors, or twice as many if Ω is kept.

        Also copies of matrices that are not sharded, unless the backend packs vectors.
        """
        copies, blocks = not packs_vectors and not sharded, 1 + (group["deflated_start"] == "kept")
        return Scratch(copies=copies, vectors=blocks * (group["deflated_rank"] + 1))

    @computation
    def after(self, batch: Batch) -> Steps[Batch]:
        """Deflate the updates and bring them to root-mean-square 1."""
        matrices, scales = batch.without_corrections()
        is_kept, found = batch.group["deflated_start"] == "kept", None
        if batch.backend.packs_vectors and not is_dtensor(batch.slots[0].param) and not is_kept:
            found = _deflate_packed(batch, matrices, scales)
        if found is None:
            fixed = fixed_blocks(batch, batch.group["deflated_rank"] + 1)
            blocks, spare = (_kept_blocks(batch), fixed) if is_kept else (fixed, None)
            found = yield _deflate_stacks(matrices, scales, blocks, batch.backend, spare)
        batch = batch._replace(matrices=matrices, scales=found.scales).only_if(found.finite)
        if is_kept:
            _keep(batch, found.blocks)
        return batch


def check_deflated_rank(rank: int) -> None:
    """Refuse a rank out of range."""
    check_whole_number("deflated_rank", rank)
    if rank < 0:
        raise ValueError(f"deflated_rank must be a whole number of at least 0, got {rank!r}")


def fixed_blocks(batch: Batch, width: int) -> list[Tensor]:
    """Return the fixed Ω of every matrix, of ``width`` vectors: ``(..., n, width)`` float64.

    n counts only this rank's columns. Parameters of one shape, memory order and sharding share Ω.
    """
    known: dict[tuple[object, ...], Tensor] = {}
    blocks: list[Tensor] = []
    for slot, own in zip(batch.slots, batch.ranges, strict=True):
        param = slot.param
        kind: tuple[object, ...] = (param.shape, local(param).stride(), param.device)
        if is_dtensor(param):
            kind = (*kind, param.device_mesh, param.placements)
        if kind not in known:
            known[kind] = fixed_block_of(param, batch.group["layout"], width)
        blocks += [known[kind]] * len(own)
    return blocks


def fixed_block_of(
    param: Tensor, layout: str, width: int, device: torch.device | None = None
) -> Tensor:
    """Return the fixed Ω of a matrix of a parameter, as `fixed_blocks` does."""
    view = rows_then_columns(
        local(fixed_vectors(param, layout, width, device=device)), local(param), layout
    )
    _, cols = dims_of(param.ndim, layout)
    return view.flatten(param.ndim - len(cols)).mT.contiguous()


def fixed_vectors(
    param: Tensor, layout: str, width: int, count: int = 1, device: torch.device | None = None
) -> Tensor:
    """Return the fixed Ω of ``count`` matrices, all equal, float64, as `read_vectors` takes it."""
    (row_dim,), cols = dims_of(param.ndim, layout)
    # All matrices share one block, ``width`` by n: it is expanded over the batch dimensions, and
    # repeated ``count`` times along the row dimension.
    sizes = {row_dim: width, **{dim: param.shape[dim] for dim in cols}}
    block = fixed_block(tuple(sizes.values()), device or param.device)
    in_order = block.permute(sorted(range(block.ndim), key=list(sizes).__getitem__))
    dims = range(param.ndim)
    whole = in_order.view([sizes.get(dim, 1) for dim in dims])
    whole = whole.expand([sizes.get(dim, param.shape[dim]) for dim in dims])
    repeats = [count if dim == row_dim else 1 for dim in dims]
    return shard_except(param, [row_dim], whole.repeat(repeats))


def _directions(state: MutableMapping[str, Any], param: Tensor, group: Group, count: int) -> Tensor:
    """Return the kept vectors of a parameter; create them if absent or of another number."""
    width, layout = group["deflated_rank"] + 1, group["layout"]
    kept: Tensor | None = state.get(DIRECTIONS)
    if kept is None or [*kept.shape] != shape_of_vectors(param, layout, count * width):
        kept = state[DIRECTIONS] = fixed_vectors(param, layout, width, count).float()
    return kept


def _kept_blocks(batch: Batch) -> list[Tensor]:
    """Return the kept Ω of every matrix, in the format of `fixed_blocks`."""
    blocks: list[Tensor] = []
    for slot, state, own, _ in batch.owners():
        kept = _directions(state, slot.param, batch.group, len(own))
        vectors = read_vectors(kept, slot.param, batch.group["layout"], len(own))
        blocks += [x.double().mT.contiguous() for x in vectors]
    return blocks


def _keep(batch: Batch, blocks: Sequence[Tensor]) -> None:
    """Keep Ω of every matrix for the next step."""
    for slot, state, own, flag in batch.owners():
        found = [blocks[i].mT.float() for i in own]
        write_vectors_(state[DIRECTIONS], slot.param, batch.group["layout"], found, flag)


class _BlockKey(NamedTuple):
    """What Ω of a plain parameter depends on, besides k."""

    shape: torch.Size
    stride: tuple[int, ...]
    layout: str


@lru_cache(maxsize=64)
def _shared_blocks(kinds: tuple[_BlockKey, ...], whole: int, width: int) -> Shared:
    """Return Ω of these kinds, on the host: ``width`` of the ``whole`` columns that it has."""
    first: dict[_BlockKey, int] = {}
    blocks, end = [], 0
    for kind in kinds:
        if kind not in first:
            first[kind] = end
            probe = torch.empty_strided(kind.shape, kind.stride, dtype=torch.float32, device="meta")
            block = fixed_block_of(probe, kind.layout, whole, torch.device("cpu"))
            blocks.append(block.view(-1, *block.shape[-2:])[0])  # the same for a whole batch
            end += block.shape[-2]
    return Shared(torch.cat(blocks)[:, :width].contiguous(), tuple(first[kind] for kind in kinds))


class Deflated(NamedTuple):
    """Deflated updates, one for each matrix."""

    scales: list[Scales | CorrectedScales]
    finite: list[Tensor]  # 0-dim bool each: whether the update is finite; equal on all ranks
    blocks: Sequence[Tensor] = ()  # Ω of the next step, if it is kept


def _deflate_packed(
    batch: Batch, matrices: Sequence[ParamMatrix], plain: Sequence[Scales]
) -> Deflated | None:
    """Deflate whole matrices with few torch calls, however many matrices there are.

    Returns None if the backend cannot multiply these matrices by packed vectors.
    """
    kinds = [
        _BlockKey(slot.param.shape, slot.param.stride(), batch.group["layout"])
        for slot, own in zip(batch.slots, batch.ranges, strict=True)
        for _ in own
    ]
    by_width: dict[int, list[int]] = {}
    for i, matrix in enumerate(matrices):
        if min(matrix.shape) > 1:  # a single row or column has nothing to lower
            width = min(batch.group["deflated_rank"] + 1, *matrix.shape)
            by_width.setdefault(width, []).append(i)
    found: list[Scales | CorrectedScales] = [*plain]
    finite = [matrices[0].grad.new_ones((), dtype=torch.bool)] * len(found)
    for width, own in by_width.items():
        shared = _shared_blocks(
            tuple(kinds[i] for i in own), batch.group["deflated_rank"] + 1, width
        )
        scales = [plain[i] for i in own]
        products = batch.backend.packed_products([matrices[i].grad for i in own], scales, shared)
        if products is None:
            return None
        corrected, flags = _corrected_packed(scales, products)
        for i, one, flag in zip(own, corrected, flags, strict=True):
            found[i], finite[i] = one, flag
    return Deflated(found, finite)


def _corrected_packed(
    scales: Sequence[Scales], products: PackedProducts
) -> tuple[list[CorrectedScales], list[Tensor]]:
    """Bring updates to root-mean-square 1, and say which of them are finite."""
    leading = find_packed_leading(products)
    stretch = (products.entries / or_one(leading.square)).sqrt_()
    left = leading.taken.times(leading.factors * stretch).blocks.flatten(0, 1).float()
    right = leading.right.blocks.flatten(0, 1).float()
    numbers = stretch.flatten()
    sides = products.by_tensor(left, of_rows=True), products.by_tensor(right, of_rows=False)
    factors = products.numbers_by_tensor(numbers.float())
    corrected = [
        CorrectedScales(*own, LowRank(*pair), factor)
        for own, *pair, factor in zip(scales, *sides, factors, strict=True)
    ]
    return corrected, products.all_by_tensor(numbers.isfinite())


@computation
def _deflate_stacks(
    matrices: Sequence[ParamMatrix],
    scales: Sequence[Scales],
    blocks: Sequence[Tensor],
    backend: Backend,
    spare: Sequence[Tensor] | None = None,
) -> Steps[Deflated]:
    """Deflate matrices that may be sharded, in stacks of one shape and memory order.

    Args:
        matrices: The matrices.
        scales: Scales for which ``row * grad * col`` is normalized.
        blocks: Ω of each matrix.
        backend: The backend.
        spare: If Ω is kept, vectors for the directions that an update does not have.
    """
    following = [*blocks]
    found: list[Scales | CorrectedScales] = [*scales]
    finite = [torch.ones((), dtype=torch.bool, device=matrices[0].grad.device)] * len(matrices)
    stacks = _stacks_of(matrices)
    firsts = [matrices[own[0]] for own in stacks]
    is_whole = not any(x.sharding and x.sharding.groups_over_cols for x in firsts)
    directions = yield find_leading(
        _products(
            backend,
            [Stack([matrices[i].grad for i in own], [scales[i] for i in own]) for own in stacks],
        ),
        [
            _together([blocks[i] for i in own], min(first.shape))
            for own, first in zip(stacks, firsts, strict=True)
        ],
        [first.shape for first in firsts],
        lambda numbers: sum_over_rows(numbers, _each(firsts, numbers)),
        None if is_whole else lambda numbers: sum_over_columns(numbers, _each(firsts, numbers)),
    )
    for own, first in zip(stacks, firsts, strict=True):
        leading = directions.pop(0)  # so that it is freed
        corrected, flags = _stretched([scales[i] for i in own], prod(first.shape), leading)
        for j, (i, one, flag) in enumerate(zip(own, corrected, flags.unbind(), strict=True)):
            found[i], finite[i] = one, flag
            if spare is not None:
                size = (leading.lengths[j] / first.shape[1]).sqrt()
                found_here = normalized_block(leading.right[j], size, spare[i])
                following[i] = torch.cat([found_here, spare[i][..., size.shape[-1] :]], dim=-1)
    return Deflated(found, finite, following)


def _together(blocks: Sequence[Tensor], width: int) -> Tensor:
    """Return Ω of a stack; there is only one copy of it if all matrices share it."""
    first = blocks[0][..., :width].contiguous()
    if all(block is blocks[0] for block in blocks):
        return first.expand(len(blocks), *first.shape)
    return torch.stack([block[..., :width] for block in blocks])


def _products(backend: Backend, stacks: Sequence[Stack]) -> Products:
    """Return the products of updates. If the backend copies gradients, it copies few at a time."""
    copied = [
        0 if backend.packs_vectors and stack.grads[0].dtype != torch.float64 else 4 * _size(stack)
        for stack in stacks
    ]
    chunks = copy_chunks(copied)
    if len(chunks) <= 1:
        return backend.products(stacks)
    return ProductsByChunks(backend, [stacks[chunk] for chunk in chunks])


def _size(stack: Stack) -> int:
    return sum(grad.numel() for grad in stack.grads)


def _stretched(
    scales: Sequence[Scales], entries: int, leading: Leading
) -> tuple[list[CorrectedScales], Tensor]:
    """Bring the updates of a stack to root-mean-square 1, and say which of them are finite.

    The factor is multiplied into the row scales or, if one of them would overflow, into the column
    scales: rows of 1e-38 have scales near the largest float.
    """
    stretch = (entries / or_one(leading.square)).sqrt_()
    left = leading.taken.left * stretch
    rows, cols = (torch.stack(own) for own in zip(*scales, strict=True))
    factor = stretch.to(rows.dtype)
    has_rows = rows.shape[-2] > 0  # a shard may have no row
    fits = (rows.amax(-2, keepdim=True) * factor).isfinite() if has_rows else factor.isfinite()
    rows = rows * torch.where(fits, factor, 1)
    cols = cols * torch.where(fits, 1, factor)
    cols = cols.clamp(max=torch.finfo(cols.dtype).max)
    left = left.to(rows.dtype)
    right = leading.taken.right.mT.to(rows.dtype).contiguous().mT  # each direction is contiguous
    flags = stretch.isfinite().flatten(1).all(-1)
    corrected = [
        CorrectedScales(row, col, LowRank(*pair))
        for row, col, *pair in zip(rows, cols, left, right, strict=True)
    ]
    return corrected, flags


def _each(matrices: Sequence[ParamMatrix], numbers: Sequence[Tensor]) -> list[ParamMatrix]:
    """Repeat the matrices if ``numbers`` has several tensors for each of them."""
    return [*matrices] * (len(numbers) // len(matrices)) if matrices else []


def _stacks_of(matrices: Sequence[ParamMatrix]) -> list[list[int]]:
    """List the indices of matrices of one shape, dtype and memory order, to be stacked.

    A sharded matrix is not stacked, so that all ranks send the same messages in the same order. A
    matrix with a single row or column has nothing to lower, and is omitted.
    """
    stacks: dict[tuple[object, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        grad = matrix.grad
        if min(matrix.shape) > 1:
            kind = (grad.shape, grad.dtype, is_transposed(grad))
            by_itself = matrix.sharding is not None or grad.numel() > STACKED_ENTRIES
            stacks.setdefault((i,) if by_itself else kind, []).append(i)
    return list(stacks.values())
