"""GPT-2: learned positions, pre-norm blocks of causal attention and a GELU MLP, and a tied head.

`GPT2Base` is GPT-2 without its blocks; `sinkgd.lab.models.lens` puts other blocks into it.

Parameters carry Hugging Face's names and layouts, so ``model.state_dict()`` loads into
`transformers`' ``GPT2LMHeadModel`` unchanged. There is no dropout.

Shapes, everywhere in this file:
    b: sequences in the batch
    t: tokens in a sequence
    h: hidden size
    a: attention heads, each h/a wide
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sinkgd.lab.models.language_model import (
    LanguageModel,
    ModelError,
    Statistics,
    attention_entropy,
    draw_normal,
    materialize,
    summarize_statistics,
)


@dataclass(frozen=True)
class GPT2BaseConfig(ABC):
    """The sizes of every model built on `GPT2Base`; the defaults are GPT-2's.

    Raises:
        ModelError: If a size is not positive, or the heads do not divide the hidden size.
    """

    vocab_size: int  # tokens
    hidden_size: int  # h, width of the residual stream
    num_layers: int
    num_heads: int
    max_sequence_length: int = 1024  # tokens, rows of the position embedding
    norm_eps: float = 1e-5  # added to the variance inside LayerNorm
    initializer_std: float = 0.02  # of all weights except those that write to the residual stream

    def __post_init__(self) -> None:
        for name in GPT2BaseConfig.__dataclass_fields__:
            if getattr(self, name) <= 0:
                raise ModelError(f"{name} must be positive, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ModelError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} must be a whole "
                "number; change one of them"
            )

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def intermediate_size(self) -> int:
        """Width inside the MLP, four times the width of the residual stream."""
        return 4 * self.hidden_size

    @property
    def residual_std(self) -> float:
        """Standard deviation of the two weights per block that write to the residual stream."""
        return float(self.initializer_std / (2 * self.num_layers) ** 0.5)

    @property
    @abstractmethod
    def linear_parameter_count(self) -> int:
        """Number of weights in the blocks' matrices."""

    @property
    @abstractmethod
    def parameter_count(self) -> int:
        """Number of all weights; the head is tied to the embedding and counts once."""

    @property
    def base_parameter_count(self) -> int:
        """Number of weights outside the blocks; the head is the embedding and counts once."""
        return (self.vocab_size + self.max_sequence_length + 2) * self.hidden_size


@runtime_checkable
class DrawsWeights(Protocol):
    """A module that draws its own weights."""

    def draw(self, generator: torch.Generator) -> None:
        """Draw the weights."""


class GPT2Base(LanguageModel):
    """Embeddings, blocks that a subclass makes, last norm and tied head.

    Args:
        config: The sizes.
        seed: Seed of the weights.
    """

    config: GPT2BaseConfig

    def __init__(self, config: GPT2BaseConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):  # torch's own init would draw from the global generator
            self.transformer = _Body(config, self.make_block)
            self.lm_head = nn.Linear(
                config.hidden_size, config.vocab_size, bias=False, dtype=torch.float32
            )
        self._tie()
        materialize(self, torch.get_default_device(), seed)

    @abstractmethod
    def make_block(self) -> nn.Module:
        """Return a block.

        It maps hidden states ``(b, t, h)`` and `block_arguments` to hidden states of that shape.
        """

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        return self.transformer.h

    @property
    def recompute(self) -> bool:
        """Whether to keep only the input of each block, and to run the block again in backward."""
        return self.transformer.recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self.transformer.recompute = value

    def initialize(self, seed: int) -> Self:
        """Draw all weights and return the model.

        Weights are normal with the config's standard deviation, divided by √(2·layers) for those
        that write to the residual stream. Biases are 0 and norm weights are 1.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.weight.fill_(1.0)
                    module.bias.zero_()
                elif isinstance(module, nn.Embedding):
                    draw_normal(module.weight, self.config.initializer_std, generator)
                elif isinstance(module, DrawsWeights):
                    module.draw(generator)
        return self

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(b, t)`` to the hidden states that the head reads, ``(b, t, h)``."""
        hidden: Tensor = self.transformer(tokens, self.block_arguments())
        return hidden

    def block_arguments(self) -> tuple[Any, ...]:
        """Return the arguments of each block besides the hidden states; here none."""
        return ()

    @torch.no_grad()
    def statistics(self, tokens: Tensor) -> dict[str, float]:
        """Return the statistics of each block on its input, summarized.

        Args:
            tokens: ``(b, t)``.

        Returns:
            For every statistic its mean, minimum and maximum over all heads of all blocks, and the
            mean of each block: ``"attention_entropy/mean"``, ``"attention_entropy/block_0"``.
        """
        blocks: list[Statistics] = []

        def observe(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            blocks.append(block.statistics(inputs[0]))  # type: ignore[operator]

        # FSDP gathers a sharded block in a pre-forward hook; this hook runs after it.
        hooks = [block.register_forward_pre_hook(observe) for block in self.blocks]
        try:
            self(tokens, lambda hidden, _head: hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return summarize_statistics(blocks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # moving a module from the meta device unties tied parameters
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tie()
        return self

    def _tie(self) -> None:
        self.lm_head.weight = self.transformer.wte.weight


class _Body(nn.Module):
    """Everything below the head, under Hugging Face's names."""

    def __init__(self, config: GPT2BaseConfig, make_block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size, dtype=torch.float32)
        self.wpe = nn.Embedding(config.max_sequence_length, config.hidden_size, dtype=torch.float32)
        self.h = nn.ModuleList(make_block() for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, config.norm_eps, dtype=torch.float32)
        self.recompute = False

    def forward(self, tokens: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        positions = torch.arange(tokens.shape[1], dtype=torch.int64, device=tokens.device)
        x: Tensor = self.wte(tokens) + self.wpe(positions)
        for block in self.h:
            if self.recompute and self.training:
                x = checkpoint(block, x, *arguments, use_reentrant=False)
            else:
                x = block(x, *arguments)
        normalized: Tensor = self.ln_f(x)
        return normalized


class Conv1D(nn.Module):
    """A linear layer with a bias, stored as GPT-2 was published: ``x @ weight + bias``.

    Its name and ``nf`` are those of the class in `transformers`. By them, `sinkgd.param_groups`
    recognizes that the weight is transposed, and that a weight three times as wide as its input is
    a fused query, key and value.

    Args:
        nf: Output features.
        nx: Input features.
        std: Standard deviation of the initial weight.
    """

    def __init__(self, nf: int, nx: int, std: float) -> None:
        super().__init__()
        self.nf, self.nx, self.std = nf, nx, std
        self.weight = nn.Parameter(torch.empty(nx, nf, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(nf, dtype=torch.float32))

    def draw(self, generator: torch.Generator) -> None:
        """Draw the weight and set the bias to 0."""
        draw_normal(self.weight, self.std, generator)
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., nx)`` to ``(..., nf)``."""
        return nn.functional.linear(x, self.weight.mT, self.bias)


@dataclass(frozen=True)
class GPT2Config(GPT2BaseConfig):
    """The sizes of a GPT-2.

    Examples:
        >>> small = GPT2Config(vocab_size=50_257, hidden_size=768, num_layers=12, num_heads=12)
        >>> small.parameter_count
        124439808
    """

    @property
    def linear_parameter_count(self) -> int:
        """Number of weights in the blocks' matrices."""
        return self.num_layers * 12 * self.hidden_size**2

    @property
    def parameter_count(self) -> int:
        """Number of all weights: matrices, biases and norms of the blocks, and the rest."""
        vectors = (3 + 1 + 4 + 1 + 2 * 2) * self.hidden_size  # biases, then two norms
        return self.linear_parameter_count + self.num_layers * vectors + self.base_parameter_count

    def huggingface(self) -> dict[str, Any]:
        """Return the keyword arguments of ``transformers.GPT2Config`` for the same model."""
        return {
            "vocab_size": self.vocab_size,
            "n_embd": self.hidden_size,
            "n_layer": self.num_layers,
            "n_head": self.num_heads,
            "n_positions": self.max_sequence_length,
            "layer_norm_epsilon": self.norm_eps,
            "initializer_range": self.initializer_std,
            "activation_function": "gelu_new",
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "tie_word_embeddings": True,
        }


class GPT2(GPT2Base):
    """A GPT-2 language model.

    Weights are drawn from the model's own generator, on the CPU and in float32: a seed gives the
    same weights on every device, and the global generator is not used.

    Args:
        config: The sizes.
        seed: Seed of the weights.

    Examples:
        >>> config = GPT2Config(vocab_size=100, hidden_size=16, num_layers=2, num_heads=4)
        >>> GPT2(config)(torch.tensor([[5, 7, 11]])).shape
        torch.Size([1, 3, 100])

    References:
        Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
    """

    config: GPT2Config

    def make_block(self) -> nn.Module:
        """Return a block of attention and MLP."""
        return _Block(self.config)


class _Block(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, config.norm_eps, dtype=torch.float32)
        self.attn = _Attention(config)
        self.ln_2 = nn.LayerNorm(config.hidden_size, config.norm_eps, dtype=torch.float32)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        after: Tensor = x + self.mlp(self.ln_2(x))
        return after

    def statistics(self, x: Tensor) -> Statistics:
        """Return the attention entropy of each head in nats, for a block's input ``(b, t, h)``."""
        # one sequence at a time, since logits are t×t
        rows = [attention_entropy(self.attn.logits(self.ln_1(row))) for row in torch.split(x, 1)]
        return {"attention_entropy": torch.cat(rows).mean(0)}


class _Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.head_size = config.head_size
        h = config.hidden_size
        self.c_attn = Conv1D(3 * h, h, config.initializer_std)
        self.c_proj = Conv1D(h, h, config.residual_std)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(x)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.c_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits before the mask, ``(b, a, t, t)``."""
        q, k, _ = self._heads(x)
        logits: Tensor = q @ k.mT / self.head_size**0.5
        return logits

    def _heads(self, x: Tensor) -> list[Tensor]:
        """Return queries, keys and values, each ``(b, a, t, h/a)``."""
        shape = (*x.shape[:2], -1, self.head_size)
        fused: Tensor = self.c_attn(x)
        return [part.view(shape).transpose(1, 2) for part in fused.chunk(3, dim=-1)]


class _MLP(nn.Module):
    """``c_proj(gelu(c_fc(x)))``, with GELU's approximation by tanh."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.intermediate_size, config.hidden_size, config.initializer_std)
        self.c_proj = Conv1D(config.hidden_size, config.intermediate_size, config.residual_std)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(nn.functional.gelu(self.c_fc(x), approximate="tanh"))
        return out
