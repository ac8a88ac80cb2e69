"""Updates whose leading singular values are lowered to the others', without state.

Of an update X = r G c a backend takes products with k vectors, of small matrices of one shape
together. What comes of it are scales of root-mean-square 1, and k directions to be taken away when
the parameter is written. On a mesh k numbers a row and k a column are added up, never a matrix.
"""

from collections.abc import Sequence
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

from sinkgd.deflation import LowRank, find_leading, fixed_block
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
    parts: Sequence[Part],
    scales: Sequence[Scales],
    blocks: Sequence[Tensor],
    backend: Backend,
) -> list[Scales | Lowered]:
    """Return scales of deflated updates, of root-mean-square 1.

    Args:
        parts: The gradients, rows the out-features.
        scales: For which ``row * grad * col`` is normalized.
        blocks: Ω of each, as `blocks_of` returns them.
        backend: What multiplies the updates of this rank's pieces.
    """
    found: list[Scales | Lowered] = [*scales]
    stacks = _alike(parts)
    firsts = [parts[own[0]] for own in stacks]
    is_whole = not any(part.place and part.place.row_groups for part in firsts)
    directions = find_leading(
        backend.products(
            [Stack([parts[i].grad for i in own], [scales[i] for i in own]) for own in stacks]
        ),
        [
            torch.stack([blocks[i][..., : min(first.shape) - 1] for i in own])
            for own, first in zip(stacks, firsts, strict=True)
        ],
        [first.shape for first in firsts],
        lambda numbers: over_rows(numbers, _each(firsts, numbers)),
        None if is_whole else lambda numbers: over_columns(numbers, _each(firsts, numbers)),
    )
    for own, first, (away, square) in zip(stacks, firsts, directions, strict=True):
        dtype = scales[own[0]].row.dtype
        stretch = (prod(first.shape) / or_one(square)).sqrt_()
        left = (away.left * stretch).to(dtype)
        right = away.right.mT.to(dtype).contiguous().mT  # a direction beside the other
        for i, factor, *pair in zip(own, stretch.to(dtype), left, right, strict=True):
            row, col = scales[i]
            found[i] = Lowered(row * factor, col, LowRank(*pair))
    return found


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
