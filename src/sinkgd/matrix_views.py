"""How a parameter is viewed as matrices: rows are the out-features, columns the in-features.

A layout is a plain string, so that a ``state_dict`` can contain it:
    auto: a matrix as it is, three dimensions as a batch of matrices, more dimensions as ``flatten``
    transposed: stored as (in, out), such as the ``Conv1D`` of GPT-2 in ``transformers``
    flatten: (out, everything else), such as a convolution

``split`` then cuts the rows into separate matrices, such as the query, key and value of a fused
weight. It is a number of equal parts, or the sizes of the parts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LAYOUTS = ("auto", "transposed", "flatten")
Split = int | Sequence[int]


def matrices_of(
    param: Tensor, grad: Tensor, *, layout: str, split: Split
) -> list[tuple[Tensor, Tensor]]:
    """View ``param`` as matrices ``(..., m, n)``, and pair each with the same part of ``grad``.

    The matrices share the memory of ``param``; those of ``grad`` may be copies.

    Examples:
        >>> import torch
        >>> fused = torch.zeros(6, 4)
        >>> [tuple(w.shape) for w, _ in matrices_of(fused, fused, layout="auto", split=3)]
        [(2, 4), (2, 4), (2, 4)]
    """
    if layout == "auto" and split == 1 and param.ndim < 4:  # nearly always
        return [(param, grad)]
    if layout == "flatten" or (layout == "auto" and param.ndim > 3):
        order = _columns_in_memory_order(param)
        whole = param.permute(order).view(param.shape[0], -1)
        whole_grad = grad.permute(order).reshape(param.shape[0], -1)
    elif layout == "transposed":
        whole, whole_grad = param.mT, grad.mT
    else:
        whole, whole_grad = param, grad
    sizes = sizes_of(whole.shape[-2], split)
    if len(sizes) == 1:
        return [(whole, whole_grad)]
    return list(zip(torch.split(whole, sizes, -2), torch.split(whole_grad, sizes, -2), strict=True))


def dims_of(ndim: int, layout: str) -> tuple[list[int], list[int]]:
    """Return the dimensions of a parameter that are rows and those that are columns."""
    if layout == "flatten" or (layout == "auto" and ndim > 3):
        return [0], list(range(1, ndim))
    rows, cols = ndim - 2, ndim - 1
    return ([cols], [rows]) if layout == "transposed" else ([rows], [cols])


def rows_then_columns(x: Tensor, param: Tensor, layout: str) -> Tensor:
    """Permute the dimensions of ``x`` into the order in which `matrices_of` views ``param``.

    The batch dimensions come first, then the rows, and then the columns in the memory order of
    ``param``.
    """
    rows, cols = dims_of(param.ndim, layout)
    if len(cols) > 1:
        cols = _columns_in_memory_order(param)[1:]
    batch = [dim for dim in range(param.ndim) if dim not in (*rows, *cols)]
    return x.permute(*batch, *rows, *cols)


def check_layout(name: str, param: Tensor, *, layout: str, split: Split) -> None:
    """Refuse a layout that is unknown, or a layout or split that does not fit the parameter."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    if param.ndim < 2:
        raise ValueError(
            f"matrix norms update matrices; {name!r} has shape {tuple(param.shape)}. Give it to "
            "another algorithm, such as 'adamw'"
        )
    try:
        probe = torch.empty_strided(
            param.shape, param.stride(), dtype=param.dtype, device="meta"
        )  # a plain tensor, even if ``param`` is a DTensor
        matrices_of(probe, probe, layout=layout, split=split)
    except ValueError as error:
        raise ValueError(f"{name!r} of shape {tuple(param.shape)}: {error}") from None
    except RuntimeError as error:
        raise ValueError(
            f"layout {layout!r} cannot view {name!r} with strides {param.stride()} as a matrix; "
            "make the parameter contiguous"
        ) from error


def _columns_in_memory_order(param: Tensor) -> list[int]:
    # A norm does not depend on the order of columns. Use the memory order: a channels-last
    # convolution has no other flat view.
    return [0, *sorted(range(1, param.ndim), key=param.stride, reverse=True)]


def sizes_of(rows: int, split: Split) -> list[int]:
    """Return the number of rows of each matrix into which ``split`` cuts ``rows``."""
    if isinstance(split, int):
        if split < 1 or rows % split:
            raise ValueError(f"split={split} does not divide {rows} rows into equal parts")
        return [rows // split] * split
    if min(split) < 1:
        raise ValueError(f"split={tuple(split)} has a part below 1; each needs at least one row")
    if sum(split) != rows:
        raise ValueError(f"split={tuple(split)} adds up to {sum(split)}, not to {rows} rows")
    return list(split)


def columns_to_memory(x: Tensor, param: Tensor, layout: str) -> Tensor:
    """Reorder columns ``(..., n)`` from the order of the dimensions to the memory order."""
    order = _column_order(param, layout)
    if order == sorted(order):
        return x
    sizes = [param.shape[dim] for dim in sorted(order)]
    return _permuted(x, sizes, [dim - 1 for dim in order])


def columns_from_memory(x: Tensor, param: Tensor, layout: str) -> Tensor:
    """Reorder columns ``(..., n)`` from the memory order to the order of the dimensions."""
    order = _column_order(param, layout)
    if order == sorted(order):
        return x
    places = sorted(range(len(order)), key=order.__getitem__)
    return _permuted(x, [param.shape[dim] for dim in order], places)


def _column_order(param: Tensor, layout: str) -> list[int]:
    _, cols = dims_of(param.ndim, layout)
    return _columns_in_memory_order(param)[1:] if len(cols) > 1 else cols


def _permuted(x: Tensor, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    batch = x.ndim - 1
    dims = [*range(batch), *(batch + dim for dim in order)]
    return x.view(*x.shape[:-1], *sizes).permute(dims).flatten(batch)


def are_dense(x: Tensor) -> bool:
    """Whether the entries of ``x`` fill a contiguous range of memory, each once, in any order."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def overlaps(x: Tensor) -> bool:
    """Whether entries of ``x`` may share memory, as after ``expand``."""
    reach = 0  # the largest distance of two entries along the dimensions so far
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def dense_strides(x: Tensor) -> tuple[int, ...]:
    """Return strides without gaps in the memory order of ``x``; those of ``x`` if it is dense."""
    if are_dense(x):
        return x.stride()
    strides, expected = [0] * x.dim(), 1
    for dim in sorted(range(x.dim()), key=lambda dim: (x.stride(dim), x.shape[dim])):
        strides[dim] = expected
        expected *= max(1, x.shape[dim])
    return tuple(strides)


def same_memory_order(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape have the same memory order, with the same gaps."""
    return x.stride() == y.stride() or all(
        size < 2 or one == other
        for size, one, other in zip(x.shape, x.stride(), y.stride(), strict=True)
    )
