"""The contract of a method: how it updates the parameters of a group.

A step of a method returns which gradients are finite. It leaves parameters with a non-finite
gradient unchanged.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sinkgd import kernels
from sinkgd.distributed.all_reduce import all_ranks_agree
from sinkgd.distributed.shards import local, shard_groups
from sinkgd.exchange import Computation, Steps, computation

Group = dict[str, Any]


class Slot(NamedTuple):
    """A parameter that has a gradient in this step."""

    name: str  # as the model calls it, or "parameter 3 of group 0"
    number: int  # the parameter's index among all parameters of the optimizer
    param: Tensor
    grad: Tensor
    finite: Tensor | None = None  # 0-dim bool: whether the gradient is finite, if that is known
    is_scratch: bool = False  # whether the step may overwrite the gradient
    # With momentum of updates, a step writes into the average of the updates, which is ``param``.
    # Then this is the weight.
    weight: Tensor | None = None


class Context(NamedTuple):
    """What a step knows besides the gradients."""

    states: MutableMapping[Tensor, dict[str, Any]]  # Optimizer.state; a lookup creates an entry
    loss_scale: Tensor | None = None  # 0-dim: a factor that the gradients contain
    overflow: Tensor | None = None  # 0-dim bool, on an accelerator: if True, nothing may be written
    sharers: int = 1  # the number of sharded groups in this step that share the scratch memory


class Need(NamedTuple):
    """What an option needs to have an effect: another option of the group that is not off."""

    switch: str
    off: object  # the value of ``switch`` that disables it
    remedy: str  # how to enable it: "a momentum above 0, e.g. momentum=0.95"


class Method(ABC):
    """How the parameters of a group are updated."""

    # The group options of the method, with their defaults.
    options: Mapping[str, Any]
    # Defaults of groups of this method, which take precedence over the optimizer's arguments.
    presets: Mapping[str, Any] = MappingProxyType({})
    # What some options need; `sinkgd.optim.dependent_options` refuses them without it.
    needs: Mapping[str, Need] = MappingProxyType({})
    # Options in which the method counts or remembers something; they are saved with the group.
    # Users do not set them.
    counters: ClassVar[frozenset[str]] = frozenset({"rounding_step"})
    # How many dimensions a parameter must have: 2 if the method is for matrices only.
    least_dims: int = 0
    # Whether the method treats every entry by itself; it then also works on flattened parameters.
    is_elementwise: ClassVar[bool] = False
    # Whether the method is for parameters that are not hidden matrices; no optimizer is named after
    # it.
    is_auxiliary: ClassVar[bool] = False
    # State whose size depends on options, and that a step makes anew if they have changed: its
    # name, and the side that is sized so: "row" or "column".
    resizable: Mapping[str, str] = MappingProxyType({})
    # Why parameters cannot be updated one by one, and what to do about it; None if they can.
    needs_all_gradients: ClassVar[str | None] = None

    @abstractmethod
    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Raise if ``param``, called ``name``, or an option of ``group`` cannot be handled."""

    def init_state(  # noqa: B027 - most methods have no state
        self, param: Tensor, group: Group, state: MutableMapping[str, Any]
    ) -> None:
        """Create the state of a parameter, as it is before the first step."""

    @abstractmethod
    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Computation[Tensor]:
        """Update the parameters of ``slots``, all of one group and on one device.

        The step is a computation for `sinkgd.exchange`, which runs all groups side by side.

        Returns:
            ``(slots,)`` bool, on their device: whether each gradient is finite. Parameters with a
            non-finite gradient are left unchanged.
        """

    def check_other_dtype(  # noqa: B027 - most methods take any
        self, name: str, param: Tensor, grad: Tensor, group: Group
    ) -> None:
        """Raise TypeError if the method cannot take a gradient of another dtype than ``param``.

        Called before anything is written.
        """

    def needs_scratch(self, group: Group) -> bool:  # noqa: ARG002 - part of the contract
        """Whether a sharded step of the group needs scratch memory for every parameter."""
        return False


@computation
def step_by_kind(
    kinds: Sequence[object],
    slots: Sequence[Slot],
    step: Callable[[list[Slot]], Computation[Tensor]],
) -> Steps[Tensor]:
    """Take a step for the slots of each kind, and return all flags in the order of ``slots``.

    Args:
        kinds: The kind of each slot.
        slots: The slots.
        step: The step for slots of one kind.
    """
    indices: dict[object, list[int]] = {}
    for i, kind in enumerate(kinds):
        indices.setdefault(kind, []).append(i)
    found: list[Tensor] = yield [step([slots[i] for i in own]) for own in indices.values()]
    flags: dict[int, Tensor] = {}
    for own, finite in zip(indices.values(), found, strict=True):
        flags.update(zip(own, finite.unbind(), strict=True))
    return torch.stack([flags[i] for i in range(len(slots))])


@computation
def are_finite(slots: Sequence[Slot]) -> Steps[Tensor]:
    """Return ``(slots,)`` bool: whether every entry of each gradient is finite, on all ranks."""
    if (known := known_finite(slots)) is not None:
        return known
    flags = _are_finite_here([local(slot.grad) for slot in slots])
    groups = [shard_groups(slot.grad) for slot in slots]
    if any(groups):
        flags = yield all_ranks_agree(flags, groups)
    return flags


def _are_finite_here(grads: Sequence[Tensor]) -> Tensor:
    nonempty = [grad for grad in grads if grad.numel() > 0]  # shards may be empty
    if not nonempty:
        return torch.ones(len(grads), dtype=torch.bool, device=grads[0].device)
    found = kernels.select("auto", nonempty[0].device).are_finite(nonempty)
    if len(nonempty) == len(grads):
        return found
    flags, true = iter(found.unbind()), torch.ones_like(found[0])
    return torch.stack([next(flags) if grad.numel() > 0 else true for grad in grads])


def known_finite(slots: Sequence[Slot]) -> Tensor | None:
    """Return ``(slots,)`` bool if the gradients were checked before, None otherwise."""
    flags = [slot.finite for slot in slots if slot.finite is not None]
    return torch.stack(flags) if flags else None


@computation
def are_zero(grads: Sequence[Tensor]) -> Steps[bool]:
    """Return whether every entry of all gradients is zero, on all ranks; waits for the device."""
    device = grads[0].device
    flags = torch.stack([~local(grad).any().to(device) for grad in grads])
    groups = [shard_groups(grad) for grad in grads]
    if any(groups):
        flags = yield all_ranks_agree(flags, groups)
    return bool(flags.all())
