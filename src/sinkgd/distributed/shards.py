"""The matrices of parameters, whole or sharded: what this rank has, and which ranks have the rest.

A mesh dimension that shards the rows cuts every column, so column sums are added up over its
process group. Likewise, row sums are added up over the process group of a mesh dimension that
shards the columns. A sum over a process group does not depend on which rows each of its ranks has,
nor on mesh dimensions that replicate or that shard a batch dimension.

``split`` cuts the rows of a parameter into matrices; the cuts do not depend on where its shards
end. A rank that has no row of a matrix has an empty shard of it, so that all ranks list the same
matrices.

torch.distributed takes long to import, so it is not imported for plain tensors.
"""

from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sinkgd.matrix_views import Split, dims_of, matrices_of, sizes_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


class NamedGradient(Protocol):
    """A parameter with its name and its gradient."""

    @property
    def name(self) -> str:
        """The name of the parameter in error messages."""
        ...

    @property
    def param(self) -> Tensor:
        """The parameter."""
        ...

    @property
    def grad(self) -> Tensor:
        """Its gradient."""
        ...


class Sharding(NamedTuple):
    """How a matrix, or a batch of matrices, is sharded over ranks."""

    rows: int  # of the whole matrix
    cols: int
    groups_over_cols: "tuple[ProcessGroup, ...]"  # their ranks hold other columns of the same rows
    groups_over_rows: "tuple[ProcessGroup, ...]"  # their ranks hold other rows of the same columns
    batch_groups: "tuple[ProcessGroup, ...]"  # their ranks hold other matrices of the batch

    @property
    def sum_groups(self) -> "tuple[tuple[ProcessGroup, ...], tuple[ProcessGroup, ...]]":
        """The groups of row sums and of column sums. Matrices with equal ones iterate together."""
        return self.groups_over_cols, self.groups_over_rows

    @property
    def mT(self) -> "Sharding":  # noqa: N802 - named like `Tensor.mT`
        """The sharding of the transpose."""
        return Sharding(
            self.cols, self.rows, self.groups_over_rows, self.groups_over_cols, self.batch_groups
        )


class ParamMatrix(NamedTuple):
    """A matrix, or a batch of matrices, of a parameter: this rank's shard of it."""

    param: Tensor  # (..., m, n), a view
    grad: Tensor
    first_entry: int  # where its bits of stochastic rounding begin; see `first_entry_of`
    sharding: Sharding | None = None  # None for a plain tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the whole matrix."""
        if self.sharding is not None:
            return self.sharding.rows, self.sharding.cols
        return self.param.shape[-2], self.param.shape[-1]

    @property
    def mT(self) -> "ParamMatrix":  # noqa: N802 - named like `Tensor.mT`
        """The matrix with rows and columns exchanged."""
        sharding = None if self.sharding is None else self.sharding.mT
        return ParamMatrix(self.param.mT, self.grad.mT, self.first_entry, sharding)


class ParamMatrices(NamedTuple):
    """The matrices of some parameters, in order."""

    matrices: list[ParamMatrix]
    ranges: list[range]  # for each parameter, the indices of its matrices


def param_matrices(slots: Sequence[NamedGradient], *, layout: str, split: Split) -> ParamMatrices:
    """List the matrices of parameters. Either all parameters are DTensors, or none is.

    Gradients have the placements of their parameters, as `placed_as` returns them.
    """
    matrices: list[ParamMatrix] = []
    ranges: list[range] = []
    for slot in slots:
        first = len(matrices)
        if is_dtensor(slot.param):
            matrices += _matrices_of_shard(slot, slot.param, layout=layout, split=split)
        elif layout == "auto" and split == 1 and slot.param.ndim < 4:  # a matrix as it is
            matrices.append(ParamMatrix(slot.param, slot.grad, 0))
        else:
            entries = 0
            for param, grad in matrices_of(slot.param, slot.grad, layout=layout, split=split):
                matrices.append(ParamMatrix(param, grad, entries))
                entries += param.numel()
        ranges.append(range(first, len(matrices)))
    return ParamMatrices(matrices, ranges)


def is_dtensor(x: Tensor) -> "TypeGuard[DTensor]":
    """Whether ``x`` is a DTensor; does not import torch.distributed."""
    return hasattr(x, "device_mesh")


def is_sharded(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor that is sharded along a mesh dimension."""
    return is_dtensor(x) and any(hasattr(placement, "dim") for placement in x.placements)


def local(x: Tensor) -> Tensor:
    """Return this rank's shard of ``x``, or ``x`` itself if it is not a DTensor."""
    return x.to_local() if is_dtensor(x) else x


def placed_as(param: Tensor, grad: Tensor, name: str) -> Tensor:
    """Return a gradient with the placements of its parameter, redistributed if they differ.

    They differ if a replicated bias is added to a sharded activation, for example. To redistribute
    is a collective call.

    Raises:
        TypeError: If only one of the two is a DTensor, or if their meshes differ; the message names
            the parameter.
    """
    if is_dtensor(param) != is_dtensor(grad):
        kinds = [type(x.data).__name__ for x in (param, grad)]
        raise TypeError(
            f"{name!r} is a {kinds[0]}, but its gradient is a {kinds[1]}; both must be DTensors, "
            "or none"
        )
    if not (is_dtensor(param) and is_dtensor(grad)):
        return grad
    if grad.device_mesh != param.device_mesh:
        raise TypeError(
            f"{name!r} is on {param.device_mesh}, but its gradient is on {grad.device_mesh}; "
            "both must be on one mesh"
        )
    if grad.placements == param.placements:
        return grad
    return grad.redistribute(param.device_mesh, param.placements)


def has_values(x: Tensor) -> bool:
    """Whether ``x`` has values or, while a step is compiled, will have them in the compiled step.

    Meta and fake tensors have none.
    """
    here = local(x)
    return torch.compiler.is_compiling() or not (here.is_meta or isinstance(here, FakeTensor))


def all_have_values(xs: Iterable[Tensor]) -> bool:
    """Whether `has_values` is True for every tensor; fast if most of them are plain."""
    if torch.compiler.is_compiling():
        return True
    return all(has_values(x) for x in xs if type(x) is not Tensor or x.is_meta)


def largest_shard_size(x: Tensor) -> int:
    """Return the number of entries of the largest shard of ``x``: the same on all ranks."""
    return prod(largest_shard_shape(x))


def largest_shard_shape(x: Tensor) -> list[int]:
    """Return the shape of the largest shard of ``x``: the same on all ranks."""
    sizes = list(x.shape)
    if is_dtensor(x):
        for placement, ranks in zip(x.placements, x.device_mesh.shape, strict=True):
            if (dim := getattr(placement, "dim", None)) is not None:
                sizes[dim] = -(-sizes[dim] // ranks)
    return sizes


def shard_groups(x: Tensor) -> "tuple[ProcessGroup, ...]":
    """Return the process groups whose ranks hold other shards of ``x``; none for a plain tensor."""
    return _groups_of(x, list(sharded_dims(x))) if is_dtensor(x) else ()


def sharding_of(x: "DTensor", row_dims: Collection[int], col_dims: Collection[int]) -> Sharding:
    """Return how ``x`` is sharded, seen as matrices.

    Args:
        x: A tensor of matrices.
        row_dims: Its dimensions that are rows, counted from 0.
        col_dims: Its dimensions that are columns. The others are batch dimensions.
    """
    dims, of_matrix = sharded_dims(x), {*row_dims, *col_dims}
    return Sharding(
        rows=prod(x.shape[dim] for dim in row_dims),
        cols=prod(x.shape[dim] for dim in col_dims),
        groups_over_cols=_groups_of(x, [i for i, dim in dims.items() if dim in col_dims]),
        groups_over_rows=_groups_of(x, [i for i, dim in dims.items() if dim in row_dims]),
        batch_groups=_groups_of(x, [i for i, dim in dims.items() if dim not in of_matrix]),
    )


def sharded_dims(x: "DTensor") -> dict[int, int]:
    """Return a dict from each mesh dimension that shards ``x`` to the dimension that it shards.

    Raises:
        ValueError: If ``x`` has a Partial placement, a reduction that is still pending.
    """
    dims: dict[int, int] = {}
    for mesh_dim, placement in enumerate(x.placements):
        if placement.is_partial():
            raise ValueError(
                f"placements {x.placements} include Partial, a reduction that is still pending; "
                "redistribute the tensor to Shard or Replicate first, as FSDP2 does"
            )
        if (dim := getattr(placement, "dim", None)) is not None:  # Shard, and FSDP2's strided one
            dims[mesh_dim] = dim % x.ndim
    return dims


def check_shards(name: str, param: Tensor, *, layout: str, split: Split) -> None:
    """Refuse a DTensor whose shard on this rank cannot be viewed as matrices.

    Raises:
        ValueError: If ``param`` has a Partial placement, or ``split`` cannot cut its rows; the
            message gives the parameter's name.
    """
    if not is_dtensor(param):
        return
    row_dims, col_dims = dims_of(param.ndim, layout)
    try:
        sharding = sharding_of(param, row_dims, col_dims)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
    if len(sizes_of(sharding.rows, split)) > 1 and _first_row(param, row_dims) is None:
        raise ValueError(
            f"split={split!r} cannot cut the rows of {name!r}, which several mesh "
            f"dimensions shard ({param.placements}); make its parts separate parameters"
        )


def check_unsharded(name: str, param: Tensor, what_needs: str) -> None:
    """Refuse a sharded parameter.

    Args:
        name: The name of the parameter.
        param: The parameter.
        what_needs: Subject and verb of the message, such as "these norms need".

    Raises:
        TypeError: If a mesh dimension shards ``param``.
    """
    if is_dtensor(param) and is_sharded(param):
        raise TypeError(
            f"{name!r} is sharded ({param.placements}), and {what_needs} whole matrices; "
            "use algorithm='sinkgd', or Replicate it"
        )


def first_entry_of(param: Tensor, layout: str) -> int:
    """Return the index that stochastic rounding gives to the first entry of this rank's shard.

    The random bits of an entry depend on its index; see `sinkgd.kernels.rounding`.
    """
    if not is_dtensor(param) or param.ndim == 0:
        return 0
    # The entries of a vector are rows of one entry.
    row_dims, col_dims = dims_of(param.ndim, layout) if param.ndim > 1 else ([0], [])
    sharding = sharding_of(param, row_dims, col_dims)
    return _first_entry(param, row_dims, sharding, _first_row(param, row_dims))


def from_local(param: Tensor, shard: Tensor) -> Tensor:
    """Return a tensor that is sharded like ``param`` and whose shard on this rank is ``shard``."""
    if not is_dtensor(param):
        return shard
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - see the top of this file

    return DTensor.from_local(
        shard,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def shard_except(param: Tensor, whole_dims: Collection[int], numbers: Tensor) -> Tensor:
    """Shard ``numbers`` like ``param``, except along the dimensions ``whole_dims``.

    Args:
        param: A tensor of as many dimensions as ``numbers``.
        whole_dims: The dimensions that stay whole: the row dimensions of ``param`` if there is a
            number for each column, its column dimensions if there is a number for each row.
        numbers: All numbers, the same on all ranks.
    """
    if not is_dtensor(param):
        return numbers
    from torch.distributed.tensor import (  # noqa: PLC0415 - see the top of this file
        DTensor,
        Replicate,
        Shard,
    )

    mesh, placements = param.device_mesh, list(param.placements)
    dims = sharded_dims(param)
    # FSDP2's strided shards are cut from the shards of later mesh dimensions.
    order = sorted(dims, key=lambda i: (0, i) if isinstance(placements[i], Shard) else (1, -i))
    shard = numbers
    for i in order:
        if dims[i] in whole_dims:
            placements[i] = Replicate()
            continue
        size = shard.shape[dims[i]]
        length = -(-size // mesh.size(i))  # as `torch.chunk` cuts
        begin = min(size, mesh.get_local_rank(i) * length)
        shard = shard.narrow(dims[i], begin, min(size - begin, length))
    return DTensor.from_local(
        shard.clone(memory_format=torch.contiguous_format),  # frees what other ranks keep
        mesh,
        placements,
        run_check=False,
        shape=numbers.shape,
        stride=numbers.stride(),
    )


def _matrices_of_shard(
    slot: NamedGradient, param: "DTensor", *, layout: str, split: Split
) -> list[ParamMatrix]:
    """View this rank's shard of a parameter as matrices."""
    row_dims, col_dims = dims_of(param.ndim, layout)
    sharding = sharding_of(param, row_dims, col_dims)
    ((own, own_grad),) = matrices_of(local(param), local(slot.grad), layout=layout, split=1)
    sizes = sizes_of(sharding.rows, split)
    begin = _first_row(param, row_dims)
    if len(sizes) == 1:
        first_entry = _first_entry(param, row_dims, sharding, begin)
        return [ParamMatrix(own, own_grad, first_entry, sharding)]
    assert begin is not None, "check_shards has refused it"
    return _split_rows(own, own_grad, sharding, begin, sizes)


def _split_rows(
    param: Tensor, grad: Tensor, sharding: Sharding, begin: int, sizes: Sequence[int]
) -> list[ParamMatrix]:
    """Cut this rank's rows, the first of which has index ``begin``, into matrices.

    ``sizes`` are the numbers of rows of the whole matrices.
    """
    end = begin + param.shape[-2]
    edges = [min(max(edge, begin), end) - begin for edge in accumulate(sizes, initial=0)]
    lengths = [high - low for low, high in pairwise(edges)]
    params, grads = torch.split(param, lengths, -2), torch.split(grad, lengths, -2)
    return [
        ParamMatrix(w, g, (begin + low) * sharding.cols, sharding._replace(rows=size))
        for w, g, low, size in zip(params, grads, edges, sizes, strict=False)
    ]


def _first_row(x: "DTensor", row_dims: Sequence[int]) -> int | None:
    """Return the index of this rank's first row; None if its rows are not consecutive."""
    mesh_dims = [i for i, dim in sharded_dims(x).items() if dim in row_dims]
    if not mesh_dims:
        return 0
    (mesh_dim, *others) = mesh_dims
    if others or not x.placements[mesh_dim].is_shard():  # false for FSDP2's strided shards
        return None
    return _begin(x, mesh_dim, sharded_dims(x)[mesh_dim])


def _begin(x: "DTensor", mesh_dim: int, dim: int) -> int:
    """Return where this rank's part of a dimension begins, as `torch.chunk` cuts it."""
    size, ranks = x.shape[dim], x.device_mesh.size(mesh_dim)
    return min(size, x.device_mesh.get_local_rank(mesh_dim) * -(-size // ranks))


def _first_entry(
    x: "DTensor", row_dims: Sequence[int], sharding: Sharding, begin: int | None
) -> int:
    """Return the index that stochastic rounding gives to the first entry of this rank's shard.

    If the shard is a contiguous range of the parameter's entries, its random bits are those that
    the unsharded parameter would get. Otherwise the bits of two shards only have to differ.
    """
    dims = sharded_dims(x)
    is_matrix = sharding.rows * sharding.cols == x.numel()
    if is_matrix and begin is not None and set(dims.values()) <= {*row_dims}:
        return begin * sharding.cols
    if not is_matrix and list(dims.values()) == [0]:  # a batch, such as experts
        (mesh_dim,) = dims
        return _begin(x, mesh_dim, 0) * (x.numel() // x.shape[0])
    number = 0
    for mesh_dim in dims:
        number = number * x.device_mesh.size(mesh_dim) + x.device_mesh.get_local_rank(mesh_dim)
    return number * x.numel()


def _groups_of(x: "DTensor", mesh_dims: list[int]) -> "tuple[ProcessGroup, ...]":
    """Return the process groups of mesh dimensions; those whose ranks are nearest come first."""
    mesh = x.device_mesh
    return tuple(mesh.get_group(i) for i in sorted(mesh_dims, reverse=True) if mesh.size(i) > 1)
