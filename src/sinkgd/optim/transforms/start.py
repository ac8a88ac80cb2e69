"""Where the iterations of SR-Sinkhorn start: the side of the half steps, and the column scales.

An iteration is two half steps. Algorithm 3 begins with rows and ends with columns. On the transpose
it begins with columns and ends with rows: ``last="row"``.

The iterations start from column scales of 1, or from one of these:

- The inverse column lengths of the gradient: the iteration then has an extra half step in front, on
  the same side as the last one (``first`` equal to ``last``).
- The scales of the step before (``warm_start``), which are close to those of this step, so that
  fewer iterations are enough. A start does not average steps: with enough iterations, every start
  leads to the same update.

State of a warm start: ``state[param]["col_scale"]``, float32, the n column scales of each matrix of
the parameter, one after the other, in the order of the parameter's dimensions.
"""

from collections.abc import MutableMapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sinkgd.distributed.all_reduce import row_lengths, sum_over_rows
from sinkgd.distributed.shards import ParamMatrix, is_dtensor, local, sharding_of
from sinkgd.exchange import Steps, computation
from sinkgd.kernels import Backend, Descent
from sinkgd.matrix_views import columns_from_memory, columns_to_memory, dims_of
from sinkgd.optim.apply import allowed
from sinkgd.optim.method import Context, Group, Slot

SIDES = ("row", "column")
START_OPTIONS = MappingProxyType[str, object]({"first": None, "last": "column"})
COL_SCALE = "col_scale"
# The smallest start, in units of the largest. Its square times the square of an entry is in the
# range of float32.
SMALLEST = 2.0**-40


def check_start_options(group: Group) -> None:
    """Refuse options out of range, and two starts at once."""
    if group["last"] not in SIDES:
        raise ValueError(f"last must be one of {SIDES}, got {group['last']!r}")
    if group["first"] is not None and group["first"] not in SIDES:
        raise ValueError(f"first must be None or one of {SIDES}, got {group['first']!r}")
    if has_extra_half_step(group) and group["warm_start"]:
        raise ValueError(
            f"warm_start=True begins from the scales of the last step, and first={group['first']!r}"
            f" with last={group['last']!r} from the lengths of this one; leave one of them off"
        )


def has_extra_half_step(group: Group) -> bool:
    """Whether an extra half step on the side of the last one comes first."""
    return bool(group["first"] == group["last"])


@computation
def starts_after_half_step(
    matrices: Sequence[ParamMatrix], backend: Backend
) -> Steps[list[Tensor]]:
    """Return column scales ``(..., 1, n)`` that bring the columns of each matrix to one length.

    The largest is at most 1 and at least 1/√n, as `Backend.scales` requires. A column that is more
    than 2**40 times shorter than the whole matrix gets the scale of a column that is 2**40 times
    shorter. Reads the gradients once, and sends one message per process group.
    """
    transposed = [matrix.mT for matrix in matrices]
    lengths = yield row_lengths(transposed, backend)  # (..., n, 1)
    sums = yield sum_over_rows([_squares_and_inverse_squares(own) for own in lengths], transposed)
    starts = []
    for matrix, length, own in zip(matrices, lengths, sums, strict=True):
        total, inverse = own[..., :1].sqrt(), own[..., 1:].rsqrt()  # inverse: about the shortest
        start = torch.maximum(inverse.where(inverse.isfinite(), 0), SMALLEST * total) / length
        start = torch.where(length == 0, 1, start.clamp(max=1))
        dtype = torch.promote_types(matrix.grad.dtype, torch.float32)
        starts.append(start.mT.to(dtype).contiguous())
    return starts


def _squares_and_inverse_squares(lengths: Tensor) -> Tensor:
    """Return the sums of squares and of inverse squares without zeros: ``(..., 1, 2)``."""
    squares = lengths.square()
    inverse = torch.where(squares == 0, 0, 1 / squares)
    return torch.cat([squares, inverse], dim=-1).sum(-2, keepdim=True)


def check_warm_start_shards(name: str, param: Tensor, group: Group) -> None:
    """Refuse a warm start of a parameter whose starts would be sharded.

    Raises:
        ValueError: If the starts would be sharded; the message gives the parameter's name.
    """
    if not (group["warm_start"] and is_dtensor(param)):
        return
    sharding = sharding_of(param, *dims_of(param.ndim, group["layout"]))
    side = "row" if group["last"] == "column" else "column"
    kept = sharding if side == "row" else sharding.mT
    if kept.row_groups:
        raise ValueError(
            f"warm_start=True keeps the scales of whole {side}s, and those of {name!r} are "
            f"sharded ({param.placements}); leave it off for this group"
        )


def _kept_starts(state: MutableMapping[str, Any], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the starts that a parameter has kept for its matrices: ``(..., 1, n)``, or None."""
    if COL_SCALE not in state:
        return [None] * len(grads)
    shapes = [(*grad.shape[:-2], 1, grad.shape[-1]) for grad in grads]
    parts = state[COL_SCALE].split([torch.Size(shape).numel() for shape in shapes])
    return [
        part.view(shape).to(torch.promote_types(grad.dtype, torch.float32))
        for part, shape, grad in zip(parts, shapes, grads, strict=True)
    ]


def init_warm_start(
    state: MutableMapping[str, Any], grads: Sequence[Tensor], device: torch.device
) -> None:
    """Start each matrix of a parameter from ones, as without a warm start."""
    entries = sum(prod(grad.shape[:-2]) * grad.shape[-1] for grad in grads)
    state[COL_SCALE] = torch.ones(entries, dtype=torch.float32, device=device)


def _keep(state: MutableMapping[str, Any], cols: Sequence[Tensor], allowed: Tensor | None) -> None:
    """Keep the column scales of each matrix of a parameter, unless ``allowed`` is False."""
    found = torch.cat([_start(col).flatten() for col in cols])
    if COL_SCALE not in state:
        state[COL_SCALE] = torch.ones_like(found)
    if allowed is not None:
        found = torch.where(allowed, found, state[COL_SCALE])
    state[COL_SCALE].copy_(found)


def warm_starts(
    slots: Sequence[Slot],
    grads: Sequence[Tensor],
    ranges: Sequence[range],
    group: Group,
    context: Context,
) -> list[Tensor | None]:
    """Return the starts that some parameters have kept for their matrices."""
    starts: list[Tensor | None] = []
    for slot, own in zip(slots, ranges, strict=True):
        found = _kept_starts(context.states[slot.param], [grads[i] for i in own])
        if group["last"] == "column":
            param, layout = local(slot.param), group["layout"]
            found = [x if x is None else columns_to_memory(x, param, layout) for x in found]
        starts += found
    return starts


def keep_warm_starts(
    slots: Sequence[Slot],
    ranges: Sequence[range],
    found: Descent,
    group: Group,
    context: Context,
) -> None:
    """Keep the scales of parameters with finite gradients for the next step."""
    flags = allowed(found.finite, context)
    for i, (slot, own) in enumerate(zip(slots, ranges, strict=True)):
        flag = None if flags is None else flags[i]
        cols = [found.scales[k].col for k in own]
        if group["last"] == "column":
            param, layout = local(slot.param), group["layout"]
            cols = [columns_from_memory(col, param, layout) for col in cols]
        _keep(context.states[slot.param], cols, flag)


def _start(col: Tensor) -> Tensor:
    """Return column scales relative to the largest, in (0, 1]; 1 for a zero column."""
    unit = col.float() / col.amax(dim=-1, keepdim=True).float()
    return torch.where(unit > 0, unit.clamp(min=SMALLEST), 1)  # NaN if all scales are zero
