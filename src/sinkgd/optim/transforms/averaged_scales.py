r"""Average the scales over steps, so that the noise of one gradient moves them less.

Kept are the lengths a of rows and b of columns, the inverses of the scales r and c:

.. math::
    a^2 \leftarrow \beta a^2 + (1 - \beta)\, r^{-2}, \qquad
    b^2 \leftarrow \beta b^2 + (1 - \beta)\, c^{-2}, \qquad
    X = \frac{G}{a\, b}

with the entries of G/(a b) divided by the a of their row and the b of their column. These are
averages of squares, as in Adam, so r and c each grow by a factor of at most
:math:`(1 - \beta)^{-1/2}`, however small the gradients were before. The first nonzero length of a
row or a column is its first average. The length of a row or column of zeros is 0.

Without ``deflated_rank`` the update has a root-mean-square of 1 only on average: it grows and
shrinks with the gradient, and clipping gradients changes it. Deflation brings it to 1 in every
step.

Only the product of row and column scales counts. They are averaged in units in which the geometric
mean of the nonzero column scales is 1, so that it does not matter how a backend divides the size of
the gradient between them. Lengths are those of gradients without a loss scale.

State, float32 (float64 for float64): ``state[param]["row_length"]``, a, one number per row;
``state[param]["column_length"]``, b, one per column of each matrix; both as
`sinkgd.optim.kept_vectors` shapes and shards them. On a mesh a process group that shards columns
gets one message more.

Letters, everywhere in this file:
    m, n: rows and columns; ...: leading batch dimensions, one independent matrix each
    β: the decay rate ``averaged_scales``; S: the loss scale
    u: the geometric mean of the nonzero column scales

References:
    Adafactor averages squared lengths of rows and columns. https://arxiv.org/abs/1804.04235
"""

from collections.abc import MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sinkgd.distributed.all_reduce import sum_over_columns
from sinkgd.exchange import Steps, computation
from sinkgd.kernels import Scales
from sinkgd.number_check import check_decay_rate
from sinkgd.optim.geometric_means import geometric_mean, sum_of_logs
from sinkgd.optim.kept_vectors import (
    in_range,
    read_vectors,
    view_row_vectors,
    write_vectors_,
    zero_column_vectors,
    zero_row_vectors,
)
from sinkgd.optim.method import Group
from sinkgd.optim.transform import Batch, Transform, matrices_of

ROWS, COLUMNS = "row_length", "column_length"


class AveragedScales(Transform):
    """Scale by averages of this step's scales and earlier ones."""

    options = MappingProxyType[str, object]({"averaged_scales": 0.0})
    switch = "averaged_scales"

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse a decay rate out of range."""
        del name, param
        check_decay_rate("averaged_scales", group["averaged_scales"])

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Create a and b, filled with zeros."""
        _prepare(state, param, group, len(matrices_of(param, group)))

    @computation
    def after(self, batch: Batch) -> Steps[Batch]:
        """Average the lengths of parameters with finite gradients, and scale by the averages."""
        plain = batch.plain_scales
        units = yield sum_over_columns([sum_of_logs(own.col) for own in plain], batch.matrices)
        lengths = [_lengths(*own, batch) for own in zip(plain, units, strict=True)]
        scales, beta = list[Scales](), batch.group["averaged_scales"]
        for slot, state, own, flag in batch.owners():
            _prepare(state, slot.param, batch.group, len(own))
            layout, kept = batch.group["layout"], list[Tensor]()
            rows = [plain[i].row.shape[-2] for i in own]
            kept_a = view_row_vectors(state[ROWS], slot.param, layout, rows)
            kept_b = read_vectors(state[COLUMNS], slot.param, layout, len(own))
            for i, was_a, was_b in zip(own, kept_a, kept_b, strict=True):
                here = lengths[i]
                a, b = _average(was_a, here.row, beta), _average(was_b, here.col, beta)
                scales.append(_scaled(plain[i], here, Scales(a, b)))
                new = in_range(a, was_a.dtype)
                was_a.copy_(new if flag is None else torch.where(flag, new, was_a))
                kept.append(in_range(b, was_b.dtype))
            write_vectors_(state[COLUMNS], slot.param, layout, kept, flag)
        return batch._replace(scales=scales)


def _prepare(state: MutableMapping[str, Any], param: Tensor, group: Group, count: int) -> None:
    """Create the lengths of a parameter, if they are absent."""
    if ROWS in state:
        return
    layout, dtype = group["layout"], torch.promote_types(param.dtype, torch.float32)
    state[ROWS] = zero_row_vectors(param, layout, 1, dtype)
    state[COLUMNS] = zero_column_vectors(param, layout, count, dtype)


def _lengths(scales: Scales, unit: Tensor, batch: Batch) -> Scales:
    """Return the lengths of rows and columns, 1/(r u S) and u/c, in float64."""
    u = geometric_mean(unit)
    row, col = scales.row.double() * u, scales.col.double() / u
    if batch.context.loss_scale is not None:
        row = row * batch.context.loss_scale
    return Scales(_inverse(row), _inverse(col))


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0, 1 / scales)


def _average(was: Tensor, now: Tensor, beta: float) -> Tensor:
    """Return the average length, in float64."""
    mean = beta * was.double().square() + (1 - beta) * now.square()
    return torch.where(was == 0, now, mean.sqrt())


def _scaled(scales: Scales, now: Scales, average: Scales) -> Scales:
    """Return the inverse averages as scales, in the range of the scales of this step."""
    found: Sequence[Tensor] = [
        in_range(one.double() * torch.where(mean == 0, 1, length / mean), one.dtype)
        for one, length, mean in zip(scales, now, average, strict=True)
    ]
    return Scales(*found)
