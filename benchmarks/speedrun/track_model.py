"""The model of modded-nanogpt's optimization track, written anew: 162,354,816 parameters.

Rows have B sequences of T tokens; D is the width, H the number of heads, K the width of a head.
Activations are bfloat16, because the embedding is; all other weights are float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

ATTENTION_SCALE = 0.12  # instead of 1/√K
LOGIT_LIMIT = 15.0
ROTARY_BASE = 1024.0


@dataclass(frozen=True)
class Size:
    """The sizes of a model."""

    vocab_size: int = 50304
    layers: int = 12
    width: int = 768
    head_width: int = 128


class Linear(nn.Linear):
    """A linear layer with a bias, computed in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Return ``input @ weight.T + bias``."""
        return nn.functional.linear(input, self.weight.type_as(input), self.bias.type_as(input))


class RMSNorm(nn.RMSNorm):
    """A root-mean-square norm with gains, computed in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale each vector to root-mean-square 1, and multiply it by the gains."""
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight.type_as(x))


class Attention(nn.Module):
    """Causal attention with normalized queries and keys, half of whose dimensions are rotated."""

    frequencies: Tensor

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.q, self.k, self.v, self.out = (Linear(width, width) for _ in range(4))
        turning = ROTARY_BASE ** -torch.linspace(0, 1, head_width // 4)
        self.register_buffer("frequencies", torch.cat([turning, torch.zeros_like(turning)]))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, D)`` to ``(B, T, D)``."""
        heads = (*x.shape[:2], -1, self.head_width)
        q, k, v = self.q(x).view(heads), self.k(x).view(heads), self.v(x).view(heads)
        q, k = (self.rotate(nn.functional.rms_norm(part, (self.head_width,))) for part in (q, k))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=ATTENTION_SCALE
        )
        mixed: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return mixed

    def rotate(self, x: Tensor) -> Tensor:
        """Turn the pairs (i, i + K/2) of ``(B, T, H, K)`` by an angle for each position."""
        positions = torch.arange(x.shape[1], dtype=torch.float32, device=x.device)
        angles = torch.outer(positions, self.frequencies).unsqueeze(1)
        first, second = x.float().chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos + second * sin, second * cos - first * sin], -1).type_as(x)


class MLP(nn.Module):
    """Two linear layers, with a squared ReLU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.out = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, D)`` to ``(B, T, D)``."""
        y: Tensor = self.out(self.up(x).relu().square())
        return y


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to its input."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = RMSNorm(size.width), RMSNorm(size.width)
        self.attention = Attention(size.width, size.head_width)
        self.mlp = MLP(size.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, D)`` to ``(B, T, D)``."""
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class GPT(nn.Module):
    """A GPT without tied weights: ``forward`` returns the summed cross-entropy of the targets."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocab_size, size.width, dtype=torch.bfloat16)
        self.embed_norm, self.head_norm = RMSNorm(size.width), RMSNorm(size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.head = Linear(size.width, size.vocab_size)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the losses of ``(B, T)`` targets, in nats, float32."""
        x = self.embed_norm(self.embed(inputs))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.head_norm(x)).float()
        limited = LOGIT_LIMIT * logits * (logits.square() + LOGIT_LIMIT**2).rsqrt()
        return nn.functional.cross_entropy(
            limited.flatten(0, 1), targets.flatten(), reduction="sum"
        )

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Draw all weights as the track does; a seed gives the same weights on every device."""
        generator = torch.Generator().manual_seed(seed)
        for name, param in self.named_parameters():
            if name.endswith(("bias", "out.weight")) or name == "head.weight":
                param.zero_()
            elif param.ndim < 2:
                param.fill_(1.0)
            else:
                std = 1.0 if name == "embed.weight" else (0.33 / param.shape[1]) ** 0.5
                param.copy_(torch.randn(param.shape, generator=generator) * std)
