"""How a tensor of matrices lies in memory, in the units of the tables: bytes and numbers."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from sinkgd.kernels.cpu.tables import BF16, F32
from sinkgd.kernels.layout import layout_of, may_be_written

# The types that the loops read and write, and the numbers by which they know them.
DTYPES = {torch.float32: F32, torch.bfloat16: BF16}


class Form(NamedTuple):
    """One batch of matrices, seen as rows in memory."""

    P: int  # rows in memory
    Q: int  # their length, entries
    ld: int  # bytes from one to the next
    dtype: int
    turned: bool  # a row in memory is a column of the matrix
    offsets: tuple[int, ...]  # bytes from the tensor's first entry to each matrix's
    may_be_written: bool  # no two entries share memory
    rows: int  # of all matrices
    cols: int


def form_of(x: Tensor) -> Form | None:
    """Return the form of ``(..., m, n)``; None where the loops cannot read it as it is."""
    return _form(type(x), x.dtype, x.is_cpu, x.shape, x.stride())


@lru_cache(maxsize=4096)
def _form(
    kind: type, dtype: torch.dtype, on_cpu: bool, shape: torch.Size, stride: tuple[int, ...]
) -> Form | None:
    # The loops read memory: no subclass may stand behind it.
    if kind not in (Tensor, Parameter) or dtype not in DTYPES or not on_cpu or 0 in shape:
        return None
    layout = layout_of(shape, stride)
    if layout is None:
        return None
    size = dtype.itemsize
    offsets = tuple(offset * size for offset in layout.offsets)
    return Form(
        P=layout.P,
        Q=layout.Q,
        ld=layout.ld * size,
        dtype=DTYPES[dtype],
        turned=layout.turned,
        offsets=offsets,
        may_be_written=may_be_written(shape, stride),
        rows=len(offsets) * shape[-2],
        cols=len(offsets) * shape[-1],
    )
