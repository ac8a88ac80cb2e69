"""One optimizer step on one global batch, in as many micro-batches as it takes.

Shapes:
    b: sequences in a batch
    t: tokens in a sequence
    v: tokens in the vocabulary
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sinkgd.lab.data import IGNORE_INDEX, Batch
from sinkgd.lab.train.config import RunConfig
from sinkgd.lab.train.device import arithmetic, synchronize
from sinkgd.lab.train.loss import loss_of
from sinkgd.lab.train.release import ReleasedSteps


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
    released: ReleasedSteps | None = None,
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
        released: What steps inside backward, if anything does; ``optimizer`` then ends the step.

    Raises:
        NonFiniteLossError: If loss or gradient is not finite; the weights are left as they were,
            or, where gradients are released, those whose gradient is not finite.
    """
    optimizer.zero_grad()
    loss = _accumulate_gradient(model, batch, config, device, released)
    if released is None:
        norm, update_seconds = _clip_gradient(model, config.optimizer.clip_norm or math.inf), 0.0
    else:
        norm, update_seconds = released.measured()
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
    return StepResult(result_loss, result_norm, update_seconds + time.perf_counter() - started)


def _accumulate_gradient(
    model: nn.Module,
    batch: Batch,
    config: RunConfig,
    device: torch.device,
    released: ReleasedSteps | None,
) -> Tensor:
    training = config.training
    inputs, targets = batch.inputs.to(device), batch.targets.to(device)
    scored = (targets != IGNORE_INDEX).sum()
    size = training.micro_batch_size or len(inputs)
    total = torch.zeros((), device=device)
    for rows in range(0, len(inputs), size):
        own = slice(rows, rows + size)
        with arithmetic(training.precision, device):
            summed = loss_of(model, inputs[own], targets[own], training.loss_chunk_tokens)
        loss = summed / scored
        last = rows + size >= len(inputs)
        with nullcontext() if released is None or last else released.accumulate():
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
