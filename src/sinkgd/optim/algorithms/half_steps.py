"""With which half step SR-Sinkhorn begins and ends: rows or columns.

An iteration is two half steps. Algorithm 3 begins with rows and ends with columns. Of the turned
matrix, whose columns are rows, it begins with columns and ends with rows. A half step more, of the
kind that comes last, is put in front by its scales: where all columns of G have been brought to one
length, column scales are the inverse lengths, and the iterations start from them.
"""

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from sinkgd.exchange import Steps, computation
from sinkgd.kernels import Backend
from sinkgd.optim.algorithms.across import over_rows, row_lengths
from sinkgd.optim.algorithms.contract import Group
from sinkgd.optim.algorithms.parts import Part
from sinkgd.optim.algorithms.warm_start import SMALLEST

SIDES = ("row", "column")
HALF_STEP_OPTIONS = MappingProxyType[str, object]({"first": None, "last": "column"})


def check_half_steps(group: Group) -> None:
    """Refuse options out of range, and two starts at once."""
    if group["last"] not in SIDES:
        raise ValueError(f"last must be one of {SIDES}, got {group['last']!r}")
    if group["first"] is not None and group["first"] not in SIDES:
        raise ValueError(f"first must be None or one of {SIDES}, got {group['first']!r}")
    if has_half_step_more(group) and group["warm_start"]:
        raise ValueError(
            f"warm_start=True begins from the scales of the last step, and first={group['first']!r}"
            f" with last={group['last']!r} from the lengths of this one; leave one of them off"
        )


def has_half_step_more(group: Group) -> bool:
    """Whether the kind of half step that comes last also comes first."""
    return bool(group["first"] == group["last"])


@computation
def starts_after_half_step(parts: Sequence[Part], backend: Backend) -> Steps[list[Tensor]]:
    """Return column scales ``(..., 1, n)`` that bring the columns of each part to one length.

    The largest is at most 1 and at least 1/√n, as `Backend.scales` wants them. Columns that are
    more than 2**40 times shorter than the whole matrix count as no shorter. One reading of the
    gradients, and one message a process group.
    """
    turned = [part.turned() for part in parts]
    lengths = yield row_lengths(turned, backend)  # (..., n, 1)
    sums = yield over_rows([_squares_and_inverse_squares(own) for own in lengths], turned)
    starts = []
    for part, length, own in zip(parts, lengths, sums, strict=True):
        total, inverse = own[..., :1].sqrt(), own[..., 1:].rsqrt()  # the second near the shortest
        start = torch.maximum(inverse.where(inverse.isfinite(), 0), SMALLEST * total) / length
        start = torch.where(length == 0, 1, start.clamp(max=1))
        dtype = torch.promote_types(part.grad.dtype, torch.float32)
        starts.append(start.mT.to(dtype).contiguous())
    return starts


def _squares_and_inverse_squares(lengths: Tensor) -> Tensor:
    """Return the sums of both over ``(..., n, 1)``, without zeros: ``(..., 1, 2)``."""
    squares = lengths.square()
    inverse = torch.where(squares == 0, 0, 1 / squares)
    return torch.cat([squares, inverse], dim=-1).sum(-2, keepdim=True)
