"""Lens L6: GPT-2 whose blocks mix attention logits and reduce attention's share over the run.

Parts that a Lens shares with GPT-2 have GPT-2's names and layouts.

Shapes, everywhere in this file:
    b: sequences in the batch
    t: tokens in a sequence
    h: hidden size
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sinkgd.lab.models.gpt2 import GPT2, GPT2Base, GPT2BaseConfig
from sinkgd.lab.models.language_model import ModelError, Statistics
from sinkgd.lab.models.lens_blocks import LensAttention, LensMLP

_ROUTE_START = 2.2  # logit of the share of attention before annealing; the share is 0.90


@dataclass(frozen=True)
class LensConfig(GPT2BaseConfig):
    """The sizes of a Lens, and the schedule of its share of attention.

    Raises:
        ModelError: If a size is impossible, as for `GPT2BaseConfig`; if a rank is below 1 or above
            the hidden size; or if the schedule starts before the run or does not end after its
            start.

    Examples:
        >>> lens = LensConfig(vocab_size=50_304, hidden_size=768, num_layers=12, num_heads=12)
        >>> lens.parameter_count
        120928188
    """

    key_value_rank: int = 128  # of the maps to keys and to values
    context_rank: int = 128  # of the map from attention's output into the MLP
    route_shift: float = -3.2  # added to the logit of the share, linearly from start to end
    anneal_start: float = 2000 / 10_400  # fraction of the run's steps
    anneal_end: float = 10_000 / 10_400  # fraction of the run's steps

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("key_value_rank", "context_rank"):
            rank = getattr(self, name)
            if not 0 < rank <= self.hidden_size:
                raise ModelError(
                    f"{name} must be from 1 to hidden_size {self.hidden_size}, got {rank}"
                )
        if not 0 <= self.anneal_start < self.anneal_end:
            raise ModelError(
                f"anneal_start must be at least 0 and before anneal_end, got {self.anneal_start} "
                f"and {self.anneal_end}"
            )

    @property
    def linear_parameter_count(self) -> int:
        """Number of weights in the blocks' matrices."""
        h, inner = self.hidden_size, self.intermediate_size
        factors = self.key_value_rank * 4 * h + self.context_rank * (h + inner)
        return self.num_layers * (2 * h * h + 2 * h * inner + factors)

    @property
    def parameter_count(self) -> int:
        """Number of all weights: matrices, vectors and gates of the blocks, and the rest."""
        h = self.hidden_size
        vectors = 2 * h + (self.intermediate_size + h) + 4 * h  # attention, MLP, two norms
        gates = 3 * self.num_heads + h + 1
        return (
            self.linear_parameter_count
            + self.num_layers * (vectors + gates)
            + self.base_parameter_count
        )

    def attention_share(self, step: int, steps: int) -> float:
        r"""Return the share g of attention in the sum of a block; the MLP has the share 1 - g.

        .. math::
            g = \sigma(2.2 + \text{shift} \cdot \mathrm{clamp}_{[0, 1]}(p)), \qquad
            p = \frac{\text{step}/\text{steps} - \text{start}}{\text{end} - \text{start}}

        Args:
            step: Optimizer steps taken so far.
            steps: Optimizer steps of the whole run.

        Examples:
            >>> lens = LensConfig(vocab_size=9, hidden_size=128, num_layers=1, num_heads=1)
            >>> [round(lens.attention_share(step, 10_400), 3) for step in (0, 2000, 6000, 10_000)]
            [0.9, 0.9, 0.646, 0.269]
        """
        progress = (step / steps - self.anneal_start) / (self.anneal_end - self.anneal_start)
        shift = self.route_shift * min(max(progress, 0.0), 1.0)
        return 1 / (1 + math.exp(-(_ROUTE_START + shift)))


class Lens(GPT2Base):
    """A Lens L6 language model.

    Its share of attention is annealed over the run: call `at_step` before every step.

    Args:
        config: The sizes.
        seed: Seed of the weights. The maps to keys and values start as the best low-rank
            approximations of matrices that are drawn as GPT-2's are.

    Examples:
        >>> config = LensConfig(
        ...     vocab_size=100,
        ...     hidden_size=16,
        ...     num_layers=2,
        ...     num_heads=4,
        ...     key_value_rank=4,
        ...     context_rank=4,
        ... )
        >>> model = Lens(config)
        >>> model.at_step(50, steps=100)
        >>> model(torch.tensor([[5, 7, 11]])).shape
        torch.Size([1, 3, 100])
    """

    config: LensConfig

    def __init__(self, config: LensConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self.attention_share = config.attention_share(0, 1)

    def make_block(self) -> nn.Module:
        """Return a block of mixed attention and an MLP that also reads attention's output."""
        return _Block(self.config)

    def block_arguments(self) -> tuple[float]:
        """Return the share of attention."""
        return (self.attention_share,)

    def at_step(self, step: int, steps: int) -> None:
        """Anneal the share of attention; see `LensConfig.attention_share`.

        Args:
            step: Optimizer steps taken so far, 0 before the first.
            steps: Optimizer steps of the whole run.
        """
        self.attention_share = self.config.attention_share(step, steps)

    def statistics(self, tokens: Tensor) -> dict[str, float]:
        """Return the statistics of attention, gates and contexts, and ``"attention_share"``."""
        return {**super().statistics(tokens), "attention_share": self.attention_share}


class _Block(nn.Module):
    """``x + g·attention + (1-g)·mlp``.

    The MLP reads the normalized ``x + attention``, and ``attention`` itself.
    """

    def __init__(self, config: LensConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, config.norm_eps, dtype=torch.float32)
        self.attn = LensAttention(config, config.key_value_rank)
        self.ln_2 = nn.LayerNorm(config.hidden_size, config.norm_eps, dtype=torch.float32)
        self.mlp = LensMLP(config, config.context_rank)

    def forward(self, x: Tensor, attention_share: float) -> Tensor:
        attention: Tensor = self.attn(self.ln_1(x))
        out: Tensor = self.mlp(self.ln_2(x + attention), attention)
        return x + attention_share * attention + (1 - attention_share) * out

    def statistics(self, x: Tensor) -> Statistics:
        """Return the statistics of attention, and ``context_share``, for a block's input."""
        return {**self.attn.statistics(self.ln_1(x)), "context_share": self.mlp.share()}


def lens_from_gpt2(gpt2: GPT2, config: LensConfig, *, seed: int = 0) -> Lens:
    """Build a Lens that starts from the weights of a GPT-2.

    Weights that both models have are copied. The maps to keys and values become the best low-rank
    approximations of GPT-2's maps. GPT-2's key bias is dropped: in standard attention it shifts all
    logits of a query equally. The value bias passes through attention unchanged, so its product
    with the output map is added to the output bias. Weights that only a Lens has keep their initial
    values: the context map of the MLP with its share, the gates and the directions.

    Args:
        gpt2: An unsharded model, on the default device.
        config: Sizes with GPT-2's vocabulary, width, depth, heads and length.
        seed: Seed of the weights that GPT-2 does not have.

    Raises:
        ModelError: If a size differs.
    """
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_sequence_length"):
        theirs, ours = getattr(gpt2.config, name), getattr(config, name)
        if theirs != ours:
            raise ModelError(f"{name} is {theirs} in the GPT-2 and {ours} in config; use {theirs}")
    lens = Lens(config, seed=seed)
    # everything except the fused projection has the same name
    lens.load_state_dict(
        {name: x for name, x in gpt2.state_dict().items() if ".c_attn." not in name}, strict=False
    )
    for block, source in zip(lens.blocks, gpt2.blocks, strict=True):
        fused = source.get_submodule("attn.c_attn")
        _take_projections(block.get_submodule("attn"), *fused.parameters())
    return lens


@torch.no_grad()
def _take_projections(attention: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Split GPT-2's fused projection, ``(h, 3h)`` and ``(3h,)``, into the three of a Lens."""
    assert isinstance(attention, LensAttention)
    query, key, value = weight.chunk(3, dim=1)
    query_bias, _, value_bias = bias.chunk(3)
    attention.query.weight.copy_(query)
    attention.query.bias.copy_(query_bias)
    attention.key.approximate(key.mT)
    attention.value.approximate(value.mT)
    attention.c_proj.bias.add_(value_bias @ attention.c_proj.weight)
