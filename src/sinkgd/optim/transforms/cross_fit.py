r"""Take the scales from one part of a batch, and the direction from the rest of it.

The scales that SR-Sinkhorn finds share the noise of the gradient that they scale: a row with a
large error gets a small scale. Here they come from another gradient: `GroupedOptimizer.hold_out`
finds the scales of the gradient of the first micro-batches, keeps them, and clears this gradient;
the step then scales the gradient G of the other micro-batches. With r the scales of the rows of G
itself, and h those that were held out, the scale of row i becomes

.. math::
    r_i \frac{f_i}{q}, \qquad
    f_i = \min\left(2, \max\left(\frac12, \frac{1}{u} \cdot \frac{h_i}{r_i}\right)\right)

where u is the geometric mean of h/r, and q the quadratic mean of f. Columns are scaled likewise.

So the held scales say how rows and columns compare, and G says how large the step is. It therefore
does not matter how many micro-batches were held out, whether gradients were clipped in between, or
by which loss scale they were multiplied. The root-mean-square of the update is close to 1, and
deflation brings it to 1.

The limits of f are for rows that few tokens reach in one part of the batch, such as those of an
expert: without them, some rows could move without a bound, or all others not at all. So every scale
is at least a quarter of that of G, and at most four times as large. Rows of zeros, in G or in the
held-out gradient, have f = 1, and so have parameters without a held-out gradient. If the held-out
gradient is not finite, the parameter is treated as one with a non-finite gradient.

State, only between `hold_out` and the step, as `sinkgd.optim.kept_vectors` shapes and shards it:
``state[param]["held_row"]``, h, one float32 (float64 for float64) per row, and ``"held_column"``,
one per column of each matrix. Until the end of the step, ``"held_is_finite"``, a 0-dim bool. On a
mesh the step sends two messages more to each process group that shards rows, and two to each that
shards columns; `hold_out` sends those of the iterations, and of what transforms do before them.

Letters, everywhere in this file:
    m, n: rows and columns; ...: leading batch dimensions, one independent matrix each
    f: the factors of scales; u, q: the means above

References:
    Nayak et al. estimate preconditioner and gradient from independent micro-batches.
    https://arxiv.org/abs/2605.20756
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sinkgd.distributed.all_reduce import sum_over_columns, sum_over_rows
from sinkgd.distributed.shards import ParamMatrix, local
from sinkgd.exchange import Computation, Steps, computation
from sinkgd.kernels import Scales
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

# As `sum_over_rows`.
Total = Callable[[Sequence[Tensor], Sequence[ParamMatrix]], Computation[list[Tensor]]]

ROWS, COLUMNS, FINITE = "held_row", "held_column", "held_is_finite"
MOST = 2.0  # the upper limit of f; the lower one is its inverse


class CrossFit(Transform):
    """Scale by the scales that were held out, in the size of the gradient's own."""

    options = MappingProxyType[str, object]({"cross_fit": False})
    switch = "cross_fit"

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse averages of gradients: the held-out gradient is not one of them."""
        del param
        if not group["cross_fit"]:
            return
        for option, averages, remedy in (
            ("momentum", group["momentum_place"] == "before", ", or set momentum_place='after'"),
            ("momentum_rank", True, ""),
        ):
            if group[option] and averages:
                raise ValueError(
                    f"cross_fit=True takes scales from a part of the batch, and {option}="
                    f"{group[option]!r} of the group of {name!r} averages gradients of several "
                    f"steps: leave one of them off{remedy}"
                )

    @computation
    def after(self, batch: Batch) -> Steps[Batch]:
        """Scale by what was held out, and remove it; the flags stay until the step has ended."""
        scales = batch.plain_scales
        rows = [torch.zeros_like(own.row) for own in scales]
        cols = [torch.zeros_like(own.col) for own in scales]
        finite = list[Tensor]()
        for slot, state, own, _ in batch.owners():
            flag = torch.ones((), dtype=torch.bool, device=local(slot.param).device)
            if is_waiting(state):
                for i, held in zip(own, _views(state, slot.param, batch, own), strict=True):
                    rows[i], cols[i] = held
                flag = state[FINITE]
                del state[ROWS], state[COLUMNS]
            finite += [flag] * len(own)
        found = yield [
            _cross_fitted([x.row.mT for x in scales], [x.mT for x in rows], sum_over_rows, batch),
            _cross_fitted([x.col for x in scales], cols, sum_over_columns, batch),
        ]
        fitted = [Scales(row.mT, col) for row, col in zip(*found, strict=True)]
        return batch._replace(scales=fitted).only_if(finite)


@computation
def _cross_fitted(
    scales: Sequence[Tensor], held: Sequence[Tensor], total: Total, batch: Batch
) -> Steps[list[Tensor]]:
    """Return the new scales of one side of each matrix, from its own and those held out.

    All are ``(..., 1, n)``, where n counts only this rank's; a scale of 0 is unknown.
    """
    ratios = [
        torch.where((own == 0) | (other == 0), 0, other.double() / own.double())
        for own, other in zip(scales, held, strict=True)
    ]
    logs = yield total([sum_of_logs(ratio) for ratio in ratios], batch.matrices)
    factors = [
        torch.where(ratio == 0, 1, (ratio / geometric_mean(sums)).clamp(1 / MOST, MOST))
        for ratio, sums in zip(ratios, logs, strict=True)
    ]
    squares = yield total(
        [_sum_of_squares(f, own != 0) for f, own in zip(factors, scales, strict=True)],
        batch.matrices,
    )
    return [
        in_range(own * f / _quadratic_mean(sums), own.dtype)
        for own, f, sums in zip(scales, factors, squares, strict=True)
    ]


def _sum_of_squares(factors: Tensor, counts: Tensor) -> Tensor:
    """Return the sum of squares of the factors that count, and their number: ``(..., 1, 2)``."""
    squares = torch.where(counts, factors.square(), 0)
    return torch.stack([squares.sum(-1), counts.double().sum(-1)], dim=-1)


def _quadratic_mean(sums: Tensor) -> Tensor:
    """Return the mean ``(..., 1, 1)`` of the factors of `_sum_of_squares`; 1 if none counts."""
    total, count = sums[..., :1], sums[..., 1:]
    return torch.where(count == 0, 1, total / count.clamp(min=1)).sqrt()


def is_held(state: Mapping[str, Any]) -> bool:
    """Whether the scales of a parameter were held out for this step."""
    return FINITE in state


def is_waiting(state: Mapping[str, Any]) -> bool:
    """Whether the scales of a parameter were held out, and have not been used."""
    return ROWS in state


def forget_held(state: MutableMapping[str, Any]) -> None:
    """Remove what is held out, if there is anything."""
    for name in (ROWS, COLUMNS, FINITE):
        state.pop(name, None)


def init_held(param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
    """Create scales of zeros for the matrices of a parameter."""
    layout, dtype = group["layout"], torch.promote_types(param.dtype, torch.float32)
    state[ROWS] = zero_row_vectors(param, layout, 1, dtype)
    state[COLUMNS] = zero_column_vectors(param, layout, len(matrices_of(param, group)), dtype)


def hold_(batch: Batch) -> Tensor:
    """Keep the scales of a batch for the next step, and return which gradients are finite."""
    assert batch.finite is not None, "the iterations have run"
    scales, layout = batch.plain_scales, batch.group["layout"]
    for (slot, state, own, _), finite in zip(batch.owners(), batch.finite.unbind(), strict=True):
        init_held(slot.param, batch.group, state)
        state[FINITE] = finite.clone()
        for view, i in zip(_views(state, slot.param, batch, own), own, strict=True):
            view.row.copy_(in_range(scales[i].row, view.row.dtype))
        cols = [in_range(scales[i].col, state[COLUMNS].dtype) for i in own]
        write_vectors_(state[COLUMNS], slot.param, layout, cols, None)
    return batch.finite


def _views(
    state: MutableMapping[str, Any], param: Tensor, batch: Batch, own: range
) -> list[Scales]:
    """View the held scales of each matrix of a parameter; r and c count only this rank's."""
    layout, rows = batch.group["layout"], [batch.scales[i].row.shape[-2] for i in own]
    held = (
        view_row_vectors(state[ROWS], param, layout, rows),
        read_vectors(state[COLUMNS], param, layout, len(own)),
    )
    return [Scales(row, col) for row, col in zip(*held, strict=True)]
