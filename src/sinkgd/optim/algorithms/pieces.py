"""A DTensor's piece on this rank, seen as matrices.

Rows are cut by ``split`` wherever they lie: a rank that holds none of a part's rows has an empty
piece of it, so that all ranks list the same parts.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from sinkgd.optim.algorithms.contract import Group, Slot
from sinkgd.optim.algorithms.layout import Split, dims_of, matrices_of, sizes_of
from sinkgd.optim.algorithms.parts import Part
from sinkgd.sharded import Place, place_of, sharded_dims


def check_pieces(name: str, param: DTensor, group: Group) -> None:
    """Refuse a parameter of which this rank's piece cannot be handled."""
    row_dims, col_dims = dims_of(param.ndim, group["layout"])
    try:
        place = place_of(param, row_dims, col_dims)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
    if group.get("warm_start") and place.row_groups:
        raise ValueError(
            f"warm_start=True keeps the scales of whole rows, and those of {name!r} are sharded "
            f"({param.placements}); leave it off for this group"
        )
    if len(sizes_of(place.rows, group["split"])) > 1 and _first_row(param, row_dims) is None:
        raise ValueError(
            f"split={group['split']!r} cannot cut the rows of {name!r}, which several mesh "
            f"dimensions shard ({param.placements}); keep its parts as parameters of their own"
        )


def pieces_of(slot: Slot, *, layout: str, split: Split) -> list[Part]:
    """View this rank's piece of a parameter as matrices.

    Raises:
        TypeError: If the gradient does not lie as the parameter does.
        ValueError: If it is a sum that is not added up yet.
    """
    param, grad = slot.param, slot.grad
    if not isinstance(param, DTensor) or not isinstance(grad, DTensor):
        raise TypeError(f"{slot.name!r} is a DTensor and its gradient is {type(grad).__name__}")
    try:
        sharded_dims(grad)
    except ValueError as error:
        raise ValueError(f"the gradient of {slot.name!r}: {error}") from None
    if grad.device_mesh != param.device_mesh or grad.placements != param.placements:
        raise TypeError(
            f"{slot.name!r} lies as {param.placements} and its gradient as {grad.placements}; "
            "redistribute the gradient"
        )
    row_dims, col_dims = dims_of(param.ndim, layout)
    place = place_of(param, row_dims, col_dims)
    ((own, slope),) = matrices_of(param.to_local(), grad.to_local(), layout=layout, split=1)
    sizes = sizes_of(place.rows, split)
    begin = _first_row(param, row_dims)
    if len(sizes) == 1:
        return [Part(own, slope, _first_entry(param, row_dims, place, begin), place)]
    assert begin is not None, "it was checked"
    return _cut(own, slope, place, begin, sizes)


def _cut(param: Tensor, grad: Tensor, place: Place, begin: int, sizes: Sequence[int]) -> list[Part]:
    """Cut rows that begin at row ``begin`` of the whole into parts of these sizes of the whole."""
    end = begin + param.shape[-2]
    edges = [min(max(edge, begin), end) - begin for edge in accumulate(sizes, initial=0)]
    lengths = [high - low for low, high in pairwise(edges)]
    params, grads = torch.split(param, lengths, -2), torch.split(grad, lengths, -2)
    return [
        Part(w, g, (begin + low) * place.cols, place._replace(rows=size))
        for w, g, low, size in zip(params, grads, edges, sizes, strict=False)
    ]


def _first_row(x: DTensor, row_dims: Sequence[int]) -> int | None:
    """Return which row of the whole is this rank's first; None where its rows lie apart."""
    mesh_dims = [i for i, dim in sharded_dims(x).items() if dim in row_dims]
    if not mesh_dims:
        return 0
    if len(mesh_dims) > 1 or not isinstance(x.placements[mesh_dims[0]], Shard):
        return None
    (mesh_dim,) = mesh_dims
    return _begin(x, mesh_dim, sharded_dims(x)[mesh_dim])


def _begin(x: DTensor, mesh_dim: int, dim: int) -> int:
    """Return where this rank's part of a dimension begins, as `torch.chunk` cuts it."""
    size, ranks = x.shape[dim], x.device_mesh.size(mesh_dim)
    return min(size, x.device_mesh.get_local_rank(mesh_dim) * -(-size // ranks))


def _first_entry(x: DTensor, row_dims: Sequence[int], place: Place, begin: int | None) -> int:
    """Return what the first entry of this rank's piece counts as, for random bits.

    Where the piece is a run of entries of the whole, bits are those of the whole. Elsewhere those
    of two pieces must differ, and that is all.
    """
    dims = sharded_dims(x)
    is_matrix = place.rows * place.cols == x.numel()
    if is_matrix and begin is not None and set(dims.values()) <= {*row_dims}:
        return begin * place.cols
    if not is_matrix and list(dims.values()) == [0]:  # a batch, such as experts
        (mesh_dim,) = dims
        return _begin(x, mesh_dim, 0) * (x.numel() // x.shape[0])
    number = 0
    for mesh_dim in dims:
        number = number * x.device_mesh.size(mesh_dim) + x.device_mesh.get_local_rank(mesh_dim)
    return number * x.numel()
