r"""Updates with a given operator norm, estimated by one power iteration per step.

The largest singular value σ of the update X = r G c is estimated by

.. math::
    u = X v, \qquad w = X^\top u, \qquad \sigma \approx \lVert w \rVert / \lVert u \rVert,
    \qquad v \leftarrow w / \lVert w \rVert

and v is kept for the next step. The estimate is never above σ. If the gradient stays the same, the
error of the estimate falls by a factor of (σ₂/σ)⁴ per step, where σ₂ is the second singular value.
If the gradient changes, the estimate follows with a delay. X is not formed: the products are
r G (c v) and c Gᵀ (r u). They read G twice. The factor that sets the operator norm is multiplied
into r.

State: ``state[param]["power_vector"]``, float32, n numbers per matrix, as
`sinkgd.optim.kept_vectors` shapes and shards them.

Scratch: one float32 matrix if gradients are narrower than float32, else none; with
``deflated_rank``, also a float32 copy of each update. On a mesh the transform costs at most two
messages for a process group that shards columns, and one for a process group that shards rows.

Letters, everywhere in this file:
    m, n: rows and columns; ...: leading batch dimensions, one independent matrix each
"""

import math
from collections.abc import MutableMapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkgd.distributed.all_reduce import sum_over_columns, sum_over_rows
from sinkgd.distributed.shards import ParamMatrix, shard_except
from sinkgd.exchange import Steps, computation
from sinkgd.kernels import Scales
from sinkgd.matrix_views import dims_of
from sinkgd.optim.kept_vectors import read_vectors, shape_of_vectors, write_vectors_
from sinkgd.optim.method import Group
from sinkgd.optim.transform import Batch, Scratch, Transform, matrices_of

POWER_VECTOR = "power_vector"
SIZES = (None, "unit", "muon")

# Entries of v stay above this fraction of their root-mean-square, so that v never loses a column.
# This changes the estimate by the square of the fraction.
SMALLEST_SHARE = 2.0**-16


class OperatorNorm(Transform):
    """Bring the estimated operator norm of each update to 1, or to √(m/n)."""

    options = MappingProxyType[str, object]({"operator_norm": None})
    switch = "operator_norm"

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse an unknown size."""
        del name, param
        size = group["operator_norm"]
        if size not in SIZES:
            raise ValueError(f"operator_norm must be one of {SIZES}, got {size!r}")

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Create v of each matrix."""
        _init_vectors(state, param, group["layout"], len(matrices_of(param, group)))

    def scratch(self, group: Group, *, packs_vectors: bool, sharded: bool) -> Scratch:
        """Return what is held: copies of deflated updates, until all messages have come."""
        del packs_vectors
        is_deflated = bool(group["deflated_rank"])
        return Scratch(copies=is_deflated and not sharded, late_copies=is_deflated)

    @computation
    def after(self, batch: Batch) -> Steps[Batch]:
        """Scale the updates, and keep the vectors for the next step."""
        layout = batch.group["layout"]
        matrices, scales = batch.without_corrections()
        vectors: list[Tensor] = []
        for slot, state, own, _ in batch.owners():
            if POWER_VECTOR not in state:
                _init_vectors(state, slot.param, layout, len(own))
            vectors += read_vectors(state[POWER_VECTOR], slot.param, layout, len(own))
        pinned = yield pin(matrices, scales, vectors, batch.group)
        batch = batch._replace(matrices=matrices, scales=pinned.scales).only_if(pinned.finite)
        for slot, state, own, flag in batch.owners():
            found = [pinned.vectors[i] for i in own]
            write_vectors_(state[POWER_VECTOR], slot.param, layout, found, flag)
        return batch


def _init_vectors(state: MutableMapping[str, Any], param: Tensor, layout: str, count: int) -> None:
    """Begin with the sines of 1, 2, 3 …, which have both signs and no relation to a gradient.

    A vector of ones would be worse: if inputs have mean zero, as after a layer norm, it is nearly
    orthogonal to every row of the gradient.
    """
    (row_dim,), _ = dims_of(param.ndim, layout)
    shape = shape_of_vectors(param, layout, count)
    places = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64, device=param.device)
    state[POWER_VECTOR] = shard_except(param, [row_dim], places.sin().float().view(shape))


class Pinned(NamedTuple):
    """Scales of updates whose estimated operator norm is the requested one."""

    scales: list[Scales]
    vectors: list[Tensor]  # v of the next step
    finite: list[Tensor]  # 0-dim bool each: whether the estimates are finite; equal on all ranks


@computation
def pin(
    matrices: Sequence[ParamMatrix],
    scales: Sequence[Scales],
    vectors: Sequence[Tensor],
    group: Group,
) -> Steps[Pinned]:
    """Bring the estimated operator norm of each update to 1, or to √(m/n).

    The last half step gave every nonzero row the length √n, or every nonzero column the length √m,
    so σ is at least that length. Deflation does not change this, but ``weight_projection`` may
    remove rows; σ is then at least ‖X‖/√min(m, n), in the Frobenius norm. An estimate below this
    bound is raised to it, so the update stays finite for any v.

    Args:
        matrices: The matrices to update.
        scales: Scales for which ``row * grad * col`` is normalized.
        vectors: v of each matrix, from its state.
        group: Sets ``operator_norm``, ``last`` and ``weight_projection``.
    """
    wide = [Scales(row.double(), col.double()) for row, col in scales]
    every = list(zip(matrices, wide, vectors, strict=True))
    u = [s.row * product(matrix.grad, (s.col * v).mT) for matrix, s, v in every]
    u = yield sum_over_columns(u, matrices)
    w = [s.col * product(p.grad.mT, s.row * x).mT for (p, s, _), x in zip(every, u, strict=True)]
    # One message adds up w, the squares of u and, after a projection, those of X.
    squares = [x.square().sum(-2, keepdim=True) for x in u]
    of_X = [_squares_of(matrix.grad, group) for matrix in matrices]
    joined = [torch.cat(parts, dim=-1) for parts in zip(w, squares, of_X, strict=True)]
    sums = yield sum_over_rows(joined, matrices)
    widths = [[x.shape[-1], 1, y.shape[-1]] for x, y in zip(w, of_X, strict=True)]
    added = [x.split(width, dim=-1) for x, width in zip(sums, widths, strict=True)]
    w, u_squares = [own[0] for own in added], [own[1] for own in added]
    joined = [torch.cat([x.square().sum(-1, keepdim=True), y], dim=-1) for x, _, y in added]
    totals = yield sum_over_columns(joined, matrices)
    w_squares, X_squares = [x[..., :1] for x in totals], [x[..., 1:] for x in totals]

    pinned, kept, finite = [], [], []
    for i, (matrix, scale, v) in enumerate(every):
        m, n = matrix.shape
        sigma = torch.where(u_squares[i] == 0, 0, w_squares[i] / u_squares[i]).sqrt()
        side = math.sqrt(m if group["last"] == "column" else n)
        if group["weight_projection"]:
            least = (X_squares[i] / min(m, n)).sqrt()
            sigma = torch.maximum(sigma, torch.where(least == 0, side, least))
        else:
            sigma = sigma.clamp(min=side)
        size = math.sqrt(m / n) if group["operator_norm"] == "muon" else 1.0
        row = (scale.row * (size / sigma)).to(scales[i].row.dtype)
        pinned.append(Scales(row, scales[i].col))
        kept.append(_next(w[i], w_squares[i], v, n))
        finite.append(sigma.isfinite().all())
    return Pinned(pinned, kept, finite)


def _squares_of(X: Tensor, group: Group) -> Tensor:
    """Return this rank's part of X·X, ``(..., 1, 1)``; nothing, ``(..., 1, 0)``, if it is not used.

    After ``weight_projection``, the update X is in place of the gradient.
    """
    if not group["weight_projection"]:
        return X.new_zeros(*X.shape[:-2], 1, 0, dtype=torch.float64)
    norm: Tensor = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    return norm.double().square()


def _next(w: Tensor, squares: Tensor, v: Tensor, n: int) -> Tensor:
    """Return w / ‖w‖, or v if w is 0; entries that vanish get a small size and the sign of v."""
    unit = torch.where(squares == 0, v.double(), w / squares.sqrt())
    least = torch.full_like(unit, SMALLEST_SHARE / math.sqrt(n))
    return torch.where(unit.abs() < least, least.copysign(v), unit).float()


def product(matrix: Tensor, x: Tensor) -> Tensor:
    """Return ``matrix @ x`` as float64, computed in float32 or wider; no sum overflows."""
    if x.numel() == 0 or matrix.numel() == 0:
        return x.new_zeros(*matrix.shape[:-1], x.shape[-1], dtype=torch.float64)
    x = x.double()
    peak = x.abs().amax(dim=-2, keepdim=True)
    # The power of two is above the number of terms, so that their sum does not overflow.
    unit = torch.where(peak == 0, 1, peak) * 2.0 ** x.shape[-2].bit_length()
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    return (matrix.to(dtype) @ (x / unit).to(dtype)).double() * unit
