"""Updates whose leading singular values are lowered to the next one, without state.

A backend multiplies the update X = r G c with k + 1 vectors; small matrices of one shape are taken
together. The result is a pair of scales of root-mean-square 1 and k directions that the update
subtracts as it writes the parameter. On a mesh k + 1 numbers a row and a column are summed across
ranks, never a matrix.
"""

from collections.abc import Sequence
from math import prod
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.deflation import Leading, LowRank, find_leading, fixed_block
from sinkgd.kernels import Backend, Lowered, Scales, Stack
from sinkgd.kernels.products import nothing_to_take
from sinkgd.newton_schulz import is_transposed, or_one
from sinkgd.optim.algorithms.across import over_columns, over_rows
from sinkgd.optim.algorithms.contract import Group, Slot, local
from sinkgd.optim.algorithms.layout import dims_of, rows_then_columns
from sinkgd.optim.algorithms.parts import Part, spread_columns

# A larger matrix goes alone: it keeps the threads busy by itself, as many small ones do together.
# Products of a stack of larger ones would also have other bits than theirs alone.
STACKED_ENTRIES = 1 << 18

DEFLATION_OPTIONS = MappingProxyType[str, object]({"deflated_rank": 0})


def check_deflation(group: Group) -> None:
    """Refuse a rank out of range."""
    rank = group["deflated_rank"]
    if not isinstance(rank, int) or rank < 0:
        raise ValueError(f"deflated_rank must be a whole number of at least 0, got {rank!r}")


def blocks_of(slots: Sequence[Slot], owners: Sequence[range], group: Group) -> list[Tensor]:
    """Return Ω of every part, ``(..., n, k + 1)`` float64: the rows of this rank's columns."""
    made: dict[tuple[int, ...], Tensor] = {}
    blocks: list[Tensor] = []
    for slot, own in zip(slots, owners, strict=True):
        param, layout = slot.param, group["layout"]
        (row_dim,), cols = dims_of(param.ndim, layout)
        # One block, k + 1 by n, for all matrices of a parameter: spread along the other dimensions.
        sizes = {row_dim: group["deflated_rank"] + 1, **{dim: param.shape[dim] for dim in cols}}
        shape = tuple(sizes.values())
        block = made.get(shape)
        if block is None:
            block = made[shape] = fixed_block(shape, param.device)
        in_order = block.permute(sorted(range(block.ndim), key=list(sizes).__getitem__))
        dims = range(param.ndim)
        whole = in_order.view([sizes.get(dim, 1) for dim in dims])
        whole = whole.expand([sizes.get(dim, param.shape[dim]) for dim in dims])
        piece = local(spread_columns(param, row_dim, whole.contiguous()))
        view = rows_then_columns(piece, local(param), layout)
        blocks += [view.flatten(view.ndim - len(cols)).mT] * len(own)
    return blocks


class Deflated(NamedTuple):
    """Deflated updates, one for each part."""

    scales: list[Scales | Lowered]
    finite: list[Tensor]  # 0-dim bool each: whether the update is finite; equal on all ranks


def deflate_parts(
    parts: Sequence[Part],
    scales: Sequence[Scales],
    blocks: Sequence[Tensor],
    backend: Backend,
) -> Deflated:
    """Return scales of deflated updates, of root-mean-square 1.

    Args:
        parts: The gradients, rows the out-features.
        scales: For which ``row * grad * col`` is normalized.
        blocks: Ω of each, as `blocks_of` returns them.
        backend: What multiplies the updates of this rank's pieces.
    """
    found: list[Scales | Lowered] = [*scales]
    finite = [torch.ones((), dtype=torch.bool, device=parts[0].grad.device)] * len(parts)
    stacks = _alike(parts)
    firsts = [parts[own[0]] for own in stacks]
    is_whole = not any(part.place and part.place.row_groups for part in firsts)
    directions = find_leading(
        backend.products(
            [Stack([parts[i].grad for i in own], [scales[i] for i in own]) for own in stacks]
        ),
        [
            torch.stack([blocks[i][..., : min(first.shape)] for i in own])
            for own, first in zip(stacks, firsts, strict=True)
        ],
        [first.shape for first in firsts],
        lambda numbers: over_rows(numbers, _each(firsts, numbers)),
        None if is_whole else lambda numbers: over_columns(numbers, _each(firsts, numbers)),
    )
    for own, first, leading in zip(stacks, firsts, directions, strict=True):
        lowered, flags = _stretched([scales[i] for i in own], prod(first.shape), leading)
        for i, one, flag in zip(own, lowered, flags.unbind(), strict=True):
            found[i], finite[i] = one, flag
    return Deflated(found, finite)


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
