"""The gradient of all parameters as one vector: its length, cutting it to one, and its release."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import sinkgd
from sinkgd.distributed.all_reduce import all_reduce
from sinkgd.distributed.shards import is_dtensor, local, shard_groups
from sinkgd.exchange import run

_PIECE = 1 << 22  # entries


def norm_of(grad: Tensor) -> Tensor:
    """Return the l2 norm of this rank's piece, float32; torch copies what it reads, so in parts."""
    parts = torch.split(local(grad).detach().flatten(), _PIECE)
    own = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(own))
    return whole


def joint_norm(norms: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """Return the l2 norm of all gradients from those of this rank's pieces; a collective call.

    Args:
        norms: From `norm_of`.
        params: Whose gradients they are of; a DTensor says over which ranks its pieces lie.
    """
    if not any(map(is_dtensor, params)):
        return nn.utils.get_total_norm(norms)
    squares = torch.stack(list(norms)).double().square()
    groups = [shard_groups(param) for param in params]
    return run(all_reduce(squares, groups)).sum().sqrt()


def clip_gradient(model: nn.Module, largest_norm: float) -> Tensor:
    """Scale the gradient down to ``largest_norm`` if it is longer; return its norm before."""
    params = [param for param in model.parameters() if param.grad is not None]
    gradients = [param.grad for param in params if param.grad is not None]
    if not any(map(is_dtensor, params)):
        norm = nn.utils.get_total_norm(gradients)
    else:
        norm = joint_norm([norm_of(grad) for grad in gradients], params)
    if largest_norm < float("inf"):
        # As torch.nn.utils.clip_grads_with_norm_, which takes no norm besides a DTensor.
        scale = (largest_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(grad) for grad in gradients], scale)
    return norm


class ReleasedSteps:
    """Lets backward step and free each gradient, after it was measured.

    Args:
        optimizer: One that `sinkgd.GradientRelease` takes.
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
        """Let gradients add up inside."""
        return self._release.accumulate()

    def measured(self) -> tuple[Tensor, float]:
        """Return the norm of the whole gradient and the seconds in updates; begin anew.

        A collective call, where parameters lie in pieces.
        """
        found = joint_norm(list(self._norms.values()), list(self._norms)), self._seconds
        self._norms, self._seconds = {}, 0.0
        return found

    def _before(self, param: Tensor) -> None:
        assert param.grad is not None, "it was just accumulated"
        # Of micro-batches that add up, the last one is the whole.
        self._norms[param] = norm_of(param.grad)
        self._started = time.perf_counter()

    def _after(self, param: Tensor) -> None:
        del param
        self._seconds += time.perf_counter() - self._started


def _hook(params: list[Tensor], function: object) -> None:
    for param in params:
        param.register_post_accumulate_grad_hook(function)  # type: ignore[no-untyped-call]
