"""One optimizer step on one global batch: loss, gradient, clipping or release, update.

The batch is split into micro-batches. The loss is cross-entropy in nats, computed for all
targets of a micro-batch together or in chunks of targets.

Shapes:
    b: sequences in a batch
    t: tokens in a sequence
    v: tokens in the vocabulary
    h: hidden size
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

import sinkgd
from sinkgd.distributed.all_reduce import all_reduce
from sinkgd.distributed.shards import is_dtensor, local, shard_groups
from sinkgd.exchange import run
from sinkgd.lab.data import IGNORE_INDEX, Batch
from sinkgd.lab.train.config import RunConfig
from sinkgd.lab.train.machine import arithmetic, synchronize
from sinkgd.lab.train.mesh import Mesh


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient is NaN or infinite; the message gives the step and the remedy."""


@dataclass(frozen=True)
class StepResult:
    """What a step measured."""

    loss: float  # nats per token, the mean over the global batch before the update
    gradient_norm: float  # global l2 norm, before clipping
    optimizer_seconds: float  # time in optimizer.step(), and in updates inside backward


def take_step(
    model: nn.Module,
    optimizer: Optimizer,
    batch: Batch,
    config: RunConfig,
    mesh: Mesh,
    *,
    number: int,
    released: "ReleasedSteps | None" = None,
) -> StepResult:
    """Accumulate the gradients of the micro-batches, clip them and step.

    Each micro-batch's loss is divided by the number of targets of the *global* batch, so the
    gradient does not depend on how the batch is split or where its padding lies.

    Args:
        model: A model that takes tokens ``(b, t)`` and a ``readout``, like `Llama`.
        optimizer: Optimizer of the model's parameters.
        batch: The global batch, or this rank's part of it.
        config: The resolved configuration; gives the micro-batch size, the precision and clipping.
        mesh: The ranks of the model; a step is a collective call.
        number: Number of the step, from 1, for error messages.
        released: The steps inside backward, if gradients are released; ``optimizer`` then only
            ends the step.

    Raises:
        NonFiniteLossError: If loss or gradient is not finite. Weights are then unchanged, unless
            gradients are released: weights with a finite gradient may then be updated already.
    """
    optimizer.zero_grad()
    hold_out = optimizer.hold_out if config.optimizer.cross_fit else None  # type: ignore[attr-defined]
    loss = _accumulate_gradient(model, batch, config, mesh, released, hold_out)
    if released is None:
        norm, update_seconds = clip_gradient(model, config.optimizer.clip_norm or math.inf), 0.0
    else:
        norm, update_seconds = released.measured()
    own_loss, result_norm = torch.stack([loss, norm.float()]).tolist()
    (result_loss,) = mesh.total(own_loss)
    if not (math.isfinite(result_loss) and math.isfinite(result_norm)):
        raise NonFiniteLossError(
            f"step {number} has loss {result_loss} and gradient norm {result_norm}; training "
            "cannot go on. Start anew in another --out with a lower --optimizer.lr, a larger "
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
    released: "ReleasedSteps | None",
    hold_out: Callable[[], None] | None,
) -> Tensor:
    """Run forward and backward; return this rank's part of the loss.

    ``hold_out`` is called between the first half of the micro-batches and the others.
    """
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
            torch.autograd.backward(loss * mesh.parts)  # FSDP2 divides by mesh.parts
        total += loss.detach()
        if hold_out is not None and rows // size + 1 == len(inputs) // size // 2:
            hold_out()
    return total


_PIECE = 1 << 22  # number of entries whose norm is computed at once


def norm_of(grad: Tensor) -> Tensor:
    """Return the l2 norm of this rank's shard of a gradient, in float32.

    The norm is computed piece by piece, so that torch makes a float32 copy of one piece only.
    """
    parts = torch.split(local(grad).detach().flatten(), _PIECE)
    own = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(own))
    return whole


def joint_norm(norms: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """Return the l2 norm of all gradients from the norms of this rank's shards.

    This is a collective call if a parameter is sharded.

    Args:
        norms: Results of `norm_of`.
        params: Parameters of these gradients; a DTensor gives the ranks that hold its shards.
    """
    if not any(map(is_dtensor, params)):
        return nn.utils.get_total_norm(norms)
    squares = torch.stack(list(norms)).double().square()
    groups = [shard_groups(param) for param in params]
    return run(all_reduce(squares, groups)).sum().sqrt()


def clip_gradient(model: nn.Module, largest_norm: float) -> Tensor:
    """Scale the gradient down if its norm exceeds ``largest_norm``; return the norm before."""
    params = [param for param in model.parameters() if param.grad is not None]
    gradients = [param.grad for param in params if param.grad is not None]
    if not any(map(is_dtensor, params)):
        norm = nn.utils.get_total_norm(gradients)
    else:
        norm = joint_norm([norm_of(grad) for grad in gradients], params)
    if largest_norm < float("inf"):
        # torch.nn.utils.clip_grads_with_norm_ does the same, but with DTensors it does not accept a
        # norm that is a plain tensor.
        scale = (largest_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(grad) for grad in gradients], scale)
    return norm


class ReleasedSteps:
    """Applies and frees each gradient inside backward, after measuring its norm.

    Args:
        optimizer: An optimizer that `sinkgd.GradientRelease` accepts.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        # Hooks of a parameter run in the order in which they were registered.
        self._norms: dict[Tensor, Tensor] = {}
        self._seconds, self._started = 0.0, 0.0
        _hook(params, self._before)
        self._release = sinkgd.GradientRelease(optimizer)  # type: ignore[arg-type]
        _hook(params, self._after)

    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context in which gradients accumulate, and none is applied."""
        return self._release.accumulate()

    def measured(self) -> tuple[Tensor, float]:
        """Return the norm of the whole gradient and the seconds of updates, and reset both.

        This is a collective call if parameters are sharded.
        """
        found = joint_norm(list(self._norms.values()), list(self._norms)), self._seconds
        self._norms, self._seconds = {}, 0.0
        return found

    def _before(self, param: Tensor) -> None:
        assert param.grad is not None, "it was just accumulated"
        # Every micro-batch calls this; the last one has the whole gradient, and replaces the norm.
        self._norms[param] = norm_of(param.grad)
        self._started = time.perf_counter()

    def _after(self, param: Tensor) -> None:
        del param
        self._seconds += time.perf_counter() - self._started


def _hook(params: list[Tensor], function: object) -> None:
    for param in params:
        param.register_post_accumulate_grad_hook(function)  # type: ignore[no-untyped-call]


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy in nats, in float32 whatever the logits' type.

    Args:
        logits: ``(b, t, v)``.
        targets: ``(b, t)``; positions with `IGNORE_INDEX` are not scored.
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

    The loss is computed inside the model's forward, where FSDP2 has gathered the head's weights.

    Args:
        model: A model that takes tokens and a ``readout``, like `Llama`.
        inputs: ``(b, t)``.
        targets: ``(b, t)``.
        chunk_tokens: Number of target tokens whose logits are in memory at once; they are
            recomputed in backward. None keeps the logits of all targets and computes them once.
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
