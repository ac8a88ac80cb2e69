"""What an algorithm of a parameter group is: a step, which never writes what is not finite."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sinkgd import kernels

Group = dict[str, Any]


class Slot(NamedTuple):
    """A parameter that has a gradient in this step."""

    name: str  # as the model calls it, or "parameter 3 of group 0"
    number: int  # its place among all parameters of the optimizer
    param: Tensor
    grad: Tensor


class Context(NamedTuple):
    """What the optimizer knows beside the gradients."""

    states: MutableMapping[Tensor, dict[str, Any]]  # Optimizer.state; an entry is made when used
    loss_scale: Tensor | None = None  # 0-dim: the gradients are still multiplied by it
    overflow: Tensor | None = None  # 0-dim bool, on an accelerator: nothing may be written


class Algorithm(Protocol):
    """How a parameter group is updated."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Its group options, with their defaults."""
        ...

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Raise where ``param``, called ``name``, or an option of ``group`` cannot be handled."""
        ...

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Tensor:
        """Update the parameters of ``slots``, of one group and on one device.

        Returns:
            ``(slots,)`` bool, on their device: whether the gradient of each is finite throughout.
            The parameters of others were left as they were.
        """
        ...


def decay(group: Group) -> float | Tensor:
    """Return what decoupled weight decay leaves of a parameter: 1 − lr·λ."""
    if group["weight_decay"] == 0:
        return 1.0
    keep: float | Tensor = 1 - group["lr"] * group["weight_decay"]
    return keep


def descent(group: Group) -> float | Tensor:
    """Return the factor of the update: −lr, or +lr to maximize."""
    lr: float | Tensor = group["lr"]
    return lr if group["maximize"] else -lr


def are_finite(slots: Sequence[Slot]) -> Tensor:
    """Return ``(slots,)`` bool: whether every entry of each gradient is finite."""
    return kernels.select("auto", slots[0].grad.device).are_finite([slot.grad for slot in slots])


def allowed(finite: Tensor, context: Context) -> Tensor | None:
    """Return which parameters may be written, given which gradients are finite: ``(slots,)`` bool.

    None where all may, and that is known without waiting for a device.
    """
    if context.overflow is not None:
        return finite & ~context.overflow
    here = finite.is_cpu and not torch.compiler.is_compiling()
    return None if here and bool(finite.all()) else finite
