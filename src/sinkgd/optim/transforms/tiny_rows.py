"""Mask the rows of a gradient that are nearly zero, so that their update is zero.

Row normalization gives all rows of the gradient the same length, even the shortest. In an embedding
or an output head most rows belong to tokens that a batch does not contain; the gradient of these
rows is zero or hardly more than noise.
"""

from collections.abc import Sequence
from types import MappingProxyType

from torch import Tensor

from sinkgd.distributed.all_reduce import row_lengths, sum_over_rows
from sinkgd.distributed.shards import ParamMatrix
from sinkgd.exchange import Steps, computation
from sinkgd.kernels import Backend
from sinkgd.optim.method import Group
from sinkgd.optim.transform import Batch, Scratch, Transform

TREATMENTS = ("keep", "mask")


class TinyRows(Transform):
    """Mask rows whose l2 norm is below ``tiny_row_threshold`` times the mean norm of all rows."""

    # The threshold is ours: no source gives one. A row is taken for noise if its norm is less
    # than a hundredth of the mean norm.
    options = MappingProxyType[str, object]({"tiny_rows": "keep", "tiny_row_threshold": 0.01})
    switch = "tiny_rows"
    remedy = "tiny_rows='mask'"

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range."""
        del name, param
        if group["tiny_rows"] not in TREATMENTS:
            raise ValueError(f"tiny_rows must be one of {TREATMENTS}, got {group['tiny_rows']!r}")
        if not group["tiny_row_threshold"] >= 0:
            raise ValueError(
                f"tiny_row_threshold must be at least 0, got {group['tiny_row_threshold']}"
            )

    def scratch(self, group: Group, *, packs_vectors: bool, sharded: bool) -> Scratch:
        """Return what is held: copies of the gradients."""
        del group, packs_vectors, sharded
        return Scratch(copies=True)

    @computation
    def before(self, batch: Batch) -> Steps[Batch]:
        """Mask the gradients, in place if the step may overwrite them."""
        masked = yield mask_tiny_rows(
            batch.matrices,
            batch.group["tiny_row_threshold"],
            batch.backend,
            in_place=all(slot.is_scratch for slot in batch.slots),
        )
        return batch._replace(matrices=masked)


@computation
def mask_tiny_rows(
    matrices: Sequence[ParamMatrix], threshold: float, backend: Backend, *, in_place: bool
) -> Steps[list[ParamMatrix]]:
    """Set rows to zero if their l2 norm is below ``threshold`` times the mean norm of all rows.

    The update of these rows is then zero, and they do not affect the scales of others. Reads the
    gradients once and, unless ``in_place``, copies them. A process group gets one message if it
    shards rows, and one if it shards columns. A non-finite row is kept, so that later checks find
    it.
    """
    lengths = yield row_lengths(matrices, backend)
    totals = yield sum_over_rows([own.sum(-2, keepdim=True) for own in lengths], matrices)
    kept = []
    for matrix, length, total in zip(matrices, lengths, totals, strict=True):
        tiny = length < threshold * total / matrix.shape[0]
        fill = matrix.grad.masked_fill_ if in_place else matrix.grad.masked_fill
        kept.append(matrix._replace(grad=fill(tiny, 0)))
    return kept
