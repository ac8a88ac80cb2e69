"""Updates whose leading singular values are lowered to the others', without state.

The updates X = r G c are made, a few matrices at a time and small ones of one shape in one tensor,
and deflated where they lie; what follows then sees X as a gradient, with scales that bring it back
to root-mean-square 1. On a mesh k numbers a row and k a column are added up, never a matrix.
"""

from collections.abc import Sequence
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

from sinkgd.deflation import deflate_, fixed_block
from sinkgd.kernels import Scales
from sinkgd.newton_schulz import is_transposed, matrix_buffer, or_one
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
    """Return Ω of every part, ``(..., n, k)`` float64: of the columns that this rank has."""
    made: dict[tuple[int, ...], Tensor] = {}
    blocks: list[Tensor] = []
    for slot, own in zip(slots, owners, strict=True):
        param, layout = slot.param, group["layout"]
        (row_dim,), cols = dims_of(param.ndim, layout)
        # One block, k by n, for all matrices of a parameter: spread along the other dimensions.
        sizes = {row_dim: group["deflated_rank"], **{dim: param.shape[dim] for dim in cols}}
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


def deflate_parts(
    parts: Sequence[Part], scales: Sequence[Scales], blocks: Sequence[Tensor]
) -> tuple[list[Part], list[Scales]]:
    """Return the deflated updates, as gradients, with scales of root-mean-square 1.

    Args:
        parts: The gradients, rows the out-features.
        scales: For which ``row * grad * col`` is normalized.
        blocks: Ω of each, as `blocks_of` returns them.
    """
    found_parts, found_scales = list(parts), list(scales)
    stacks = _alike(parts)
    firsts = [parts[own[0]] for own in stacks]
    updates = [_updates([parts[i].grad for i in own], [scales[i] for i in own]) for own in stacks]
    squares = deflate_(
        updates,
        [
            torch.stack([blocks[i][..., : min(first.shape) - 1] for i in own])
            for own, first in zip(stacks, firsts, strict=True)
        ],
        [first.shape for first in firsts],
        lambda numbers: over_rows(numbers, firsts),
        lambda numbers: over_columns(numbers, firsts),
    )
    for own, first, update, square in zip(stacks, firsts, updates, squares, strict=True):
        stretch = (prod(first.shape) / or_one(square)).sqrt_().to(update.dtype)
        rows = stretch.expand(*update.shape[:-1], 1).contiguous()
        cols = update.new_ones(*update.shape[:-2], 1, update.shape[-1])
        for i, x, row, col in zip(own, update, rows, cols, strict=True):
            found_parts[i] = parts[i]._replace(grad=x)
            found_scales[i] = Scales(row, col)
    return found_parts, found_scales


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


def _updates(grads: Sequence[Tensor], scales: Sequence[Scales]) -> Tensor:
    """Return r G c of matrices that lie alike, ``(s, ..., m, n)``, in float32 or wider."""
    first = grads[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    stack = matrix_buffer(first.expand(len(grads), *first.shape), dtype)
    for update, grad, own in zip(stack, grads, scales, strict=True):
        torch.mul(grad, own.row.to(dtype), out=update).mul_(own.col)
    return stack
