"""Vectors with one number for each column, or each row, of a matrix, which transforms keep.

A tensor of column vectors has the parameter's shape, but its row dimension has k entries for each
matrix of the parameter. It is sharded like the parameter, except along the row dimension, which is
whole on every rank. A tensor of row vectors has the parameter's shape, but the first of its column
dimensions has k entries, and the others one. It is sharded like the parameter's rows.

Letters, everywhere in this file:
    m, n: rows and columns of a matrix; ...: leading batch dimensions
    k: the number of vectors of each matrix
    Ω: the fixed block, as `sinkgd.optim.transforms.deflate.fixed_blocks` returns it
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkgd.distributed.shards import local, shard_except
from sinkgd.matrix_views import dims_of, rows_then_columns
from sinkgd.newton_schulz import or_one


def shape_of_vectors(param: Tensor, layout: str, vectors: int) -> list[int]:
    """Return the shape of the tensor of all matrices' vectors, ``vectors`` of them in total."""
    (row_dim,), _ = dims_of(param.ndim, layout)
    return [vectors if dim == row_dim else size for dim, size in enumerate(param.shape)]


def read_vectors(vectors: Tensor, param: Tensor, layout: str, count: int) -> list[Tensor]:
    """Return the vectors of each of the ``count`` matrices of a parameter: ``(..., k, n)``.

    The columns are this rank's, in the order in which `ParamMatrix` has them.
    """
    view = rows_then_columns(local(vectors), local(param), layout)
    _, cols = dims_of(param.ndim, layout)
    return list(torch.chunk(view.flatten(param.ndim - len(cols)), count, dim=-2))


def write_vectors_(
    vectors: Tensor, param: Tensor, layout: str, found: Sequence[Tensor], allowed: Tensor | None
) -> None:
    """Replace the vectors of each matrix by those of ``found``, unless ``allowed`` is False.

    Args:
        vectors: The vectors of a parameter, changed in place.
        param: The parameter.
        layout: Its layout.
        found: ``(..., k, n)`` for each matrix, as `read_vectors` returns them.
        allowed: 0-dim bool; None for True.
    """
    view = rows_then_columns(local(vectors), local(param), layout)
    new = torch.cat(list(found), dim=-2).view(view.shape)
    view.copy_(new if allowed is None else torch.where(allowed, new, view))


def zero_column_vectors(param: Tensor, layout: str, vectors: int, dtype: torch.dtype) -> Tensor:
    """Return column vectors of zeros, ``vectors`` for all matrices of a parameter together."""
    (row_dim,), _ = dims_of(param.ndim, layout)
    shape = shape_of_vectors(param, layout, vectors)
    return shard_except(param, [row_dim], torch.zeros(shape, dtype=dtype, device=param.device))


def zero_row_vectors(param: Tensor, layout: str, vectors: int, dtype: torch.dtype) -> Tensor:
    """Return ``vectors`` row vectors of zeros for each matrix of a parameter."""
    _, cols = dims_of(param.ndim, layout)
    zeros = torch.zeros(
        shape_of_row_vectors(param, layout, vectors), dtype=dtype, device=param.device
    )
    return shard_except(param, cols, zeros)


def shape_of_row_vectors(param: Tensor, layout: str, vectors: int) -> list[int]:
    """Return the shape of the tensor of a parameter's row vectors, ``vectors`` for each matrix."""
    _, cols = dims_of(param.ndim, layout)
    places = dict.fromkeys(cols, 1) | {cols[0]: vectors}
    return [places.get(dim, size) for dim, size in enumerate(param.shape)]


def view_row_vectors(
    vectors: Tensor, param: Tensor, layout: str, rows: Sequence[int]
) -> Sequence[Tensor]:
    """View the row vectors of each matrix of a parameter: ``(..., m, k)``.

    Args:
        vectors: The vectors of a parameter.
        param: The parameter.
        layout: Its layout.
        rows: For each matrix, how many of its rows this rank holds.
    """
    view = rows_then_columns(local(vectors), local(param), layout)
    _, cols = dims_of(param.ndim, layout)
    return torch.split(view.flatten(param.ndim - len(cols)), list(rows), dim=-2)


def in_range(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert numbers of a wider dtype; those above its largest number become this number."""
    return numbers.clamp(max=torch.finfo(dtype).max).to(dtype)


def normalized_block(block: Tensor, size: Tensor, spare: Tensor) -> Tensor:
    """Divide vectors by their sizes, and replace those of size 0.

    Args:
        block: ``(..., n, k)``, where n counts only this rank's columns.
        size: Root-mean-square of each vector, over all ranks: ``(..., 1, k)``.
        spare: Ω with at least k vectors, which replace the vectors of size 0. All vectors of Ω have
            nearly the same size.
    """
    return torch.where(size == 0, spare[..., : block.shape[-1]], block / or_one(size))
