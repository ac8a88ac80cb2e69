"""GPT-2: pre-norm blocks of full attention and a GELU MLP, all layers with biases.

Parameters carry Hugging Face's names and layouts, so ``model.state_dict()`` loads into
`transformers`' ``GPT2LMHeadModel`` as it is. There is no dropout.

Shapes, everywhere in this file:
    b: sequences in the batch
    t: tokens in a sequence
    h: hidden size
    a: attention heads, each h/a wide
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sinkgd.lab.models.contract import draw_normal
from sinkgd.lab.models.figures import Figures, attention_entropy
from sinkgd.lab.models.gpt2_frame import Frame, FrameConfig


class Conv1D(nn.Module):
    """A linear layer with a bias, stored as GPT-2 was published: ``x @ weight + bias``.

    Its name and ``nf`` are those of the class in `transformers`, by which `sinkgd.param_groups`
    knows that rows and columns change places, and that one three times as wide as its input is a
    fused query, key and value.

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
        """Draw the weight; the bias is 0."""
        draw_normal(self.weight, self.std, generator)
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., nf)`` of ``(..., nx)``."""
        return nn.functional.linear(x, self.weight.mT, self.bias)


@dataclass(frozen=True)
class GPT2Config(FrameConfig):
    """The sizes of a GPT-2.

    Examples:
        >>> small = GPT2Config(vocab_size=50_257, hidden_size=768, num_layers=12, num_heads=12)
        >>> small.parameter_count
        124439808
    """

    @property
    def linear_parameter_count(self) -> int:
        """Weights of the blocks' matrices."""
        return self.num_layers * 12 * self.hidden_size**2

    @property
    def parameter_count(self) -> int:
        """All weights, the head once: matrices, their biases, norms, and the frame."""
        vectors = (3 + 1 + 4 + 1 + 2 * 2) * self.hidden_size  # biases, then two norms
        return self.linear_parameter_count + self.num_layers * vectors + self.frame_parameter_count

    def huggingface(self) -> dict[str, Any]:
        """Return the keyword arguments of the same model's ``transformers.GPT2Config``."""
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


class GPT2(Frame):
    """A GPT-2 language model.

    Weights are drawn from a generator of the model's own, on the CPU and in float32: a seed means
    the same weights on every device, and no other random number moves.

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

    def figures(self, x: Tensor) -> Figures:
        """Return the entropy of each head's attention in nats, of a block's input ``(b, t, h)``."""
        # one sequence at a time, for logits are t×t
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
