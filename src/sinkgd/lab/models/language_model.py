"""The base class of language models, and what the models share: drawn weights and statistics.

Shapes, everywhere in this file:
    b: sequences in the batch
    t: tokens in a sequence
    h: hidden size
    a: attention heads
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

# Maps the last hidden states (b, t, h) and the output head to the model's result.
Readout = Callable[[Tensor, nn.Module], Tensor]


class ModelError(ValueError):
    """A model that cannot be built or read, or cannot run on the given tokens."""


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
        """Number of blocks."""

    @property
    def num_heads(self) -> int:
        """Attention heads per block."""

    @property
    def max_sequence_length(self) -> int:
        """Tokens in the longest sequence."""

    @property
    def linear_parameter_count(self) -> int:
        """Number of weights in the blocks' matrices, which methods like SinkGD update."""

    @property
    def parameter_count(self) -> int:
        """Number of all weights; tied weights count once."""


class LanguageModel(nn.Module, ABC):
    """A decoder: embeddings, blocks, a last norm and a head over the vocabulary.

    A model made on the meta device has no weights until ``to_empty`` gives it a device and
    `initialize` draws them. Before ``to_empty``, it can be sharded over devices.
    """

    config: Sizes
    lm_head: nn.Linear

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order; each maps hidden states ``(b, t, h)`` to hidden states."""

    @property
    @abstractmethod
    def recompute(self) -> bool:
        """Whether to keep only the input of each block, and run the block again in backward."""

    @recompute.setter
    @abstractmethod
    def recompute(self, value: bool) -> None: ...

    @abstractmethod
    def initialize(self, seed: int) -> Self:
        """Draw all weights, on the CPU and in float32, and return the model."""

    @abstractmethod
    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(b, t)`` to the hidden states that the head reads, ``(b, t, h)``."""

    def forward(self, tokens: Tensor, readout: Readout | None = None) -> Tensor:
        """Return the logits of each next token.

        Args:
            tokens: Token ids, ``(b, t)``, integers below the vocabulary size.
            readout: Computes the result from the last hidden states ``(b, t, h)`` and the head; by
                default the logits, all at once.

        Returns:
            Logits, ``(b, t, vocab_size)``; those at position i see tokens 0 to i. If ``readout`` is
            given, its result instead.

        Raises:
            ModelError: If ``tokens`` has another shape, or t exceeds ``max_sequence_length``.
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
        """Set the values of the model's own schedules, if it has any.

        A trainer calls this before every step and every evaluation. The values depend on the
        arguments alone, so a resumed run needs no other state.

        Args:
            step: Optimizer steps taken so far, 0 before the first.
            steps: Optimizer steps of the whole run.
        """

    def statistics(self, tokens: Tensor) -> dict[str, float]:
        """Return statistics of the model's inner workings on some tokens, by name; here none.

        Args:
            tokens: ``(b, t)``.
        """
        del tokens
        return {}


def check_positive(sizes: object) -> None:
    """Check that all sizes of a configuration that are numbers are positive.

    Raises:
        ModelError: If one is not; the message gives its name and value.
    """
    for name, value in vars(sizes).items():
        if type(value) in (int, float) and value <= 0:
            raise ModelError(f"{name} must be positive, got {value}")


def materialize(model: LanguageModel, device: torch.device, seed: int) -> None:
    """Give a model made on the meta device its weights, unless ``device`` is meta, too."""
    if device.type != "meta":
        model.to_empty(device=device).initialize(seed)


_CHUNK = 1 << 22  # entries drawn at a time, a multiple of 16


def draw_normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill a weight with normal numbers of mean 0.

    A bfloat16 weight gets the float32 draw, rounded. If the weight is sharded, each rank gets its
    shard of the whole draw.

    Args:
        weight: Contiguous or sharded, of any shape, dtype and device; filled in place.
        std: Standard deviation.
        generator: A generator on the CPU.
    """
    if isinstance(weight, DTensor):
        whole = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
        _draw_in_chunks(whole, std, generator)
        set_weight(weight, whole)
    else:
        _draw_in_chunks(weight, std, generator)


def set_weight(weight: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a weight; if the weight is sharded, each rank copies its shard."""
    if isinstance(weight, DTensor):
        layout = weight.device_mesh, weight.placements
        whole = distribute_tensor(whole.to(weight.dtype), *layout, src_data_rank=None)
    with torch.no_grad():
        weight.copy_(whole)


def _draw_in_chunks(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill a weight in float32 chunks of 16 MiB; the numbers equal those of a single draw."""
    # torch draws sixteen numbers at a time. If the number of entries is not a multiple of sixteen,
    # it draws the last sixteen in another way. So a remainder below sixteen is joined to the chunk
    # before it.
    flat = weight.view(-1)
    starts = range(0, max(1, len(flat) - 15), _CHUNK)
    for start, end in zip(starts, (*starts[1:], len(flat)), strict=True):
        draw = torch.empty(end - start, dtype=torch.float32, device="cpu")
        flat[start:end].copy_(draw.normal_(0.0, std, generator=generator))


Statistics = dict[str, Tensor]  # of one block, by name: one value per head, or a single one


def attention_entropy(logits: Tensor) -> Tensor:
    r"""Return the entropy of causal attention, the mean over queries.

    .. math::
        H = -\frac1t \sum_{i} \sum_{j \le i} p_{ij} \ln p_{ij}, \qquad p_i = \mathrm{softmax}(s_i)

    The first query sees one token, so its entropy is 0; that of query i is at most ln i.

    Args:
        logits: Logits before the mask, ``(..., t, t)``, queries by keys.

    Returns:
        Nats, ``(...)``, in float32.

    Examples:
        >>> attention_entropy(torch.zeros(2, 2))  # half of ln 2: the first query has no choice
        tensor(0.3466)
    """
    future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
    weights = logits.float().masked_fill(future, -torch.inf).softmax(-1)
    entropies: Tensor = torch.special.entr(weights).sum(-1)
    return entropies.mean(-1)


def reciprocity(scores: Tensor) -> Tensor:
    """Return the correlation of attention scores with their transpose.

    It is Pearson's correlation of the scores below the diagonal, ``S[i, j]`` with j < i, with their
    mirror images ``S[j, i]``: 1 for symmetric scores, -1 for scores antisymmetric around their
    means, near 0 if the two directions are independent, and 0 if there is nothing to correlate.

    Args:
        scores: ``(..., t, t)``, before mask and softmax.

    Returns:
        ``(...)``, from -1 to 1, in float32.

    Examples:
        >>> reciprocity(torch.tensor([[0.0, 1, 2], [1, 0, 3], [2, 3, 0]]))
        tensor(1.0000)
    """
    t = scores.shape[-1]
    i, j = torch.tril_indices(t, t, offset=-1, device=scores.device)
    ahead, back = scores.float()[..., i, j], scores.float()[..., j, i]
    ahead, back = ahead - ahead.mean(-1, keepdim=True), back - back.mean(-1, keepdim=True)
    return torch.nn.functional.cosine_similarity(ahead, back, dim=-1)


def summarize_statistics(blocks: Sequence[Statistics]) -> dict[str, float]:
    """Return mean, min and max of every statistic over all blocks, and the mean of each block.

    Args:
        blocks: The statistics of each block, under the same names.

    Examples:
        >>> blocks = [{"gate": torch.tensor([0.0, 1.0])}, {"gate": torch.tensor([5.0])}]
        >>> summary = summarize_statistics(blocks)
        >>> summary["gate/block_0"], summary["gate/min"], summary["gate/mean"], summary["gate/max"]
        (0.5, 0.0, 2.0, 5.0)
    """
    summary: dict[str, float] = {}
    for name in blocks[0]:
        every = torch.cat([block[name].float().flatten() for block in blocks])
        summary[f"{name}/mean"] = every.mean().item()
        summary[f"{name}/min"] = every.min().item()
        summary[f"{name}/max"] = every.max().item()
        for number, block in enumerate(blocks):
            summary[f"{name}/block_{number}"] = block[name].float().mean().item()
    return summary
