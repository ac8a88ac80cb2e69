"""An extra half step before the iterations, on the side (row or column) with which they end.

The iterations usually start from column scales of 1. Starting from the inverse column lengths of
the gradient instead is an extra half step, which normalizes columns: 2L + 1 half steps in all. With
``last="row"`` the iterations run on the transpose, so the extra half step normalizes rows.
"""

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from sinkgd.distributed.all_reduce import row_lengths, sum_over_rows
from sinkgd.distributed.shards import ParamMatrix
from sinkgd.exchange import Steps, computation
from sinkgd.kernels import Backend
from sinkgd.optim.method import Group
from sinkgd.optim.transform import Batch, Transform

SIDES = ("row", "column")
# The smallest column scale to start from, in units of the largest. Its square times the square of
# an entry is in the range of float32.
SMALLEST_START = 2.0**-40


class ExtraHalfStep(Transform):
    """Begin with the side with which the iterations end: ``first`` equal to ``last``."""

    options = MappingProxyType[str, object]({"first": None})
    switch = "first"

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse an unknown side, and an extra half step together with a warm start."""
        del name, param
        first, last = group["first"], group["last"]
        if first is not None and first not in SIDES:
            raise ValueError(f"first must be None or one of {SIDES}, got {first!r}")
        if first == last and group["warm_start"]:
            raise ValueError(
                f"warm_start=True begins from the scales of the last step, but first={first!r}"
                f" with last={last!r} begins from the lengths of this gradient; leave one of them "
                "off"
            )

    @computation
    def before(self, batch: Batch) -> Steps[Batch]:
        """Start from the inverse column lengths if ``first`` equals ``last``.

        Any other ``first`` is the side with which the iterations begin anyway.
        """
        if batch.group["first"] != batch.group["last"]:
            return batch
        starts = yield starts_after_half_step(batch.iterated, batch.backend)
        return batch._replace(starts=starts)


@computation
def starts_after_half_step(
    matrices: Sequence[ParamMatrix], backend: Backend
) -> Steps[list[Tensor]]:
    """Return column scales ``(..., 1, n)`` that bring the columns of each matrix to one length.

    They are at most 1, as `Backend.scales` requires, and the largest is at least 1/√n. A column
    shorter than 2**-40 times the Frobenius norm of its matrix gets the scale of a column of that
    length. Reads the gradients once. A process group gets one message if it shards rows, and one
    if it shards columns.
    """
    transposed = [matrix.mT for matrix in matrices]
    lengths = yield row_lengths(transposed, backend)  # (..., n, 1)
    sums = yield sum_over_rows([_squares_and_inverse_squares(own) for own in lengths], transposed)
    starts = []
    for matrix, length, own in zip(matrices, lengths, sums, strict=True):
        total, inverse = own[..., :1].sqrt(), own[..., 1:].rsqrt()  # inverse ≈ shortest length
        least = SMALLEST_START * total
        start = torch.maximum(inverse.where(inverse.isfinite(), 0), least) / length
        start = torch.where(length == 0, 1, start.clamp(max=1))
        dtype = torch.promote_types(matrix.grad.dtype, torch.float32)
        starts.append(start.mT.to(dtype).contiguous())
    return starts


def _squares_and_inverse_squares(lengths: Tensor) -> Tensor:
    """Return the sums of squares and of inverse squares, ``(..., 1, 2)``; zeros are left out."""
    squares = lengths.square()
    inverse = torch.where(squares == 0, 0, 1 / squares)
    return torch.cat([squares, inverse], dim=-1).sum(-2, keepdim=True)
