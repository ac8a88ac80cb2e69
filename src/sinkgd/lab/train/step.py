"""One optimizer step on one global batch, in as many micro-batches as it takes.

Shapes:
    b: sequences in a batch
    t: tokens in a sequence
    v: tokens in the vocabulary
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from sinkgd.lab.data import IGNORE_INDEX, Batch
from sinkgd.lab.train.config import RunConfig
from sinkgd.lab.train.device import arithmetic, synchronize


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient is NaN or infinite, with the step and the remedy."""


@dataclass(frozen=True)
class StepResult:
    """What a step measured, before the weights moved."""

    loss: float  # nats per token, the global batch's mean
    gradient_norm: float  # global l2 norm, before clipping
    optimizer_seconds: float  # in optimizer.step()


def take_step(
    model: nn.Module,
    optimizer: Optimizer,
    batch: Batch,
    config: RunConfig,
    device: torch.device,
    *,
    number: int,
) -> StepResult:
    """Add up the gradients of the micro-batches, clip them, step.

    Each micro-batch's loss is divided by the targets of the *global* batch, so the gradient is the
    same however the batch is cut and however its padding is spread.

    Args:
        model: Takes tokens ``(b, t)`` to logits ``(b, t, v)``.
        optimizer: Of the model's parameters.
        batch: The global batch.
        config: Resolved; its micro-batch size, precision and clipping count here.
        device: Of the model.
        number: Of the step, 1 for the first; an error names it.

    Raises:
        NonFiniteLossError: If loss or gradient is not finite; the weights are left as they were.
    """
    optimizer.zero_grad()
    loss = _accumulate_gradient(model, batch, config, device)
    norm = _clip_gradient(model, config.optimizer.clip_norm or math.inf)
    result_loss, result_norm = torch.stack([loss, norm.float()]).tolist()
    if not (math.isfinite(result_loss) and math.isfinite(result_norm)):
        raise NonFiniteLossError(
            f"step {number} has loss {result_loss} and gradient norm {result_norm}; training "
            "cannot go on. Start anew in another --out with a lower --optimizer.lr, a longer "
            "--training.warmup-fraction, or --training.precision float32"
        )
    synchronize(device)
    started = time.perf_counter()
    optimizer.step()
    synchronize(device)
    return StepResult(result_loss, result_norm, time.perf_counter() - started)


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


def _accumulate_gradient(
    model: nn.Module, batch: Batch, config: RunConfig, device: torch.device
) -> Tensor:
    inputs, targets = batch.inputs.to(device), batch.targets.to(device)
    scored = (targets != IGNORE_INDEX).sum()
    size = config.training.micro_batch_size or len(inputs)
    total = torch.zeros((), device=device)
    for rows in range(0, len(inputs), size):
        with arithmetic(config.training.precision, device):
            logits = model(inputs[rows : rows + size])
        loss = summed_loss(logits, targets[rows : rows + size]) / scored
        torch.autograd.backward(loss)
        total += loss.detach()
    return total


def _clip_gradient(model: nn.Module, largest_norm: float) -> Tensor:
    """Scale the gradient down to ``largest_norm`` if it is longer; return its norm before."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if largest_norm < math.inf:
        nn.utils.clip_grads_with_norm_(model.parameters(), largest_norm, norm)
    return norm
