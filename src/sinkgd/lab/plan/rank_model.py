"""The weights of a model that the first rank of a mesh holds, and the module that they belong to.

The module is the lab's own `Llama` on the meta device. Modules of its blocks are replaced if tensor
parallelism divides the matrices, or if queries, keys and values have biases. Tensor parallelism
also replaces embedding and head. Functions that only change shapes take the place of collectives:
nothing is sent.

Letters:
    m, n: rows and columns of a matrix, its out- and in-features
    b: sequences in a batch
    t: tokens in a sequence; between blocks a rank holds t/tp of them
    h: hidden size
    tp: number of ranks that divide the matrices and the attention heads
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sinkgd
from sinkgd.lab.models import Llama, LlamaConfig, add_adapters
from sinkgd.lab.plan.architecture import Architecture
from sinkgd.lab.train.config import ConfigError, MeshConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A parameter, and how it is sharded on the mesh."""

    name: str
    shape: Shape  # the whole parameter's, (m, n) or (m,)
    divided: Shape  # the part of the first rank of a tensor-parallel group
    shard: Shape  # the shard of that part under FSDP, which divides rows
    is_matrix: bool  # whether `sinkgd.param_groups` gives it to SinkGD, not to AdamW
    block: int | None  # index of its block, if it is in one; FSDP gathers a block at a time
    is_trained: bool = True

    @property
    def count(self) -> int:
        """Number of entries of the whole parameter."""
        return prod(self.shape)

    @property
    def is_embedding(self) -> bool:
        """Whether it is an embedding, an output head, or any matrix of a model with adapters."""
        return len(self.shape) == 2 and not self.is_matrix

    @property
    def is_head(self) -> bool:
        """Whether it is an output head that is not tied to an embedding."""
        return self.name == "lm_head.weight"


@dataclass(frozen=True)
class Grid:
    """The sizes of the mesh's dimensions."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @classmethod
    def of(cls, mesh: MeshConfig) -> "Grid":
        """Return the sizes of a configuration; dp_shard is 1 if the configuration does not set it.

        Raises:
            ConfigError: If a size is below 1.
        """
        grid = cls(mesh.dp_replicate, 1 if mesh.dp_shard is None else mesh.dp_shard, mesh.tp)
        for name, size in vars(grid).items():
            if size < 1:
                raise ConfigError(f"mesh.{name} is {size}; it must be at least 1")
        return grid

    @property
    def ranks(self) -> int:
        """Number of all ranks."""
        return self.dp_replicate * self.dp_shard * self.tp

    @property
    def batches(self) -> int:
        """Number of parts of the global batch; a tensor-parallel group shares a part."""
        return self.dp_replicate * self.dp_shard

    def span(self, group: str) -> int:
        """Return how many neighboring ranks a process group spans; a tp group spans the fewest."""
        sizes = {"tp": self.tp, "dp_shard": self.tp * self.dp_shard, "dp_replicate": self.ranks}
        return sizes[group]


@lru_cache(maxsize=64)
def weights_of(
    architecture: Architecture, grid: Grid = Grid(), adapter_rank: int = 0
) -> tuple[Weight, ...]:
    """List the weights of a model, from its module on the meta device; tied weights count once.

    Args:
        architecture: The model's sizes.
        grid: The mesh.
        adapter_rank: Rank of LoRA adapters; only they are trained. 0 for a model without adapters.

    Examples:
        >>> from sinkgd.lab.plan.architecture import find_architecture
        >>> weights = weights_of(find_architecture("llama-60m"))
        >>> sum(w.count for w in weights), sum(w.count for w in weights if w.is_matrix)
        (58073600, 25296896)
    """
    tokens = grid.tp  # shapes of weights do not depend on the sequence length
    whole = rank_model(architecture, tokens=tokens)
    part = rank_model(architecture, tokens=tokens, tp=grid.tp)
    if adapter_rank:
        whole, part = (add_adapters(model, adapter_rank) for model in (whole, part))
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
            shard=(-(-own.shape[0] // grid.dp_shard), *own.shape[1:]),
            is_matrix=name in matrices,
            block=int(name.split(".")[2]) if name.startswith("model.layers.") else None,
            is_trained=weight.requires_grad,
        )
        for (name, weight), (_, own) in pairs
    )


def trained(weights: Sequence[Weight]) -> tuple[Weight, ...]:
    """Return the weights that are trained."""
    return tuple(weight for weight in weights if weight.is_trained)


def largest_block(weights: Sequence[Weight]) -> int:
    """Return how many entries of the largest block a tensor-parallel rank holds."""
    sizes: dict[int, int] = {}
    for weight in weights:
        if weight.block is not None:
            sizes[weight.block] = sizes.get(weight.block, 0) + prod(weight.divided)
    return max(sizes.values(), default=0)


def outside_blocks(weights: Sequence[Weight]) -> int:
    """Return how many entries of embedding, head and last norm a tensor-parallel rank holds."""
    return sum(prod(weight.divided) for weight in weights if weight.block is None)


def rank_model(
    architecture: Architecture, *, tokens: int, tp: int = 1, layers: int | None = None
) -> Llama:
    """Build the first rank's part of a model, on the meta device.

    Args:
        architecture: The model's sizes.
        tokens: Length of the longest sequence.
        tp: Number of ranks that divide the matrices; the first rank has the largest parts.
        layers: Number of blocks to build; by default all.

    Raises:
        ConfigError: If heads or tokens cannot be divided by ``tp``.
    """
    a = architecture
    _check_divisible(a, tokens, tp)
    with torch.device("meta"):
        model = Llama(_config(a, tokens, a.num_layers if layers is None else layers))
        if _replaces_blocks(a, tp):
            for block in model.model.layers:
                block.self_attn = _Attention(a, tp)
                block.mlp = _divided_mlp(block.get_submodule("mlp"), a, tp)
        if tp > 1:
            rows = -(-a.vocab_size // tp)
            model.model.embed_tokens = _DividedEmbedding(rows, a.hidden_size, tp)
            model.model.norm.register_forward_hook(_gather_tokens(tp))
            model.lm_head = _DividedHead(a.hidden_size, rows, a.vocab_size)
            model.tie()
    return model


def _replaces_blocks(a: Architecture, tp: int) -> bool:
    return tp > 1 or a.qkv_bias


def _config(a: Architecture, tokens: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        intermediate_size=a.intermediate_size,
        num_layers=layers,
        num_heads=a.num_heads,
        max_sequence_length=tokens,
        num_key_value_heads=a.num_kv_heads,
        head_dim=a.head_size,
        tied_head=a.tied,
    )


def _check_divisible(a: Architecture, tokens: int, tp: int) -> None:
    for what, size in (
        ("attention heads", a.num_heads),
        ("key-value heads", a.num_kv_heads),
        ("tokens of a sequence", tokens),
    ):
        if size % tp:
            raise ConfigError(
                f"mesh.tp is {tp}, which does not divide the {size} {what} of {a.name}; "
                f"set mesh.tp to a divisor of {size}"
            )


def _gather_tokens(tp: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    gather = _Resize(1, tp)

    def gathered(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        del module, inputs
        whole: Tensor = gather(out)
        return whole

    return gathered


class _Attention(nn.Module):
    """Causal attention of this rank's heads; a key-value head may serve several query heads."""

    def __init__(self, a: Architecture, tp: int) -> None:
        super().__init__()
        h, bias = a.hidden_size, a.qkv_bias
        queries, keys = a.num_heads // tp * a.head_size, a.num_kv_heads // tp * a.head_size
        self.head_size, self.grouped = a.head_size, a.num_kv_heads < a.num_heads
        self.q_proj = nn.Linear(h, queries, bias=bias, dtype=torch.float32)
        self.k_proj = nn.Linear(h, keys, bias=bias, dtype=torch.float32)
        self.v_proj = nn.Linear(h, keys, bias=bias, dtype=torch.float32)
        self.o_proj = nn.Linear(queries, h, bias=False, dtype=torch.float32)
        self.gather, self.scatter = _Resize(1, tp), _Resize(1, 1, tp)

    def forward(self, x: Tensor, rotation: nn.Module) -> Tensor:
        x = self.gather(x)
        q = rotation(self._heads(self.q_proj(x)))
        k = rotation(self._heads(self.k_proj(x)))
        v = self._heads(self.v_proj(x))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        out: Tensor = self.scatter(self.o_proj(mixed.transpose(1, 2).flatten(2)))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_size).transpose(1, 2)


def _divided_mlp(mlp: nn.Module, a: Architecture, tp: int) -> nn.Module:
    if tp == 1:
        return mlp
    inner = -(-a.intermediate_size // tp)
    mlp.gate_proj = nn.Linear(a.hidden_size, inner, bias=False, dtype=torch.float32)
    mlp.up_proj = nn.Linear(a.hidden_size, inner, bias=False, dtype=torch.float32)
    mlp.down_proj = nn.Linear(inner, a.hidden_size, bias=False, dtype=torch.float32)
    return nn.Sequential(_Resize(1, tp), mlp, _Resize(1, 1, tp))


class _DividedEmbedding(nn.Embedding):
    """This rank's rows of the embedding.

    The output is computed for all tokens, and then reduced to this rank's tokens.
    """

    def __init__(self, rows: int, width: int, tp: int) -> None:
        super().__init__(rows, width, dtype=torch.float32)
        self.scatter = _Resize(1, 1, tp)

    def forward(self, tokens: Tensor) -> Tensor:
        scattered: Tensor = self.scatter(super().forward(tokens))
        return scattered


class _DividedHead(nn.Linear):
    """The output head: it computes this rank's part of the logits, and gathers all parts."""

    def __init__(self, width: int, rows: int, vocab_size: int) -> None:
        super().__init__(width, rows, bias=False, dtype=torch.float32)
        self.vocab_size = vocab_size

    def forward(self, x: Tensor) -> Tensor:
        some = super().forward(x)
        every: Tensor = _Collective.apply(some, -1, self.vocab_size)  # type: ignore[no-untyped-call]
        return every


class _Resize(nn.Module):
    """Resizes a dimension, as a gather (``times``) or a reduce-scatter (``parts``) does."""

    def __init__(self, dim: int, times: int, parts: int = 1) -> None:
        super().__init__()
        self.dim, self.times, self.parts = dim, times, parts

    def forward(self, x: Tensor) -> Tensor:
        if self.times == self.parts:
            return x
        size = x.shape[self.dim] * self.times // self.parts
        resized: Tensor = _Collective.apply(x, self.dim, size)  # type: ignore[no-untyped-call]
        return resized


class _Collective(torch.autograd.Function):
    """A collective: its output is a new tensor, and backward is the opposite collective."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int) -> Tensor:
        ctx.dim, ctx.size = dim, x.shape[dim]
        shape = list(x.shape)
        shape[dim] = size
        return x.new_empty(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        shape = list(grad.shape)
        shape[ctx.dim] = ctx.size
        return grad.new_empty(shape), None, None
