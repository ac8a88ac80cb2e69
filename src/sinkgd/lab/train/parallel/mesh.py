"""The ranks as a grid: dp_replicate × dp_shard × tp, and this rank's place in it."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sinkgd.lab.train.config import ConfigError, MeshConfig
from sinkgd.lab.train.parallel.world import World

DIMENSIONS = ("dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True)
class Mesh:
    """Where a run computes: a device, alone or among others."""

    device: torch.device  # of this rank
    world: World
    grid: DeviceMesh | None = None  # of `DIMENSIONS`; None where the process is alone

    @property
    def parts(self) -> int:
        """Into how many parts a batch is divided."""
        return 1 if self.grid is None else self.grid.size(0) * self.grid.size(1)

    @property
    def part(self) -> int:
        """Which of them is this rank's; the ranks of one tp group share one."""
        if self.grid is None:
            return 0
        replica, shard, _ = self._place
        return replica * self.grid.size(1) + shard

    @property
    def data(self) -> DeviceMesh:
        """The ranks over which weights and batch are divided, with their replicas if any."""
        assert self.grid is not None, "the process is alone"
        return (
            self.grid["dp_replicate", "dp_shard"]
            if self.grid.size(0) > 1
            else self.grid["dp_shard"]
        )

    @property
    def shape(self) -> dict[str, int]:
        """The size of each dimension, by its name."""
        sizes = (1, 1, 1) if self.grid is None else self.grid.shape
        return dict(zip(DIMENSIONS, sizes, strict=True))

    def total(self, *numbers: float) -> list[float]:
        """Return sums over the parts of the batch; a collective call."""
        counts = self.grid is None or self._place[2] == 0  # one rank of a tp group
        return self.world.total(*(number if counts else 0.0 for number in numbers))

    @property
    def _place(self) -> tuple[int, int, int]:
        assert self.grid is not None, "the process is alone"
        place: Any = self.grid.get_coordinate()
        return tuple(place)


def form_mesh(config: MeshConfig, world: World, device: torch.device) -> Mesh:
    """Arrange the ranks as configured; a collective call.

    Raises:
        ConfigError: If the dimensions do not multiply to the number of ranks.
    """
    shape = mesh_shape(config, world.size)
    if world.size == 1:
        return Mesh(device, world)
    return Mesh(device, world, init_device_mesh(device.type, shape, mesh_dim_names=DIMENSIONS))


def mesh_shape(config: MeshConfig, ranks: int) -> tuple[int, int, int]:
    """Return the sizes of `DIMENSIONS`.

    Raises:
        ConfigError: If they do not multiply to ``ranks``.

    Examples:
        >>> mesh_shape(MeshConfig(dp_replicate=2, tp=2), ranks=8)
        (2, 2, 2)
    """
    fixed = config.dp_replicate * config.tp
    shard = max(1, ranks // fixed) if config.dp_shard is None else config.dp_shard
    shape = (config.dp_replicate, shard, config.tp)
    if prod(shape) != ranks:
        asked = " × ".join(f"{name} {size}" for name, size in zip(DIMENSIONS, shape, strict=True))
        raise ConfigError(
            f"mesh is {asked} = {prod(shape)} ranks, but {ranks} "
            f"{'is' if ranks == 1 else 'are'} here; change one of them, or start the run with "
            f"`torchrun --nproc-per-node {prod(shape)} -m sinkgd.lab train ...`"
        )
    return shape
