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

    Args:
        model: Takes tokens ``(b, t)`` to logits ``(b, t, v)``, and a ``readout`` as `Llama` does.
        inputs: ``(b, t)``.
        targets: ``(b, t)``.
        chunk_tokens: Hold the logits of so many targets at once, and compute them again in
            backward; None holds all, and computes them once.
    """
    if chunk_tokens is None:
        return summed_loss(model(inputs), targets)

    def readout(hidden: Tensor, head: nn.Module) -> Tensor:
        def loss(states: Tensor, own: Tensor) -> Tensor:
            return summed_loss(head(states), own)

        pairs = zip(
            torch.split(hidden.flatten(0, 1), chunk_tokens),
            torch.split(targets.flatten(), chunk_tokens),
            strict=True,
        )
        return torch.stack(
            [checkpoint(loss, x[None], own[None], use_reentrant=False) for x, own in pairs]
        ).sum()

    total: Tensor = model(inputs, readout)
    return total
