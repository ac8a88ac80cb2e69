"""The step inside backward, with what the record of a step needs: the norm, and the time."""

import time
from contextlib import AbstractContextManager

from torch import Tensor
from torch.optim import Optimizer

import sinkgd
from sinkgd.lab.train.gradient import joint_norm, norm_of


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
