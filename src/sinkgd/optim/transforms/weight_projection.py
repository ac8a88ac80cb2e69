r"""Updates whose rows are orthogonal to the rows of the weight.

A row x of the update, an out-feature, is projected off the same row w of the weight, and keeps its
length:

.. math::
    y = x - \frac{x \cdot w}{w \cdot w}\, w, \qquad x \leftarrow \frac{\lVert x \rVert}{\lVert y
    \rVert}\, y

The step then turns a row of the weight and, to first order in the learning rate, does not change
its length. A row of zeros in the weight leaves x as it is. A row x that is parallel to w, such as
any row of a matrix with one column, becomes zero.

There is no state. Scratch: a float32 copy of each update, and three more copies of one matrix at a
time. On a mesh the transform costs one message for a process group that shards columns.

References:
    Nora, https://arxiv.org/abs/2605.03769. It projects the rows of a momentum. Here the rows of
    the normalized update are projected, and no momentum is needed.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from sinkgd.distributed.all_reduce import sum_over_columns
from sinkgd.exchange import Steps, computation
from sinkgd.newton_schulz import or_one
from sinkgd.optim.method import Group
from sinkgd.optim.transform import Batch, Scratch, Transform

# A row whose sine to the weight's row is at most 1/256 counts as parallel: rounding in float32
# would change what remains of it by a percent.
LEAST_SQUARED_SINE = 2.0**-16


class WeightProjection(Transform):
    """Project each row of the update off the same row of the weight."""

    options = MappingProxyType[str, object]({"weight_projection": False})
    switch = "weight_projection"

    def scratch(self, group: Group, *, packs_vectors: bool, sharded: bool) -> Scratch:
        """Return what is held: copies of the updates, until all messages have come."""
        del group, packs_vectors
        return Scratch(copies=not sharded, late_copies=1)

    @computation
    def after(self, batch: Batch) -> Steps[Batch]:
        """Put the projected updates in place of the gradients."""
        updates, weights = batch.updates(), batch.weights
        numbers = [row_products(x, w) for x, w in zip(updates, weights, strict=True)]
        totals = yield sum_over_columns(numbers, batch.matrices)
        for x, w, total in zip(updates, weights, totals, strict=True):
            _project_(x, w, total)
        return batch.with_updates(updates)


def row_products(update: Tensor, weight: Tensor) -> Tensor:
    """Return x·x, x·w and w·w of each row of two matrices ``(..., m, n)``: float64 ``(..., m, 3)``.

    Weights may be nearly as small or as large as float32 allows: rows of the weight are divided by
    their l1 norms before they are multiplied.
    """
    wide = weight.to(update.dtype)
    length = or_one(torch.linalg.vector_norm(wide, 1, dim=-1, keepdim=True))
    unit = wide / length
    length = length.double()
    pairs = ((update, update), (update, unit), (unit, unit))
    sums = [(x * y).sum(-1, keepdim=True).double() for x, y in pairs]
    return torch.cat([sums[0], sums[1] * length, sums[2] * length.square()], dim=-1)


def _project_(x: Tensor, w: Tensor, products: Tensor) -> None:
    """Project the rows of ``x`` off those of ``w``, given their `row_products`."""
    xx, xw, ww = torch.split(products, 1, dim=-1)
    left = xx - xw.square() / or_one(ww)  # y·y
    is_parallel = left <= LEAST_SQUARED_SINE * xx
    stretch = torch.where(is_parallel, 0, (xx / or_one(left)).sqrt())
    x.mul_(stretch.to(x.dtype)).addcmul_(w.to(x.dtype), (-stretch * xw / or_one(ww)).to(x.dtype))
