"""How an update X is written: W ← (1 − lr·λ) W − lr X, rounded once, if the gradient is finite.

With ``cautious_decay``, λ applies only to entries of W that the step moves toward zero.

The change lr X of a bfloat16 weight is often smaller than half the distance to the next bfloat16.
Rounding to the nearest loses it in every step; stochastic rounding keeps it on average.
"""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sinkgd.distributed.shards import ParamMatrix, first_entry_of
from sinkgd.kernels import Cautious, Keep
from sinkgd.kernels.eager import apply_update_
from sinkgd.kernels.rounding import keys_of_step
from sinkgd.optim.method import Context, Group, Slot

ROUNDINGS = ("nearest", "stochastic")

# ``rounding_step`` counts the steps of a group, on the device of its parameters. `check_rounding`
# creates it. It is saved with the group, so that a resumed run draws the same bits as an
# uninterrupted one.
ROUNDING_STEP = "rounding_step"
ROUNDING_OPTIONS = MappingProxyType[str, object](
    {"rounding": "nearest", "seed": 0, ROUNDING_STEP: None}
)


class UpdateWriter:
    """Applies updates to the parameters of a step.

    Args:
        slots: The parameters.
        finite: ``(slots,)`` bool: whether the gradient of each slot is finite.
        group: The group of the parameters.
        context: The context of the step.
    """

    def __init__(
        self, slots: Sequence[Slot], finite: Tensor, group: Group, context: Context
    ) -> None:
        self._flags = allowed(finite, context)
        self._keys = draw_keys(slots, group)
        self._group, self._slots = group, slots

    def may_write(self, i: int) -> Tensor | None:
        """Return whether parameter ``i`` may be written: a 0-dim bool, or None for yes."""
        return None if self._flags is None else self._flags[i]

    def write_(self, i: int, param: Tensor, update: Tensor, first_entry: int | None = None) -> None:
        """Apply an update to parameter ``i``, or to a part of it.

        Args:
            i: The index of the slot.
            param: This rank's entries of the parameter, or a view of some.
            update: X, of the same shape; overwritten.
            first_entry: The index of the first entry of ``param`` among all entries of the
                parameter, for stochastic rounding; None if ``param`` has all entries of this rank.
        """
        key = None if self._keys is None else self._keys[i]
        if key is not None and first_entry is None:
            first_entry = first_entry_of(self._slots[i].param, self._group.get("layout", "auto"))
        apply_update_(
            param,
            update,
            # Not computed in __init__: torch.compile makes a graph for each value of an attribute.
            keep=decay_factor(self._group),
            step=step_factor(self._group),
            allowed=self.may_write(i),
            key=key + first_entry if key is not None and first_entry else key,
        )


def learning_rate(group: Group) -> float | Tensor:
    """Return the learning rate: a number, or a tensor without dimensions."""
    lr: float | Tensor = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


def decay_factor(group: Group) -> Keep:
    """Return the factor of a decayed parameter, 1 − lr·λ; with cautious decay, a `Cautious`."""
    if group["weight_decay"] == 0:
        return 1.0
    keep: float | Tensor = 1 - learning_rate(group) * group["weight_decay"]
    return Cautious(keep) if group["cautious_decay"] else keep


def decays_cautiously(group: Group) -> bool:
    """Whether the group decays parameters, but only entries that move toward zero."""
    return bool(group["cautious_decay"]) and group["weight_decay"] != 0


def step_factor(group: Group) -> float | Tensor:
    """Return the factor of an update: −lr, or +lr to maximize."""
    lr = learning_rate(group)
    return lr if group["maximize"] else -lr


def allowed(finite: Tensor, context: Context) -> Tensor | None:
    """Return which parameters may be written, given which gradients are finite: ``(slots,)`` bool.

    Return None if all may be written, and this is known without waiting for a device.
    """
    if context.overflow is not None:
        return finite & ~context.overflow
    here = finite.is_cpu and not torch.compiler.is_compiling()
    return None if here and bool(finite.all()) else finite


def check_rounding(name: str, param: Tensor, group: Group) -> None:
    """Refuse options out of range; for stochastic rounding, create the counter of steps.

    Raises:
        ValueError: If an option is out of range, or a float16 parameter would be rounded
            stochastically; the message gives the option and its value, or the parameter's name.
    """
    if group["rounding"] not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}, got {group['rounding']!r}")
    if not 0 <= group["seed"] < 1 << 63:
        raise ValueError(f"seed must be an integer in [0, 2**63), got {group['seed']!r}")
    if group["rounding"] == "nearest":
        return
    if param.dtype == torch.float16:
        raise ValueError(
            f"rounding='stochastic' rounds bfloat16 parameters; {name!r} is float16. "
            "Use bfloat16 or rounding='nearest'"
        )
    # A model may have been built on the meta device, where a counter has no value.
    step = group[ROUNDING_STEP]
    if step is None or (step.is_meta and not param.is_meta):
        group[ROUNDING_STEP] = torch.zeros((), dtype=torch.int64, device=param.device)


def init_counter(group: dict[str, Any]) -> None:
    """Create the counter of steps of a group whose rounding became stochastic later."""
    if group[ROUNDING_STEP] is None and group["params"]:
        device = group["params"][0].device
        group[ROUNDING_STEP] = torch.zeros((), dtype=torch.int64, device=device)


def draw_keys(slots: Sequence[Slot], group: Group) -> Sequence[Tensor] | None:
    """Return a key for each slot in this step, 0-dim int64; None for rounding to the nearest."""
    if group["rounding"] == "nearest":
        return None
    step = group[ROUNDING_STEP].to(slots[0].param.device)
    numbers = [slot.number for slot in slots]
    first = min(numbers)
    keys = keys_of_step(group["seed"], step, max(numbers) + 1 - first, first=first).unbind()
    return [keys[number - first] for number in numbers]


def draw_matrix_keys(
    slots: Sequence[Slot], matrices: Sequence[ParamMatrix], ranges: Sequence[range], group: Group
) -> Sequence[Tensor] | None:
    """Return a key for each matrix in this step; None for rounding to the nearest."""
    of_slots = draw_keys(slots, group)
    if of_slots is None:
        return None
    keys = [key for key, own in zip(of_slots, ranges, strict=True) for _ in own]
    return [
        key + matrix.first_entry if matrix.first_entry else key
        for key, matrix in zip(keys, matrices, strict=True)
    ]


def count_step(group: Group) -> None:
    """Count a step of a group that rounds stochastically: the next step draws other keys."""
    if group.get(ROUNDING_STEP) is not None:
        group[ROUNDING_STEP].add_(1)
