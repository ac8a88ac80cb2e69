"""How a tensor of matrices lies on a mesh: which piece this rank holds, and who holds the others.

A mesh dimension that shards the rows leaves every column in pieces: column sums must be added up
over its process group. One that shards the columns does the same to row sums. Which rows a rank
holds does not matter to a sum, nor do mesh dimensions that replicate, or shard a batch dimension.
"""

from collections.abc import Collection
from math import prod
from typing import NamedTuple

from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial


class Place(NamedTuple):
    """Of a matrix, or a batch of them, whose pieces lie on several ranks."""

    rows: int  # of the whole matrix
    cols: int
    row_groups: tuple[ProcessGroup, ...]  # over which row sums are added up
    col_groups: tuple[ProcessGroup, ...]
    batch_groups: tuple[ProcessGroup, ...]  # whose ranks hold other matrices of the batch

    @property
    def kind(self) -> tuple[tuple[ProcessGroup, ...], tuple[ProcessGroup, ...]]:
        """What matrices must have in common to be one computation."""
        return self.row_groups, self.col_groups

    def turned(self) -> "Place":
        """Return the place of the transpose."""
        return Place(self.cols, self.rows, self.col_groups, self.row_groups, self.batch_groups)


def place_of(x: DTensor, row_dims: Collection[int], col_dims: Collection[int]) -> Place:
    """Return how ``x`` lies, seen as matrices.

    Args:
        x: A tensor of matrices.
        row_dims: Its dimensions that are rows, counted from 0.
        col_dims: Those that are columns. The rest are a batch.
    """
    dims, of_matrix = sharded_dims(x), {*row_dims, *col_dims}
    return Place(
        rows=prod(x.shape[dim] for dim in row_dims),
        cols=prod(x.shape[dim] for dim in col_dims),
        row_groups=_groups_of(x, [i for i, dim in dims.items() if dim in col_dims]),
        col_groups=_groups_of(x, [i for i, dim in dims.items() if dim in row_dims]),
        batch_groups=_groups_of(x, [i for i, dim in dims.items() if dim not in of_matrix]),
    )


def sharded_dims(x: DTensor) -> dict[int, int]:
    """Return which dimension of the tensor each mesh dimension shards, by the mesh dimension.

    Raises:
        ValueError: If ``x`` is a sum that is not added up yet.
    """
    dims: dict[int, int] = {}
    for mesh_dim, placement in enumerate(x.placements):
        if isinstance(placement, Partial):
            raise ValueError(
                f"placements {x.placements} hold a sum that is not added up yet; "
                "redistribute it to Shard or Replicate first, as FSDP2 does"
            )
        if (dim := getattr(placement, "dim", None)) is not None:  # Shard, and FSDP2's strided one
            dims[mesh_dim] = dim % x.ndim
    return dims


def groups_of(x: DTensor) -> tuple[ProcessGroup, ...]:
    """Return the process groups whose ranks hold other pieces of ``x``."""
    return _groups_of(x, list(sharded_dims(x)))


def _groups_of(x: DTensor, mesh_dims: list[int]) -> tuple[ProcessGroup, ...]:
    """Return the process groups of mesh dimensions, those along which ranks are nearest first."""
    mesh = x.device_mesh
    return tuple(mesh.get_group(i) for i in sorted(mesh_dims, reverse=True) if mesh.size(i) > 1)
