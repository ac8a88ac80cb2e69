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

from sinkgd.lab.data import Batch
from sinkgd.lab.train.config import RunConfig
from sinkgd.lab.train.device import arithmetic, synchronize
from sinkgd.lab.train.gradient import ReleasedSteps, clip_gradient
from sinkgd.lab.train.loss import loss_of
from sinkgd.lab.train.parallel import Mesh


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
    mesh: Mesh,
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
        batch: The global batch, or this rank's part of it.
        config: Resolved; its micro-batch size, precision and clipping count here.
        mesh: Where the model lies; a step is collective.
        number: Of the step, 1 for the first; an error names it.
        released: What steps inside backward, if anything does; ``optimizer`` then ends the step.

    Raises:
        NonFiniteLossError: If loss or gradient is not finite; the weights are left as they were,
            or, where gradients are released, those whose gradient is not finite.
    """
    optimizer.zero_grad()
    loss = _accumulate_gradient(model, batch, config, mesh, released)
    if released is None:
        norm, update_seconds = clip_gradient(model, config.optimizer.clip_norm or math.inf), 0.0
    else:
        norm, update_seconds = released.measured()
    own_loss, result_norm = torch.stack([loss, norm.float()]).tolist()
    (result_loss,) = mesh.total(own_loss)
    if not (math.isfinite(result_loss) and math.isfinite(result_norm)):
        raise NonFiniteLossError(
            f"step {number} has loss {result_loss} and gradient norm {result_norm}; training "
            "cannot go on. Start anew in another --out with a lower --optimizer.lr, a longer "
            "--training.warmup-fraction, or --training.precision float32"
        )
    synchronize(mesh.device)
    started = time.perf_counter()
    optimizer.step()
    synchronize(mesh.device)
    return StepResult(result_loss, result_norm, update_seconds + time.perf_counter() - started)


def _accumulate_gradient(
    model: nn.Module,
    batch: Batch,
    config: RunConfig,
    mesh: Mesh,
    released: ReleasedSteps | None,
) -> Tensor:
    """Return this rank's part of the loss; gradients lie in the parameters, or are gone."""
    training, device = config.training, mesh.device
    inputs, targets = batch.inputs.to(device), batch.targets.to(device)
    (scored,) = mesh.total(batch.target_count)
    size = min(training.micro_batch_size or len(inputs), len(inputs))
    total = torch.zeros((), dtype=torch.float32, device=device)
    for rows in range(0, len(inputs), size):
        own = slice(rows, rows + size)
        with arithmetic(training.precision, device):
            summed = loss_of(model, inputs[own], targets[own], training.loss_chunk_tokens)
        loss = summed / scored
        last = rows + size >= len(inputs)
        with nullcontext() if released is None or last else released.accumulate():
            torch.autograd.backward(loss * mesh.parts)  # FSDP2 takes the mean over parts
        total += loss.detach()
    return total
