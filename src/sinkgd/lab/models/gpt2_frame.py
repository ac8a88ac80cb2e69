"""The frame of GPT-2, whatever its blocks: learned positions, a last norm, a tied head.

Shapes, everywhere in this file:
    b: sequences in the batch
    t: tokens in a sequence
    h: hidden size
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sinkgd.lab.models.contract import LanguageModel, ModelError, draw_normal, materialize
from sinkgd.lab.models.figures import Figures, summarize


@dataclass(frozen=True)
class FrameConfig(ABC):
    """The sizes that models in GPT-2's frame have in common; defaults are GPT-2's.

    Raises:
        ModelError: If a size is not positive, or the heads do not divide the hidden size.
    """

    vocab_size: int  # tokens
    hidden_size: int  # h, width of the residual stream
    num_layers: int
    num_heads: int
    max_sequence_length: int = 1024  # tokens, rows of the table of positions
    norm_eps: float = 1e-5  # added to the variance inside LayerNorm
    initializer_std: float = 0.02  # of weights, but of those that write to the residual stream

    def __post_init__(self) -> None:
        for name in FrameConfig.__dataclass_fields__:
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
        """Width inside the MLP, four times the residual stream's."""
        return 4 * self.hidden_size

    @property
    def residual_std(self) -> float:
        """Spread of the weights that write to the residual stream, of which a block has two."""
        return float(self.initializer_std / (2 * self.num_layers) ** 0.5)

    @property
    @abstractmethod
    def linear_parameter_count(self) -> int:
        """Weights of the blocks' matrices."""

    @property
    @abstractmethod
    def parameter_count(self) -> int:
        """All weights, the head once: it is the embedding."""

    @property
    def frame_parameter_count(self) -> int:
        """Weights outside the blocks, the head once: it is the embedding."""
        return (self.vocab_size + self.max_sequence_length + 2) * self.hidden_size


@runtime_checkable
class Drawn(Protocol):
    """A module that draws the weights it holds itself."""

    def draw(self, generator: torch.Generator) -> None:
        """Draw the weights anew."""


class Frame(LanguageModel):
    """Embeddings, blocks of some kind, last norm and tied head.

    Args:
        config: The sizes.
        seed: Seed of the weights.
    """

    config: FrameConfig

    def __init__(self, config: FrameConfig, *, seed: int = 0) -> None:
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
        """Return a block: hidden states ``(b, t, h)`` and `block_arguments` to hidden states."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in their order."""
        return self.transformer.h

    @property
    def recompute(self) -> bool:
        """Whether only the input of a block is kept, and the block run again in backward."""
        return self.transformer.recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self.transformer.recompute = value

    def initialize(self, seed: int) -> Self:
        """Draw every weight anew and return the model.

        Weights are normal with the config's standard deviation; those that write to the residual
        stream have it over √(2·layers). Biases are 0 and the weights of norms 1.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.weight.fill_(1.0)
                    module.bias.zero_()
                elif isinstance(module, nn.Embedding):
                    draw_normal(module.weight, self.config.initializer_std, generator)
                elif isinstance(module, Drawn):
                    module.draw(generator)
        return self

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Return what the head reads, ``(b, t, h)``, of tokens ``(b, t)``."""
        hidden: Tensor = self.transformer(tokens, self.block_arguments())
        return hidden

    def block_arguments(self) -> tuple[Any, ...]:
        """Return what each block is given beside the hidden states; here nothing."""
        return ()

    @torch.no_grad()
    def statistics(self, tokens: Tensor) -> dict[str, float]:
        """Return what each block's ``figures`` says of its input, summarized.

        Args:
            tokens: ``(b, t)``.

        Returns:
            For every figure its mean, least and largest value over all heads of all blocks, and the
            mean of each block: ``"attention_entropy/mean"``, ``"attention_entropy/block_0"``.
        """
        blocks: list[Figures] = []

        def observe(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            blocks.append(block.figures(inputs[0]))  # type: ignore[operator]

        # A hook runs where a block in pieces has just been put together.
        hooks = [block.register_forward_pre_hook(observe) for block in self.blocks]
        try:
            self(tokens, lambda hidden, _head: hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return summarize(blocks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # moving a module from the meta device makes a parameter anew in each of its places
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tie()
        return self

    def _tie(self) -> None:
        self.lm_head.weight = self.transformer.wte.weight


class _Body(nn.Module):
    """Everything below the head, under Hugging Face's names."""

    def __init__(self, config: FrameConfig, make_block: Callable[[], nn.Module]) -> None:
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
