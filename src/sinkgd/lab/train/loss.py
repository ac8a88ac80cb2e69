"""The loss: cross-entropy in nats, whole or in chunks of targets.

Shapes:
    b: sequences in a batch
    t: tokens in a sequence
    v: tokens in the vocabulary
    h: hidden size
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from sinkgd.lab.data import IGNORE_INDEX


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy in nats, in float32 whatever the logits' type.

    Args:
        logits: ``(b, t, v)``.
        targets: ``(b, t)``; where it is `IGNORE_INDEX` nothing is scored.
    """
    return cross_entropy(
        logits.float().flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )


def loss_of(
    model: nn.Module, inputs: Tensor, targets: Tensor, chunk_tokens: int | None = None
) -> Tensor:
    """Return the summed loss of a model on tokens.

    The loss is made inside the model's forward, so that a model in pieces still has the head whole.

    Args:
        model: Called with tokens and a ``readout``, as `Llama` is.
        inputs: ``(b, t)``.
        targets: ``(b, t)``.
        chunk_tokens: Hold the logits of so many targets at once, and compute them again in
            backward; None holds all, and computes them once.
    """

    def readout(hidden: Tensor, head: nn.Module) -> Tensor:
        if chunk_tokens is None:
            return summed_loss(head(hidden), targets)
        return _loss_in_chunks(hidden, targets, head, chunk_tokens)

    total: Tensor = model(inputs, readout)
    return total


def _loss_in_chunks(hidden: Tensor, targets: Tensor, head: nn.Module, size: int) -> Tensor:
    def loss(states: Tensor, own: Tensor) -> Tensor:
        return summed_loss(head(states), own)

    pairs = zip(
        torch.split(hidden.flatten(0, 1), size), torch.split(targets.flatten(), size), strict=True
    )
    parts = [checkpoint(loss, x[None], own[None], use_reentrant=False) for x, own in pairs]
    return torch.stack(parts).sum()
