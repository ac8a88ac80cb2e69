"""The weights of a model, and the pieces of them that the first rank of a mesh holds.

Letters, everywhere in this file:
    m: rows of a matrix, its out-features
    n: columns, its in-features
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import sinkgd
from sinkgd.lab.plan.architecture import Architecture
from sinkgd.lab.plan.rank_model import rank_model
from sinkgd.lab.train.config import ConfigError, MeshConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A parameter, and how it lies on the mesh."""

    name: str
    shape: Shape  # whole, (m, n) or (m,)
    divided: Shape  # the first rank's part of a tensor-parallel group
    piece: Shape  # what that rank keeps of it under FSDP, which divides rows
    is_matrix: bool  # inside a block, for a matrix algorithm; the rest is AdamW's
    block: int | None  # which block it lies in, if any: the unit that FSDP gathers

    @property
    def count(self) -> int:
        """Entries of the whole."""
        return prod(self.shape)

    @property
    def is_table(self) -> bool:
        """Whether it is an embedding or an output head."""
        return len(self.shape) == 2 and not self.is_matrix

    @property
    def is_head(self) -> bool:
        """Whether it is an output head, and no embedding at once."""
        return self.name == "lm_head.weight"


@dataclass(frozen=True)
class Grid:
    """The sizes of the mesh's dimensions."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @classmethod
    def of(cls, mesh: MeshConfig) -> "Grid":
        """Return the sizes that a configuration gives; dp_shard is 1 where it is left open.

        Raises:
            ConfigError: If one is below 1.
        """
        grid = cls(mesh.dp_replicate, 1 if mesh.dp_shard is None else mesh.dp_shard, mesh.tp)
        for name, size in vars(grid).items():
            if size < 1:
                raise ConfigError(f"mesh.{name} is {size}; it must be at least 1")
        return grid

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.dp_replicate * self.dp_shard * self.tp

    @property
    def batches(self) -> int:
        """Parts of the global batch: the ranks of a tensor-parallel group share one."""
        return self.dp_replicate * self.dp_shard

    def span(self, group: str) -> int:
        """Return over how many neighboring ranks a process group reaches; tp's are nearest."""
        sizes = {"tp": self.tp, "dp_shard": self.tp * self.dp_shard, "dp_replicate": self.ranks}
        return sizes[group]


@lru_cache(maxsize=64)
def weights_of(architecture: Architecture, grid: Grid = Grid()) -> tuple[Weight, ...]:
    """List the weights of a model, from the module itself on the meta device; tied ones once.

    Examples:
        >>> from sinkgd.lab.plan.architecture import find_architecture
        >>> weights = weights_of(find_architecture("llama-60m"))
        >>> sum(w.count for w in weights), sum(w.count for w in weights if w.is_matrix)
        (58073600, 25296896)
    """
    tokens = grid.tp  # shapes of weights do not depend on the length of sequences
    whole = rank_model(architecture, tokens=tokens)
    part = rank_model(architecture, tokens=tokens, tp=grid.tp)
    matrices = {
        name
        for group in sinkgd.param_groups(whole)
        if group["algorithm"] == "sinkgd"
        for name, _ in group["params"]
    }
    pairs = zip(whole.named_parameters(), part.named_parameters(), strict=True)
    return tuple(
        Weight(
            name=name,
            shape=tuple(weight.shape),
            divided=tuple(own.shape),
            piece=(-(-own.shape[0] // grid.dp_shard), *own.shape[1:]),
            is_matrix=name in matrices,
            block=int(name.split(".")[2]) if name.startswith("model.layers.") else None,
        )
        for (name, weight), (_, own) in pairs
    )


def largest_block(weights: Sequence[Weight]) -> int:
    """Return the entries of the largest block, as a tensor-parallel rank holds them."""
    sizes: dict[int, int] = {}
    for weight in weights:
        if weight.block is not None:
            sizes[weight.block] = sizes.get(weight.block, 0) + prod(weight.divided)
    return max(sizes.values())


def outside_blocks(weights: Sequence[Weight]) -> int:
    """Return the entries of embedding, head and last norm, as a tensor-parallel rank holds them."""
    return sum(prod(weight.divided) for weight in weights if weight.block is None)
