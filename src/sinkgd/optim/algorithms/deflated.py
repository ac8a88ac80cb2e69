"""Updates whose leading singular values are lowered to the others', without state.

The update X = r G c is made, a few matrices at a time, and deflated where it lies; what follows
then sees X as a gradient, with scales that bring it back to root-mean-square 1. On a mesh k numbers
a row and k a column are added up, never a matrix.
"""

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from sinkgd.deflation import deflate_, fixed_block
from sinkgd.kernels import Scales
from sinkgd.newton_schulz import or_one
from sinkgd.optim.algorithms.across import over_columns, over_rows
from sinkgd.optim.algorithms.contract import Group, Slot, local
from sinkgd.optim.algorithms.layout import dims_of, rows_then_columns
from sinkgd.optim.algorithms.parts import Part, spread_columns

DEFLATION_OPTIONS = MappingProxyType[str, object]({"deflated_rank": 0})


def check_deflation(group: Group) -> None:
    """Refuse a rank out of range."""
    rank = group["deflated_rank"]
    if not isinstance(rank, int) or rank < 0:
        raise ValueError(f"deflated_rank must be a whole number of at least 0, got {rank!r}")


def blocks_of(slots: Sequence[Slot], owners: Sequence[range], group: Group) -> list[Tensor]:
    """Return Ω of every part, ``(..., n, k)`` float64: of the columns that this rank has."""
    blocks: list[Tensor] = []
    for slot, own in zip(slots, owners, strict=True):
        param, layout = slot.param, group["layout"]
        (row_dim,), cols = dims_of(param.ndim, layout)
        # One block, k by n, for all matrices of a parameter: spread along the other dimensions.
        sizes = {row_dim: group["deflated_rank"], **{dim: param.shape[dim] for dim in cols}}
        block = fixed_block(list(sizes.values()), param.device)
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
    able = [i for i, part in enumerate(parts) if min(part.shape) > 1]
    if not able:
        return found_parts, found_scales
    own = [parts[i] for i in able]
    updates = [_update(parts[i].grad, scales[i]) for i in able]
    squares = deflate_(
        updates,
        [blocks[i][..., : min(parts[i].shape) - 1] for i in able],
        [part.shape for part in own],
        lambda numbers: over_rows(numbers, own),
        lambda numbers: over_columns(numbers, own),
    )
    for i, update, square in zip(able, updates, squares, strict=True):
        m, n = parts[i].shape
        stretch = (m * n / or_one(square)).sqrt_().to(update.dtype)
        row, col = (torch.ones_like(x, dtype=update.dtype) for x in scales[i])
        found_parts[i] = parts[i]._replace(grad=update)
        found_scales[i] = Scales(row * stretch, col)
    return found_parts, found_scales


def _update(grad: Tensor, scales: Scales) -> Tensor:
    """Return r G c in float32, or in float64 for float64."""
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    return wide * scales.row * scales.col
