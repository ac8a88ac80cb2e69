"""The model on held-out text: nats per token, perplexity, bits per byte."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sinkgd.lab.data import Batch
from sinkgd.lab.models import LanguageModel
from sinkgd.lab.train.config import Precision
from sinkgd.lab.train.device import arithmetic
from sinkgd.lab.train.loss import loss_of
from sinkgd.lab.train.parallel import Mesh


@dataclass(frozen=True)
class Score:
    """A model's loss on a fixed set of targets."""

    nats_per_token: float
    tokens: int  # targets scored, padding excluded

    @property
    def perplexity(self) -> float:
        """Return e to the loss; infinite where that is past what a float holds."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    def bits_per_byte(self, tokens_per_byte: float) -> float:
        """Return the bits that the model spends on a byte of text.

        Args:
            tokens_per_byte: Of the text's tokenizer, so that tokenizers can be compared.
        """
        return self.nats_per_token / math.log(2) * tokens_per_byte


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    precision: Precision,
    mesh: Mesh,
    chunk_tokens: int | None = None,
) -> Score:
    """Score the model on every target of ``batches``: the mean over tokens, not over batches.

    A collective call: each rank scores its rows of every batch.

    Args:
        model: Takes tokens ``(b, t)`` to logits ``(b, t, v)``.
        batches: The same on every rank.
        precision: In which the model runs.
        mesh: Where it lies.
        chunk_tokens: Targets whose logits are held at once; None holds those of a batch.
    """
    model.eval()
    nats, tokens = 0.0, 0
    for batch in batches:
        own = batch.part(mesh.part, mesh.parts)
        targets = own.targets.to(mesh.device)
        with arithmetic(precision, mesh.device):
            loss = loss_of(model, own.inputs.to(mesh.device), targets, chunk_tokens)
        nats += loss.item()
        tokens += own.target_count
    _back_to_training(model)
    nats, scored = mesh.total(nats, tokens)
    return Score(nats / scored, int(scored))


def measure_statistics(
    model: LanguageModel, tokens: Tensor, *, precision: Precision, mesh: Mesh
) -> dict[str, float]:
    """Return what the model says of its inner workings on some tokens; nothing, if it says nothing.

    A collective call: each rank measures the same on the same tokens.

    Args:
        model: In training.
        tokens: ``(b, t)``, the same on every rank; padding counts as text.
        precision: In which the model runs.
        mesh: Where it lies.
    """
    model.eval()
    with arithmetic(precision, mesh.device):
        values = model.statistics(tokens.to(mesh.device))
    _back_to_training(model)
    return values


def _back_to_training(model: nn.Module) -> None:
    model.train()
    if isinstance(model, FSDPModule):
        model.reshard()  # what lies outside the blocks would stay whole until the next backward
