"""What an algorithm of a parameter group is: a step, which never writes what is not finite."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sinkgd import kernels
from sinkgd.exchange import Computation, Steps, computation

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Group = dict[str, Any]
Kind = TypeVar("Kind")


class Slot(NamedTuple):
    """A parameter that has a gradient in this step."""

    name: str  # as the model calls it, or "parameter 3 of group 0"
    number: int  # its place among all parameters of the optimizer
    param: Tensor
    grad: Tensor
    finite: Tensor | None = None  # 0-dim bool: whether it may count as finite, where that is known
    is_scratch: bool = False  # whether the gradient may be used up


class Context(NamedTuple):
    """What the optimizer knows beside the gradients."""

    states: MutableMapping[Tensor, dict[str, Any]]  # Optimizer.state; an entry is made when used
    loss_scale: Tensor | None = None  # 0-dim: the gradients are still multiplied by it
    overflow: Tensor | None = None  # 0-dim bool, on an accelerator: nothing may be written
    sharers: int = 1  # groups on a mesh that need scratch in this step, and share what there is


class Algorithm(Protocol):
    """How a parameter group is updated."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Its group options, with their defaults."""
        ...

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Raise where ``param``, called ``name``, or an option of ``group`` cannot be handled."""
        ...

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Make the state that a first step would, as it is before that step."""
        ...

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Computation[Tensor]:
        """Update the parameters of ``slots``, of one group and on one device.

        A computation for `sinkgd.exchange`: all groups of a step run side by side.

        Returns:
            ``(slots,)`` bool, on their device: whether the gradient of each is finite throughout.
            The parameters of others were left as they were.
        """
        ...


def on_mesh(x: Tensor) -> "TypeGuard[DTensor]":
    """Whether ``x`` is a DTensor; to find out, torch.distributed is not imported."""
    return hasattr(x, "device_mesh")


def local(x: Tensor) -> Tensor:
    """Return what this rank holds of ``x``: all of it, unless it is a DTensor."""
    return x.to_local() if on_mesh(x) else x


def has_values(x: Tensor) -> bool:
    """Whether ``x`` has values, or will when a compiled step runs: it is no meta or fake tensor."""
    here = local(x)
    return torch.compiler.is_compiling() or not (here.is_meta or isinstance(here, FakeTensor))


def most_held(x: Tensor) -> int:
    """Return how many entries of ``x`` a rank holds at most: all ranks return the same."""
    return prod(most_held_shape(x))


def most_held_shape(x: Tensor) -> list[int]:
    """Return how long each dimension of ``x`` is on a rank at most: all ranks return the same."""
    sizes = list(x.shape)
    if on_mesh(x):
        for place, ranks in zip(x.placements, x.device_mesh.shape, strict=True):
            if (dim := getattr(place, "dim", None)) is not None:
                sizes[dim] = -(-sizes[dim] // ranks)
    return sizes


def in_pieces(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor that a mesh dimension shards."""
    return on_mesh(x) and any(hasattr(place, "dim") for place in x.placements)


def check_whole(name: str, param: Tensor, needs: str) -> None:
    """Refuse a parameter that lies in pieces, where ``needs`` says what needs it whole.

    Raises:
        TypeError: If a mesh dimension shards it.
    """
    if on_mesh(param) and in_pieces(param):
        raise TypeError(
            f"{name!r} is sharded ({param.placements}), and {needs} whole matrices; "
            "use algorithm='sinkgd', or Replicate it"
        )


@computation
def step_by(
    kind_of: Callable[[Slot], Kind],
    slots: Sequence[Slot],
    step: Callable[[Kind, list[Slot]], Computation[Tensor]],
) -> Steps[Tensor]:
    """Take the steps of the slots of each kind, and return the flags of all, as they are."""
    places: dict[Kind, list[int]] = {}
    for i, slot in enumerate(slots):
        places.setdefault(kind_of(slot), []).append(i)
    found: list[Tensor] = yield [
        step(kind, [slots[i] for i in own]) for kind, own in places.items()
    ]
    if len(found) == 1:
        return found[0]
    flags: dict[int, Tensor] = {}
    for own, finite in zip(places.values(), found, strict=True):
        flags.update(zip(own, finite.unbind(), strict=True))
    return torch.stack([flags[i] for i in range(len(slots))])


def learning_rate(group: Group) -> float | Tensor:
    """Return the learning rate: a number, or a tensor without dimensions."""
    lr: float | Tensor = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


def decay(group: Group) -> float | Tensor:
    """Return what decoupled weight decay leaves of a parameter: 1 − lr·λ."""
    if group["weight_decay"] == 0:
        return 1.0
    keep: float | Tensor = 1 - learning_rate(group) * group["weight_decay"]
    return keep


def descent(group: Group) -> float | Tensor:
    """Return the factor of the update: −lr, or +lr to maximize."""
    lr = learning_rate(group)
    return lr if group["maximize"] else -lr


@computation
def are_finite(slots: Sequence[Slot]) -> Steps[Tensor]:
    """Return ``(slots,)`` bool: whether every entry of each gradient is finite, on all ranks."""
    if (known := known_flags(slots)) is not None:
        return known
    flags = _are_finite_here(slots)
    if any(on_mesh(slot.grad) for slot in slots):
        from sinkgd import sharded  # noqa: PLC0415 - it imports torch.distributed

        grads = [slot.grad for slot in slots]
        groups = [sharded.groups_of(grad) if on_mesh(grad) else () for grad in grads]
        flags = yield sharded.agree(flags, groups)
    return flags


def _are_finite_here(slots: Sequence[Slot]) -> Tensor:
    grads = [local(slot.grad) for slot in slots]
    held = [grad for grad in grads if grad.numel() > 0]  # a rank may hold nothing
    if not held:
        return torch.ones(len(grads), dtype=torch.bool, device=grads[0].device)
    found = kernels.select("auto", held[0].device).are_finite(held)
    if len(held) == len(grads):
        return found
    flags, true = iter(found.unbind()), torch.ones_like(found[0])
    return torch.stack([next(flags) if grad.numel() > 0 else true for grad in grads])


@computation
def are_zero(grads: Sequence[Tensor]) -> Steps[bool]:
    """Whether every entry of all gradients is zero, on all ranks. Waits for their device."""
    device = grads[0].device
    flags = torch.stack([~local(grad).any().to(device) for grad in grads])
    if any(on_mesh(grad) for grad in grads):
        from sinkgd import sharded  # noqa: PLC0415 - it imports torch.distributed

        groups = [sharded.groups_of(x) if on_mesh(x) else () for x in grads]
        flags = yield sharded.agree(flags, groups)
    return bool(flags.all())


def known_flags(slots: Sequence[Slot]) -> Tensor | None:
    """Return ``(slots,)`` bool where somebody has looked through the gradients, None elsewhere."""
    flags = [slot.finite for slot in slots if slot.finite is not None]
    return torch.stack(flags) if flags else None


def allowed(finite: Tensor, context: Context) -> Tensor | None:
    """Return which parameters may be written, given which gradients are finite: ``(slots,)`` bool.

    None where all may, and that is known without waiting for a device.
    """
    if context.overflow is not None:
        return finite & ~context.overflow
    here = finite.is_cpu and not torch.compiler.is_compiling()
    return None if here and bool(finite.all()) else finite
