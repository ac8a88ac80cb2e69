"""The model's statistics and its loss on held-out text.

The loss is given in nats per token, as perplexity, in bits per byte, and as the perplexity that
GaLore's evaluator computes.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sinkgd.lab.data import Batch
from sinkgd.lab.models import LanguageModel
from sinkgd.lab.train.config import Precision
from sinkgd.lab.train.machine import arithmetic
from sinkgd.lab.train.mesh import Mesh
from sinkgd.lab.train.training_step import loss_of


@dataclass(frozen=True)
class Score:
    """A model's loss on a fixed set of targets: the mean, and as GaLore's evaluator computes it."""

    nats_per_token: float  # the mean over targets
    tokens: int  # number of targets that are scored, without padding
    galore_nats: float  # the result of `galore_mean`: the sum of n batch means, divided by n + 1

    @property
    def perplexity(self) -> float:
        """Return e to the power of the loss; infinite if that overflows."""
        return _exponential(self.nats_per_token)

    @property
    def galore_perplexity(self) -> float:
        """Return the perplexity that GaLore's evaluator would print.

        In the C4 benchmark it is 0.6 to 3 % below the true one; with fewer batches the
        difference is larger.
        """
        return _exponential(self.galore_nats)

    def bits_per_byte(self, tokens_per_byte: float) -> float:
        """Return the bits that the model spends on a byte of text.

        Unlike nats per token, they are comparable between tokenizers.

        Args:
            tokens_per_byte: Tokens per byte of the text, which depend on the tokenizer.
        """
        return self.nats_per_token / math.log(2) * tokens_per_byte


def galore_mean(nats: Sequence[float], tokens: Sequence[int], rows: Sequence[int]) -> float:
    r"""Average as GaLore's evaluator does: by batch, not by token, and over one batch too many.

    For n batches with summed losses :math:`s_i` on :math:`t_i` targets the average is

    .. math::
        \frac{1}{n + 1} \sum_{i=1}^n \frac{s_i}{t_i}

    The batch counter of GaLore's evaluator starts at 1. A last batch with fewer rows, which never
    occurs in that evaluator, is weighted by its fraction of a batch in the sum and in the count.

    Args:
        nats: Summed loss of each batch.
        tokens: Number of targets in each batch, at least one.
        rows: Number of sequences in each batch; the first batch is complete.

    Examples:
        >>> galore_mean(nats=[30.0, 10.0], tokens=[10, 5], rows=[4, 4])  # (3 + 2) / (2 + 1)
        1.6666666666666667

    References:
        Zhao et al. 2024, ``evaluate_model`` in ``torchrun_main.py`` of
        https://github.com/jiaweizzhao/GaLore
    """
    parts = [own / rows[0] for own in rows]
    means = [total / count for total, count in zip(nats, tokens, strict=True)]
    weighted = sum(part * mean for part, mean in zip(parts, means, strict=True))
    return weighted / (sum(parts) + 1)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    precision: Precision,
    mesh: Mesh,
    micro_batch_size: int | None = None,
    chunk_tokens: int | None = None,
) -> Score:
    """Score the model on every target of ``batches``.

    This is a collective call: each rank scores its rows of every batch.

    Args:
        model: A model that takes tokens ``(b, t)`` and a ``readout``, like `Llama`.
        batches: The same batches on every rank, each with at least one target; `galore_mean`
            averages over these batches.
        precision: Precision of the model's arithmetic.
        mesh: The ranks of the model.
        micro_batch_size: Sequences in one forward pass; None for a rank's whole part of a batch.
        chunk_tokens: Number of target tokens whose logits are in memory at once; None for those of
            a micro-batch.
    """
    model.eval()
    nats: list[float] = []
    tokens: list[int] = []
    rows: list[int] = []
    for batch in batches:
        own = batch.part(mesh.part, mesh.parts)
        size = micro_batch_size or len(own.inputs)
        loss = 0.0
        for inputs, targets in _split(own, size):
            scored = targets.to(mesh.device)
            with arithmetic(precision, mesh.device):
                loss += loss_of(model, inputs.to(mesh.device), scored, chunk_tokens).item()
        nats.append(loss)
        tokens.append(own.target_count)
        rows.append(len(batch.inputs))
    _back_to_training(model)
    sums = mesh.total(*nats, *tokens)
    nats, tokens = sums[: len(rows)], [int(count) for count in sums[len(rows) :]]
    return Score(sum(nats) / sum(tokens), sum(tokens), galore_mean(nats, tokens, rows))


def measure_statistics(
    model: LanguageModel, tokens: Tensor, *, precision: Precision, mesh: Mesh
) -> dict[str, float]:
    """Return a model's own statistics on some tokens; empty if the model has none.

    This is a collective call: each rank measures the same on the same tokens.

    Args:
        model: The model that is being trained.
        tokens: ``(b, t)``, the same on every rank; padding counts as text.
        precision: Precision of the model's arithmetic.
        mesh: The ranks of the model.
    """
    model.eval()
    with arithmetic(precision, mesh.device):
        values = model.statistics(tokens.to(mesh.device))
    _back_to_training(model)
    return values


def _split(batch: Batch, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(batch.inputs, rows), torch.split(batch.targets, rows), strict=True)


def _exponential(nats: float) -> float:
    return math.exp(nats) if nats < 709 else math.inf


def _back_to_training(model: nn.Module) -> None:
    model.train()
    if isinstance(model, FSDPModule):
        model.reshard()  # otherwise weights outside the blocks stay whole until the next backward
