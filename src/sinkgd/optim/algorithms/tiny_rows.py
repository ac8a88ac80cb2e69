"""Rows that are nearly zero: kept, and made as long as all others, or taken for zero.

Row normalization gives every row of the gradient one length, whatever it was. In the table of an
embedding or an output head most rows belong to tokens that a batch did not hold; what is left in
them is noise.
"""

from collections.abc import Sequence
from types import MappingProxyType

from sinkgd.exchange import Steps, computation
from sinkgd.kernels import Backend
from sinkgd.optim.algorithms.across import over_rows, row_lengths
from sinkgd.optim.algorithms.contract import Group
from sinkgd.optim.algorithms.parts import Part

TREATMENTS = ("keep", "mask")

# The threshold is ours: no source gives one. Rows a hundred times shorter than the mean are noise
# beside it.
TINY_ROW_OPTIONS = MappingProxyType[str, object]({"tiny_rows": "keep", "tiny_row_threshold": 0.01})


def check_tiny_rows(group: Group) -> None:
    """Refuse options out of range."""
    if group["tiny_rows"] not in TREATMENTS:
        raise ValueError(f"tiny_rows must be one of {TREATMENTS}, got {group['tiny_rows']!r}")
    if not group["tiny_row_threshold"] >= 0:
        raise ValueError(
            f"tiny_row_threshold must be at least 0, got {group['tiny_row_threshold']}"
        )


@computation
def without_tiny_rows(
    parts: Sequence[Part], threshold: float, backend: Backend, *, in_place: bool
) -> Steps[list[Part]]:
    """Set rows to zero whose l2 norm is below ``threshold`` times the mean of all rows'.

    Their update is then zero, and they take no part in the scales of others. One reading of the
    gradients and, unless ``in_place``, a copy of each; one message a process group. A row that is
    not finite stays, so that it is found.
    """
    lengths = yield row_lengths(parts, backend)
    totals = yield over_rows([own.sum(-2, keepdim=True) for own in lengths], parts)
    kept = []
    for part, length, total in zip(parts, lengths, totals, strict=True):
        tiny = length < threshold * total / part.shape[0]
        fill = part.grad.masked_fill_ if in_place else part.grad.masked_fill
        kept.append(part._replace(grad=fill(tiny, 0)))
    return kept
