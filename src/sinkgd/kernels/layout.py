"""The memory layout of a tensor of matrices, as kernels read it: rows of stride one.

Letters, everywhere in this file:
    P, Q: the number of rows in memory of one matrix, and their length
    ld: elements from one row in memory to the next
"""

from functools import lru_cache
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """One batch of matrices, seen as rows in memory."""

    P: int
    Q: int
    ld: int
    transposed: bool  # a row in memory is a column of the matrix
    offsets: tuple[int, ...]  # elements from the first entry of the tensor to that of each matrix


@lru_cache(maxsize=1024)
def layout_of(shape: torch.Size, stride: tuple[int, ...]) -> Layout | None:
    """Return the layout of ``(..., m, n)``, or None if neither rows nor columns are dense."""
    (m, n), (row_stride, col_stride) = shape[-2:], stride[-2:]
    offsets = tuple(
        sum(i * s for i, s in zip(index, stride[:-2], strict=True))
        for index in product(*map(range, shape[:-2]))
    )
    if col_stride == 1 or n == 1:
        return Layout(m, n, row_stride, False, offsets)
    if row_stride == 1 or m == 1:
        return Layout(n, m, col_stride, True, offsets)
    return None


def dense_layout(x: Tensor) -> Layout:
    """Return the layout of a tensor that is known to have one."""
    layout = layout_of(x.shape, x.stride())
    assert layout is not None, f"strides {x.stride()}"
    return layout


def dense(x: Tensor) -> Tensor:
    """Return ``x``, or a contiguous copy if neither its rows nor its columns are dense."""
    return x if layout_of(x.shape, x.stride()) is not None else x.contiguous()


def aligned(x: Tensor, like: Tensor) -> Tensor:
    """Return ``x``, copied if needed, with a layout that is transposed if that of ``like`` is."""
    if x.stride() == like.stride():
        return x
    transposed = dense_layout(like).transposed
    layout = layout_of(x.shape, x.stride())
    if layout is not None and layout.transposed == transposed:
        return x
    if not transposed:
        return x.contiguous()
    if x.shape[-2] == 1:  # a single row counts as transposed only if there are gaps between entries
        gapped = x.new_empty((*x.shape[:-2], x.shape[-1], 2))[..., :1]
        return gapped.copy_(x.mT).mT
    return x.mT.contiguous().mT


@lru_cache(maxsize=1024)
def may_be_written(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether a tensor has a `Layout` whose rows do not overlap and whose matrices lie apart.

    False also if the rows of one matrix lie between those of another.
    """
    layout = layout_of(shape, stride)
    if layout is None or (layout.ld < layout.Q and layout.P > 1):
        return False
    apart = (layout.P - 1) * layout.ld + layout.Q  # from a matrix's first entry to past its last
    starts = sorted(layout.offsets)
    return all(after - before >= apart for before, after in pairwise(starts))


def check_scales(param: Tensor, row: Tensor, col: Tensor) -> None:
    """Check that scales have the shapes that kernels assume for ``param``.

    Raises:
        ValueError: If the shapes do not fit that of ``param``; the message gives them.
    """
    shape = param.shape
    if row.shape != (*shape[:-1], 1) or col.shape != (*shape[:-2], 1, shape[-1]):
        raise ValueError(
            f"scales of shapes {tuple(row.shape)} and {tuple(col.shape)} do not fit a parameter of "
            f"shape {tuple(shape)}; they must have the shapes (..., m, 1) and (..., 1, n)"
        )


def check_start(grad: Tensor, start: Tensor | None) -> None:
    """Check the shape of initial column scales.

    Raises:
        ValueError: If the shape does not fit that of ``grad``; the message gives both.
    """
    if start is not None and start.shape != (*grad.shape[:-2], 1, grad.shape[-1]):
        raise ValueError(
            f"starts of shape {tuple(start.shape)} do not fit a gradient of shape "
            f"{tuple(grad.shape)}; they must have the shape (..., 1, n)"
        )


def matrix_of(x: Tensor, index: int) -> Tensor:
    """Return matrix number ``index``, ``(m, n)``, of a batch ``(..., m, n)``."""
    offset = x.storage_offset() + dense_layout(x).offsets[index]
    return x.detach().as_strided(x.shape[-2:], x.stride()[-2:], offset)
