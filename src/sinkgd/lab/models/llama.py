"""LLaMA: pre-norm transformer blocks with RMSNorm, rotary positions and a SwiGLU MLP.

By default the model is the one of the C4 benchmark, which is LLaMA 1. LLaMA 3 has fewer key-value
heads than query heads, its small models have a tied head, and LLaMA 3.1 scales rotary positions.

Parameters carry Hugging Face's names, so ``model.state_dict()`` loads into `transformers`'
``LlamaForCausalLM`` as it is.

Shapes, everywhere in this file:
    b: sequences in the batch
    t: tokens in a sequence
    h: hidden size
    a: attention heads
    g: key-value heads, a or a divisor of it
    d: features of a head, h/a by default
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sinkgd.lab.models.language_model import (
    LanguageModel,
    ModelError,
    check_positive,
    draw_normal,
    materialize,
)


@dataclass(frozen=True)
class RotaryScaling:
    r"""Slower rotations, with which a model reads longer sequences than it was first trained on.

    The fields have the names of `transformers` with the rope type "llama3". A feature pair of
    frequency :math:`f` makes :math:`n = L f / 2\pi` turns within the original length :math:`L`. Its
    new frequency is

    .. math::
        \left(s + \frac{1 - s}{\text{factor}}\right) f, \qquad
        s = \frac{n - \text{low}}{\text{high} - \text{low}} \text{ clamped to } [0, 1]

    Raises:
        ModelError: If a number is not positive, ``factor`` is below 1, or ``high_freq_factor`` does
            not exceed ``low_freq_factor``.

    References:
        Grattafiori et al., The Llama 3 Herd of Models, https://arxiv.org/abs/2407.21783
    """

    factor: float  # by which the slowest rotations are divided
    low_freq_factor: float  # number of turns n up to which f is divided by the whole factor
    high_freq_factor: float  # number of turns n from which f stays as it is
    original_max_position_embeddings: int  # L, tokens

    def __post_init__(self) -> None:
        check_positive(self)
        if self.factor < 1:
            raise ModelError(f"factor of rotary positions must be at least 1, got {self.factor}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ModelError(
                f"high_freq_factor of rotary positions is {self.high_freq_factor}; it must exceed "
                f"low_freq_factor, {self.low_freq_factor}"
            )

    def scale(self, frequencies: Tensor) -> Tensor:
        """Return the new frequencies, in radians per token, of the same shape."""
        turns = self.original_max_position_embeddings / (2 * math.pi / frequencies)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a LLaMA; the defaults are those of the C4 benchmark.

    Raises:
        ModelError: If a size is not positive, the features of a head are not an even whole number,
            or the key-value heads do not divide the heads.

    Examples:
        >>> llama_3_2_1b = LlamaConfig(
        ...     vocab_size=128_256,
        ...     hidden_size=2048,
        ...     intermediate_size=8192,
        ...     num_layers=16,
        ...     num_heads=32,
        ...     num_key_value_heads=8,
        ...     tied_head=True,
        ... )
        >>> llama_3_2_1b.parameter_count
        1235814400
    """

    vocab_size: int  # tokens
    hidden_size: int  # h, width of the residual stream
    intermediate_size: int  # width inside the MLP
    num_layers: int
    num_heads: int  # a
    max_sequence_length: int = 1024  # tokens
    norm_eps: float = 1e-6  # added to the mean square inside RMSNorm
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    initializer_std: float = 0.02  # of every linear and embedding weight
    num_key_value_heads: int | None = None  # g, a divisor of num_heads; None for num_heads
    head_dim: int | None = None  # d, even; None for hidden_size / num_heads
    rope_scaling: RotaryScaling | None = None
    tied_head: bool = False  # whether the output head is the embedding

    def __post_init__(self) -> None:
        check_positive(self)
        if self.head_dim is None and self.hidden_size % (2 * self.num_heads):
            raise ModelError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} must be an even "
                "whole number, since rotary positions turn the features of a head in pairs; "
                "change one of them"
            )
        if self.head_size % 2:
            raise ModelError(
                f"head_dim must be even, since rotary positions turn the features of a head in "
                f"pairs; got {self.head_dim}"
            )
        if self.num_heads % self.key_value_heads:
            raise ModelError(
                f"num_key_value_heads is {self.num_key_value_heads}, which does not divide the "
                f"{self.num_heads} heads; give a divisor"
            )

    @property
    def key_value_heads(self) -> int:
        """Key-value heads, g; each serves a/g query heads."""
        return self.num_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """Features of one attention head, d."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def linear_parameter_count(self) -> int:
        """Number of weights in the blocks' matrices, which SinkGD updates by SR-Sinkhorn."""
        h = self.hidden_size
        attention = 2 * h * self.head_size * (self.num_heads + self.key_value_heads)
        return self.num_layers * (attention + 3 * h * self.intermediate_size)

    @property
    def parameter_count(self) -> int:
        """Number of all weights: the blocks' matrices, embedding and head, and the norms.

        A tied head counts once.
        """
        embedding_and_head = (1 if self.tied_head else 2) * self.vocab_size * self.hidden_size
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return self.linear_parameter_count + embedding_and_head + norms

    def huggingface(self) -> dict[str, Any]:
        """Return the keyword arguments of ``transformers.LlamaConfig`` for the same model."""
        scaling = self.rope_scaling
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_size,
            "max_position_embeddings": self.max_sequence_length,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None if scaling is None else {"rope_type": "llama3", **vars(scaling)},
            "initializer_range": self.initializer_std,
            "tie_word_embeddings": self.tied_head,
        }


class Llama(LanguageModel):
    """A LLaMA language model.

    Weights are drawn from the model's own generator, on the CPU and in float32: a seed gives the
    same weights on every device, and the global generator is left alone.

    Args:
        config: The sizes.
        seed: Seed of the weights.

    Examples:
        >>> config = LlamaConfig(
        ...     vocab_size=100, hidden_size=16, intermediate_size=40, num_layers=2, num_heads=4
        ... )
        >>> Llama(config)(torch.tensor([[5, 7, 11]])).shape
        torch.Size([1, 3, 100])

        A model made on the meta device has no weights until it gets a device:

        >>> with torch.device("meta"):
        ...     model = Llama(config)
        >>> model.to_empty(device="cpu").initialize(seed=0)(torch.tensor([[5]])).shape
        torch.Size([1, 1, 100])
    """

    config: LlamaConfig

    def __init__(self, config: LlamaConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):  # torch's own init would draw from the global generator
            self.model = _Body(config)
            self.lm_head = nn.Linear(
                config.hidden_size, config.vocab_size, bias=False, dtype=torch.float32
            )
        self.tie()
        materialize(self, torch.get_default_device(), seed)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        return self.model.layers

    @property
    def recompute(self) -> bool:
        """Whether to keep only the input of each block, and run the block again in backward."""
        return self.model.recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self.model.recompute = value

    def initialize(self, seed: int) -> Self:
        """Draw all weights and return the model.

        Linear and embedding weights are normal with the config's standard deviation, norm weights
        are 1; see `draw_normal` for bfloat16 and sharded weights.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        std = self.config.initializer_std
        with torch.no_grad():
            for weight in self.parameters():
                if weight.ndim == 1:
                    weight.fill_(1.0)
                else:
                    draw_normal(weight, std, generator)
        return self

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(b, t)`` to the hidden states that the head reads, ``(b, t, h)``."""
        hidden: Tensor = self.model(tokens)
        return hidden

    def tie(self) -> None:
        """Tie the head to the embedding if the config says so; call this after replacing either."""
        if self.config.tied_head:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # moving a module from the meta device unties tied parameters
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tie()
        return self


class _Body(nn.Module):
    """Everything below the head: embedding, blocks, last norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, dtype=torch.float32)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rotation = _Rotation(config)
        self.recompute = False

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed_tokens(tokens)
        for layer in self.layers:
            if self.recompute and self.training:
                x = checkpoint(layer, x, self.rotation, use_reentrant=False)
            else:
                x = layer(x, self.rotation)
        normalized: Tensor = self.norm(x)
        return normalized


class _Block(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = _SwiGLU(config)

    def forward(self, x: Tensor, rotation: "_Rotation") -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        after: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return after


class _Attention(nn.Module):
    """Causal self-attention; neighboring query heads may share one key-value head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.grouped = config.key_value_heads < config.num_heads
        h = config.hidden_size
        queries, keys = config.num_heads * self.head_size, config.key_value_heads * self.head_size
        self.q_proj = nn.Linear(h, queries, bias=False, dtype=torch.float32)
        self.k_proj = nn.Linear(h, keys, bias=False, dtype=torch.float32)
        self.v_proj = nn.Linear(h, keys, bias=False, dtype=torch.float32)
        self.o_proj = nn.Linear(queries, h, bias=False, dtype=torch.float32)

    def forward(self, x: Tensor, rotation: "_Rotation") -> Tensor:
        q = rotation(self._heads(self.q_proj(x)))
        k = rotation(self._heads(self.k_proj(x)))
        v = self._heads(self.v_proj(x))
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.grouped
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """Split ``(b, t, a·d)`` into ``(b, a, t, d)``; keys and values have g heads."""
        return x.view(*x.shape[:2], -1, self.head_size).transpose(1, 2)


class _SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        h, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(h, inner, bias=False, dtype=torch.float32)
        self.up_proj = nn.Linear(h, inner, bias=False, dtype=torch.float32)
        self.down_proj = nn.Linear(inner, h, bias=False, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, in float32, and scale by a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` of shape ``(..., size)``, normalized and scaled.

        The result has the dtype of ``x``, or the dtype of the weight if that is wider.
        """
        wide = x.float()
        inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * inverse_rms).to(x.dtype)


class _Rotation(nn.Module):
    """Rotary positions: at position p, turn the feature pair (i, i + d/2) of a head by p·θ^(-2i/d).

    Pairing feature i with i + d/2 (and not 2i with 2i + 1) is Hugging Face's convention. The
    frequencies may be scaled, see `RotaryScaling`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self._fill(torch.get_default_device())

    def _fill(self, device: torch.device) -> None:
        d = self.config.head_size
        exponents = torch.arange(0, d, 2, dtype=torch.float32, device=device) / d
        frequencies = 1.0 / self.config.rope_theta**exponents
        if self.config.rope_scaling is not None:
            frequencies = self.config.rope_scaling.scale(frequencies)
        positions = torch.arange(
            self.config.max_sequence_length, dtype=torch.float32, device=device
        )
        angles = torch.outer(positions, frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.bfloat16()` would round the tables and `.to_empty()` would leave them unset, so compute
        # them again, in float32, on the module's new device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._fill(self.cos.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Turn queries or keys, ``(b, a or g, t, d)``, by tables rounded to the input's dtype."""
        t = x.shape[-2]
        cos, sin = self.cos[:t].to(x.dtype), self.sin[:t].to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
