"""The ranks as a grid, dp_replicate × dp_shard × tp, and a model sharded over it.

Tensor parallelism is applied first, and FSDP2 then shards each rank's part. FSDP2 works for any
model; tensor parallelism works for a LLaMA only. Between blocks, each rank of a tp group holds the
hidden states of t/tp of the tokens, so that the ranks share the work of norms and residual
additions, too (Korthikanti et al., https://arxiv.org/abs/2205.05198).

Shapes:
    b: sequences in the batch
    t: tokens in a sequence
    h: hidden size
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from sinkgd.lab.models import LanguageModel, Llama
from sinkgd.lab.train.config import ConfigError, MeshConfig
from sinkgd.lab.train.world import World

DIMENSIONS = ("dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True)
class Mesh:
    """Where a run computes: on one device, or on many ranks."""

    device: torch.device  # the device of this rank
    world: World
    grid: DeviceMesh | None = None  # the ranks, with `DIMENSIONS`; None for a single process

    @property
    def parts(self) -> int:
        """Number of parts that a batch is divided into."""
        return 1 if self.grid is None else self.grid.size(0) * self.grid.size(1)

    @property
    def part(self) -> int:
        """Index of this rank's part; the ranks of one tp group share a part."""
        if self.grid is None:
            return 0
        replica, shard, _ = self._coordinate
        return replica * self.grid.size(1) + shard

    @property
    def data(self) -> DeviceMesh:
        """The data-parallel ranks.

        The batch is divided over all of them, the weights only over the ranks of each replica.
        """
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
        """Return the sum of each number over the parts of the batch; a collective call."""
        counts = self.grid is None or self._coordinate[2] == 0  # one rank of each tp group counts
        return self.world.total(*(number if counts else 0.0 for number in numbers))

    @property
    def _coordinate(self) -> tuple[int, int, int]:
        assert self.grid is not None, "the process is alone"
        coordinate: Any = self.grid.get_coordinate()
        return tuple(coordinate)


def form_mesh(config: MeshConfig, world: World, device: torch.device) -> Mesh:
    """Arrange the ranks as configured. This is a collective call.

    Raises:
        ConfigError: If the product of the dimensions is not the number of ranks.
    """
    shape = mesh_shape(config, world.size)
    if world.size == 1:
        return Mesh(device, world)
    return Mesh(device, world, init_device_mesh(device.type, shape, mesh_dim_names=DIMENSIONS))


def mesh_shape(config: MeshConfig, ranks: int) -> tuple[int, int, int]:
    """Return the sizes of `DIMENSIONS`.

    Raises:
        ConfigError: If the product of the sizes is not ``ranks``.

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
            f"{'is' if ranks == 1 else 'are'} running; change a mesh dimension, or start the run "
            f"with `torchrun --nproc-per-node {prod(shape)} -m sinkgd.lab train ...`"
        )
    return shape


_TOKENS = Shard(1)  # shards the tokens t of a tensor (b, t, h)


def shard_model(model: LanguageModel, mesh: Mesh, *, sequence_length: int) -> None:
    """Shard a model over the ranks, in place; a single process keeps it whole.

    Args:
        model: The model on the meta device; its weights are initialized after sharding.
        mesh: The ranks.
        sequence_length: Tokens of every sequence that the model gets.

    Raises:
        ConfigError: If tp does not divide heads or tokens, or does not support the model.
    """
    if mesh.grid is None:
        return
    if mesh.grid["tp"].size() > 1:
        if not isinstance(model, Llama):
            raise ConfigError(
                f"mesh.tp is {mesh.grid['tp'].size()}, but only a LLaMA can be divided by tp, and "
                f"the model is a {type(model).__name__}; use mesh.tp 1 and mesh.dp_shard"
            )
        _check_divisible(model, mesh.grid["tp"].size(), sequence_length)
        _shard_matrices(model, mesh.grid["tp"])
    for layer in model.blocks:
        fully_shard(layer, mesh=mesh.data)
    fully_shard(model, mesh=mesh.data)


def _check_divisible(model: Llama, ranks: int, sequence_length: int) -> None:
    config = model.config
    for what, size in (
        ("attention heads", config.num_heads),
        ("key-value heads", config.key_value_heads),
        ("tokens of a sequence", sequence_length),
    ):
        if size % ranks:
            raise ConfigError(
                f"mesh.tp is {ranks}, which does not divide the {size} {what}; set mesh.tp to a "
                f"divisor of {size}"
            )


def _shard_matrices(model: Llama, ranks: DeviceMesh) -> None:
    parallelize_module(
        model,
        ranks,
        {
            "model": PrepareModuleOutput(
                output_layouts=_TOKENS, desired_output_layouts=Replicate()
            ),
            "model.embed_tokens": RowwiseParallel(
                input_layouts=Replicate(), output_layouts=_TOKENS
            ),
            "model.norm": SequenceParallel(),
            "lm_head": ColwiseParallel(output_layouts=Replicate()),
        },
    )
    model.tie()  # a weight that embedding and head shared has become two, of the same layout
    for layer in model.model.layers:
        parallelize_module(layer, ranks, _block())


def _block() -> dict[str, ParallelStyle]:
    """Return how to shard each module of a block.

    Matrices that read the hidden states are divided by output features (`ColwiseParallel`), those
    that write them by input features (`RowwiseParallel`).
    """
    # If the number of ranks does not divide a width, such as 5461, only a DTensor keeps the width.
    inner = ColwiseParallel(use_local_output=False)
    return {
        "input_layernorm": SequenceParallel(),
        "self_attn": _gather_tokens(2),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=_TOKENS),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": _gather_tokens(1),
        "mlp.gate_proj": inner,
        "mlp.up_proj": inner,
        "mlp.down_proj": RowwiseParallel(output_layouts=_TOKENS),
    }


def _gather_tokens(inputs: int) -> PrepareModuleInput:
    """Gather all tokens for a module; only its first input is sharded over tokens."""
    others = (None,) * (inputs - 1)
    return PrepareModuleInput(
        input_layouts=(_TOKENS, *others), desired_input_layouts=(Replicate(), *others)
    )
