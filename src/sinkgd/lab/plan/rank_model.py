"""The part of a LLaMA that one rank of a tensor-parallel group holds, on the meta device.

It is the lab's own `Llama`, with the blocks' modules replaced where heads share keys and values, or
where ranks divide the matrices. Collectives are replaced by their shapes: nothing is sent.

Letters, everywhere in this file:
    b: sequences in a batch
    t: tokens in a sequence; between blocks a rank holds t/tp of them
    h: hidden size
    tp: ranks that divide each block's matrices and heads
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sinkgd.lab.models import Llama, LlamaConfig
from sinkgd.lab.plan.architecture import Architecture
from sinkgd.lab.train.config import ConfigError


def rank_model(
    architecture: Architecture, *, tokens: int, tp: int = 1, layers: int | None = None
) -> Llama:
    """Build the first rank's part of a model, on the meta device.

    Args:
        architecture: The model's sizes.
        tokens: Of the longest sequence.
        tp: Ranks that divide the matrices; the first has the largest parts.
        layers: Blocks to build; by default all.

    Raises:
        ConfigError: If heads or tokens cannot be divided by ``tp``.
    """
    a = architecture
    _check_divisible(a, tokens, tp)
    with torch.device("meta"):
        model = Llama(_skeleton(a, tokens, a.num_layers if layers is None else layers))
        if tp > 1 or a.qkv_bias or (a.num_kv_heads, a.head_size) != _of_llama(a):
            for block in model.model.layers:
                block.self_attn = _Attention(a, tp)
                block.mlp = _divided_mlp(block.get_submodule("mlp"), a, tp)
            rotation = Llama(_head_skeleton(a, tokens)).model.rotation
            model.model.rotation = rotation
        if tp > 1:
            rows = -(-a.vocab_size // tp)
            model.model.embed_tokens = _DividedEmbedding(rows, a.hidden_size, tp)
            model.model.norm.register_forward_hook(_gather_tokens(tp))
            model.lm_head = _DividedHead(a.hidden_size, rows, a.vocab_size)
        if a.tied:
            model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _of_llama(a: Architecture) -> tuple[int, float]:
    return a.num_heads, a.hidden_size / a.num_heads


def _skeleton(a: Architecture, tokens: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        intermediate_size=a.intermediate_size,
        num_layers=layers,
        # The lab's own heads are as wide as the hidden size; others are put in their place.
        num_heads=a.num_heads if a.hidden_size % (2 * a.num_heads) == 0 else 1,
        max_sequence_length=tokens,
    )


def _head_skeleton(a: Architecture, tokens: int) -> LlamaConfig:
    """Return a model of one head as wide as those of ``a``: its rotary tables are theirs."""
    return LlamaConfig(1, a.head_size, 1, 1, 1, max_sequence_length=tokens)


def _check_divisible(a: Architecture, tokens: int, tp: int) -> None:
    for what, size in (
        ("attention heads", a.num_heads),
        ("key-value heads", a.num_kv_heads),
        ("tokens of a sequence", tokens),
    ):
        if size % tp:
            raise ConfigError(
                f"mesh.tp is {tp}, which does not divide the {size} {what} of {a.name}; "
                "use a divisor of it"
            )


def _gather_tokens(tp: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    gather = _Moved(1, tp)

    def gathered(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        del module, inputs
        whole: Tensor = gather(out)
        return whole

    return gathered


class _Attention(nn.Module):
    """Causal attention of this rank's heads; each key-value head serves several of queries."""

    def __init__(self, a: Architecture, tp: int) -> None:
        super().__init__()
        h, bias = a.hidden_size, a.qkv_bias
        queries, keys = a.num_heads // tp * a.head_size, a.num_kv_heads // tp * a.head_size
        self.head_size, self.grouped = a.head_size, a.num_kv_heads < a.num_heads
        self.q_proj = nn.Linear(h, queries, bias=bias, dtype=torch.float32)
        self.k_proj = nn.Linear(h, keys, bias=bias, dtype=torch.float32)
        self.v_proj = nn.Linear(h, keys, bias=bias, dtype=torch.float32)
        self.o_proj = nn.Linear(queries, h, bias=False, dtype=torch.float32)
        self.gather, self.scatter = _Moved(1, tp), _Moved(1, 1, tp)

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
    return nn.Sequential(_Moved(1, tp), mlp, _Moved(1, 1, tp))


class _DividedEmbedding(nn.Embedding):
    """Some rows of the table: all tokens' vectors, then those of this rank's tokens."""

    def __init__(self, rows: int, width: int, tp: int) -> None:
        super().__init__(rows, width, dtype=torch.float32)
        self.scatter = _Moved(1, 1, tp)

    def forward(self, tokens: Tensor) -> Tensor:
        scattered: Tensor = self.scatter(super().forward(tokens))
        return scattered


class _DividedHead(nn.Linear):
    """Logits of some tokens of the vocabulary, then of all."""

    def __init__(self, width: int, rows: int, vocab_size: int) -> None:
        super().__init__(width, rows, bias=False, dtype=torch.float32)
        self.vocab_size = vocab_size

    def forward(self, x: Tensor) -> Tensor:
        some = super().forward(x)
        every: Tensor = _Move.apply(some, -1, self.vocab_size)  # type: ignore[no-untyped-call]
        return every


class _Moved(nn.Module):
    """The shape that a gather (``times``) or a reduce-scatter (``parts``) of a dimension gives."""

    def __init__(self, dim: int, times: int, parts: int = 1) -> None:
        super().__init__()
        self.dim, self.times, self.parts = dim, times, parts

    def forward(self, x: Tensor) -> Tensor:
        if self.times == self.parts:
            return x
        size = x.shape[self.dim] * self.times // self.parts
        moved: Tensor = _Move.apply(x, self.dim, size)  # type: ignore[no-untyped-call]
        return moved


class _Move(torch.autograd.Function):
    """A collective's output is a tensor of its own; backward is the opposite collective."""

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
