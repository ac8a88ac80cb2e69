"""What the compiled loops can read and write, and how it is stored in memory.

`sinkgd.kernels.cpu.backend` says what happens to tensors that the loops cannot take.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, overload

import torch
from torch import Size, Tensor
from torch.nn import Parameter

from sinkgd.kernels.backend import Scales
from sinkgd.kernels.layout import aligned, dense, layout_of, may_be_written

# The types that the loops read and write, and their numbers in the tables.
F32 = 0
BF16 = 1
DTYPES = {torch.float32: F32, torch.bfloat16: BF16}


def float32_address(x: Tensor) -> int:
    """Return where the entries of ``x`` begin, after a check that the loops may access them.

    The loops read and write contiguous float32 by address, and would overrun any other buffer.

    Raises:
        TypeError: If ``x`` is not contiguous float32 on a CPU.
    """
    if x.dtype != torch.float32 or not x.is_cpu or not x.is_contiguous():
        raise TypeError(
            f"the compiled loops need contiguous float32 on a CPU; got {x.dtype} on {x.device} "
            f"of shape {tuple(x.shape)} and strides {x.stride()}"
        )
    return x.data_ptr()


class MatrixLayout(NamedTuple):
    """How a batch of matrices is stored: rows in memory, with distances in bytes."""

    P: int  # rows in memory of one matrix
    Q: int  # entries of a row in memory
    ld: int  # bytes from one row in memory to the next
    dtype: int  # a value of `DTYPES`
    transposed: bool  # a row in memory is a column of the matrix
    offsets: tuple[int, ...]  # bytes from the first entry of the tensor to that of each matrix
    may_be_written: bool  # as `sinkgd.kernels.layout.may_be_written`
    rows: int  # rows of all matrices together
    cols: int  # columns of all matrices together


class Input(NamedTuple):
    """A gradient, or a copy of it, that the loops can read."""

    tensor: Tensor
    layout: MatrixLayout


def matrix_layout(x: Tensor) -> MatrixLayout | None:
    """Return the layout of ``(..., m, n)``; None if the loops cannot read the tensor as it is."""
    return _matrix_layout(type(x), x.dtype, x.is_cpu, x.shape, x.stride())


@lru_cache(maxsize=4096)
def _matrix_layout(
    kind: type, dtype: torch.dtype, on_cpu: bool, shape: torch.Size, stride: tuple[int, ...]
) -> MatrixLayout | None:
    # The loops read memory. A subclass of Tensor may not have its entries there.
    if kind not in (Tensor, Parameter) or dtype not in DTYPES or not on_cpu or 0 in shape:
        return None
    layout = layout_of(shape, stride)
    if layout is None:
        return None
    size = dtype.itemsize
    offsets = tuple(offset * size for offset in layout.offsets)
    return MatrixLayout(
        P=layout.P,
        Q=layout.Q,
        ld=layout.ld * size,
        dtype=DTYPES[dtype],
        transposed=layout.transposed,
        offsets=offsets,
        may_be_written=may_be_written(shape, stride),
        rows=len(offsets) * shape[-2],
        cols=len(offsets) * shape[-1],
    )


def readable(grad: Tensor) -> Input | None:
    """Return ``grad`` or a copy of it that the loops can read; None if they cannot read either."""
    if grad.requires_grad and torch.is_grad_enabled():
        return None
    layout = matrix_layout(grad)
    if layout is not None:
        return Input(grad, layout)
    if type(grad) not in (Tensor, Parameter) or not grad.is_cpu or grad.numel() == 0:
        return None
    if grad.dtype == torch.float16:
        return dense_input(dense(grad.float()))
    return dense_input(dense(grad)) if grad.dtype in DTYPES else None


def readable_as(grad: Tensor, param: Tensor, layout: MatrixLayout) -> Input | None:
    """Return ``grad`` in the memory order of ``param``; None if the loops cannot read it."""
    own = matrix_layout(grad)
    if own is not None and own.transposed == layout.transposed and param.shape == grad.shape:
        return Input(grad, own)
    if type(grad) not in (Tensor, Parameter) or not grad.is_cpu or param.shape != grad.shape:
        return None
    return dense_input(aligned(grad, param)) if grad.dtype in DTYPES else None


def dense_input(x: Tensor) -> Input:
    """Return the `Input` of a tensor that is known to have dense rows or columns."""
    layout = matrix_layout(x)
    assert layout is not None, f"strides {x.stride()}"
    return Input(x, layout)


def writable(param: Tensor) -> MatrixLayout | None:
    """Return the layout in which the loops write ``param``; None if they cannot write it."""
    layout = matrix_layout(param)
    if layout is None or not layout.may_be_written:
        return None
    return None if param.requires_grad and torch.is_grad_enabled() else layout


class ScaleBuffer(Sequence[Scales]):
    """The scales of gradients ``(..., m, n)`` in one float32 buffer, as a sequence of `Scales`.

    The buffer has all row scales of the first gradient, then its column scales, and so on. The
    tensors are created on access.

    Args:
        layouts: The layouts of the gradients; None for a gradient whose scales are given later, by
            `put`.
        grads: The gradients.
    """

    def __init__(self, layouts: Sequence[MatrixLayout | None], grads: Sequence[Tensor]) -> None:
        self._grads = grads
        self._given: dict[int, Scales] = {}
        self._begins: list[tuple[int, int]] = []
        end = 0
        for layout in layouts:
            rows, cols = (0, 0) if layout is None else (layout.rows, layout.cols)
            self._begins.append((end, end + rows))
            end += rows + cols
        self._flat = torch.empty(end, dtype=torch.float32, device="cpu")
        base = float32_address(self._flat)
        # Where the row and the column scales of each gradient begin.
        self.addresses = [(base + 4 * row, base + 4 * col) for row, col in self._begins]

    def put(self, i: int, scales: Scales) -> None:
        """Set the scales of gradient ``i``."""
        self._given[i] = scales

    def __len__(self) -> int:
        return len(self._begins)

    @overload
    def __getitem__(self, i: int) -> Scales: ...

    @overload
    def __getitem__(self, i: slice) -> list[Scales]: ...

    def __getitem__(self, i: int | slice) -> Scales | list[Scales]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if i in self._given:
            return self._given[i]
        *batch, m, n = self._grads[i].shape
        row, col = self._begins[i]
        return Scales(self._view(row, (*batch, m, 1)), self._view(col, (*batch, 1, n)))

    def _view(self, begin: int, shape: tuple[int, ...]) -> Tensor:
        return self._flat[begin : begin + Size(shape).numel()].view(shape)
