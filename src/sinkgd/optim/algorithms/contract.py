"""What an algorithm of a parameter group is: a step in two halves, so that nothing is half done.

`Algorithm.read` looks at every gradient of a group and writes nothing; the optimizer then knows
whether any gradient is non-finite, and only then `Step.write` changes the parameters.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, Protocol

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
    loss_scale: Tensor | None  # 0-dim: the gradients are still multiplied by it


class Step(Protocol):
    """A group's step, half done: gradients read, nothing written."""

    @property
    def finite(self) -> Tensor:
        """``(slots,)`` bool: whether the gradient of each slot is finite throughout."""
        ...

    def write(self, allowed: Tensor | None) -> None:
        """Change the parameters; where ``allowed``, ``(slots,)`` bool, is False, leave it.

        None allows all.
        """
        ...


class Algorithm(Protocol):
    """How a parameter group is updated."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Its group options, with their defaults."""
        ...

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Raise where ``param``, called ``name``, or an option of ``group`` cannot be handled."""
        ...

    def read(self, slots: Sequence[Slot], group: Group, context: Context) -> Step:
        """Read the gradients of ``slots``, all of one group."""
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


def are_finite(grads: Sequence[Tensor]) -> Tensor:
    """Return ``(len(grads),)`` bool: whether every entry of each is finite."""
    return kernels.select("auto", grads[0].device).are_finite(grads)
