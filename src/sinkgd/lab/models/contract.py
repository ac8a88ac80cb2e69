"""What a model is to those who train it: tokens in, logits or a loss out, weights from a seed.

Shapes, everywhere in this file:
    b: sequences in the batch
    t: tokens in a sequence
    h: hidden size
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

_PIECE = 1 << 22  # entries, a multiple of 16


def draw_normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill a weight with normal numbers of mean 0.

    One in bfloat16 gets the float32 draw, rounded; of one that lies in pieces on several devices,
    each has its piece of the whole draw.

    Args:
        weight: Of any shape, dtype and device; filled in place.
        std: Standard deviation.
        generator: On the CPU.
    """
    if isinstance(weight, DTensor):
        whole = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
        _draw_in_pieces(whole, std, generator)
        set_whole(weight, whole)
    else:
        _draw_in_pieces(weight, std, generator)


def set_whole(weight: Tensor, whole: Tensor) -> None:
    """Copy a tensor into a weight, or each rank's piece of it where the weight lies in pieces."""
    if isinstance(weight, DTensor):
        lie = weight.device_mesh, weight.placements
        whole = distribute_tensor(whole.to(weight.dtype), *lie, src_data_rank=None)
    with torch.no_grad():
        weight.copy_(whole)


def _draw_in_pieces(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill a weight, in float32 pieces of 16 MiB: the numbers are those of one draw."""
    # torch draws by sixteens; fewer entries, or the last sixteen of an uneven draw, come otherwise,
    # so the last piece takes them along
    flat = weight.view(-1)
    starts = range(0, max(1, len(flat) - 15), _PIECE)
    for start, end in zip(starts, (*starts[1:], len(flat)), strict=True):
        draw = torch.empty(end - start, dtype=torch.float32, device="cpu")
        flat[start:end].copy_(draw.normal_(0.0, std, generator=generator))


# From the last hidden states (b, t, h) and the output head to what is asked for.
Readout = Callable[[Tensor, nn.Module], Tensor]


class ModelError(ValueError):
    """A model that cannot be built, or cannot be run on the tokens it was given."""


class Sizes(Protocol):
    """The sizes that every model has."""

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, h."""

    @property
    def intermediate_size(self) -> int:
        """Width inside the MLP."""

    @property
    def num_layers(self) -> int:
        """Blocks."""

    @property
    def num_heads(self) -> int:
        """Attention heads of a block."""

    @property
    def max_sequence_length(self) -> int:
        """Tokens of the longest sequence."""

    @property
    def linear_parameter_count(self) -> int:
        """Weights of the blocks' matrices, those that a matrix norm fits."""

    @property
    def parameter_count(self) -> int:
        """All weights, tied ones once."""


class LanguageModel(nn.Module, ABC):
    """A decoder: embeddings, blocks, a last norm and a head over the vocabulary.

    A model made on the meta device has no weights until ``to_empty`` gives it a device and
    `initialize` its weights, so that it may be divided among devices in between.
    """

    config: Sizes
    lm_head: nn.Linear

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The blocks, in their order; each maps hidden states ``(b, t, h)`` to such."""

    @property
    @abstractmethod
    def recompute(self) -> bool:
        """Whether only the input of a block is kept, and the block run again in backward."""

    @recompute.setter
    @abstractmethod
    def recompute(self, value: bool) -> None: ...

    @abstractmethod
    def initialize(self, seed: int) -> Self:
        """Draw every weight anew, on the CPU and in float32, and return the model."""

    @abstractmethod
    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Return what the head reads, ``(b, t, h)``, of tokens ``(b, t)``."""

    def forward(self, tokens: Tensor, readout: Readout | None = None) -> Tensor:
        """Return the logits of each next token.

        Args:
            tokens: Token ids, ``(b, t)``, integers below the vocabulary size.
            readout: What is made of the last hidden states ``(b, t, h)`` and the head; by default
                the logits, all at once.

        Returns:
            Logits, ``(b, t, vocab_size)``; those at position i see tokens 0 to i. Or what
            ``readout`` returns.

        Raises:
            ModelError: If ``tokens`` has another shape, or t is over ``max_sequence_length``.
        """
        if tokens.ndim != 2:
            raise ModelError(f"tokens must have shape (batch, time), got {tuple(tokens.shape)}")
        limit = self.config.max_sequence_length
        if tokens.shape[1] > limit:
            raise ModelError(
                f"a sequence of {tokens.shape[1]} tokens is longer than the model's "
                f"max_sequence_length of {limit}; shorten it or build the model with more"
            )
        hidden = self.hidden_states(tokens)
        if readout is not None:
            return readout(hidden, self.lm_head)
        logits: Tensor = self.lm_head(hidden)
        return logits

    def at_step(self, step: int, steps: int) -> None:
        """Take the values of the schedules that are part of the model, if it has any.

        A trainer calls it before every step and every evaluation. What it sets follows from its
        arguments alone, so that a run that goes on needs nothing else.

        Args:
            step: Optimizer steps taken so far, 0 before the first.
            steps: Optimizer steps of the whole run.
        """

    def statistics(self, tokens: Tensor) -> dict[str, float]:
        """Return figures of the model's inner workings on some tokens, by name; here none.

        Args:
            tokens: ``(b, t)``.
        """
        del tokens
        return {}


def check_positive(sizes: object) -> None:
    """Refuse a size of a configuration that is not positive.

    Raises:
        ModelError: With the name and the value.
    """
    for name, value in vars(sizes).items():
        if value <= 0:
            raise ModelError(f"{name} must be positive, got {value}")


def materialize(model: LanguageModel, device: torch.device, seed: int) -> None:
    """Give a model that was made on the meta device its weights, unless ``device`` is meta too."""
    if device.type != "meta":
        model.to_empty(device=device).initialize(seed)
