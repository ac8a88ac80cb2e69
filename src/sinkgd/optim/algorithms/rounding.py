"""How updates of bfloat16 parameters are rounded: the options that every stateless algorithm takes.

An update is often smaller than half the distance to the next bfloat16, and rounding to the nearest
then loses it, step after step. Rounding at random keeps it in the mean.
"""

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from sinkgd.kernels.rounding import keys_of_step
from sinkgd.optim.algorithms.contract import Group, Slot
from sinkgd.optim.algorithms.parts import Part

ROUNDINGS = ("nearest", "stochastic")

# ``rounding_step`` counts the steps so far, on the device of the parameters; it is made here and
# saved with the group, so that a run that goes on draws what it would have drawn.
ROUNDING_OPTIONS = MappingProxyType[str, object](
    {"rounding": "nearest", "seed": 0, "rounding_step": None}
)


def check_rounding(name: str, param: Tensor, group: Group) -> None:
    """Refuse options out of range; begin to count the steps."""
    if group["rounding"] not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}, got {group['rounding']!r}")
    if group["rounding"] == "nearest":
        return
    if not 0 <= group["seed"] < 1 << 63:
        raise ValueError(f"seed must be an integer in [0, 2**63), got {group['seed']!r}")
    if param.dtype == torch.float16:
        raise ValueError(
            f"rounding='stochastic' rounds bfloat16 parameters; {name!r} is float16. "
            "Use bfloat16 or rounding='nearest'"
        )
    # One on the meta device, such as of a model that was made there, holds nothing.
    step = group["rounding_step"]
    if step is None or (step.is_meta and not param.is_meta):
        group["rounding_step"] = torch.zeros((), dtype=torch.int64, device=param.device)


def draw_keys(slots: Sequence[Slot], group: Group) -> Sequence[Tensor] | None:
    """Return a key a slot for this step, 0-dim int64; None where rounding is to the nearest."""
    if group["rounding"] == "nearest":
        return None
    step = group["rounding_step"].to(slots[0].param.device)
    numbers = [slot.number for slot in slots]
    first = min(numbers)
    keys = keys_of_step(group["seed"], step, max(numbers) + 1 - first, first=first).unbind()
    return [keys[number - first] for number in numbers]


def keys_of_parts(
    slots: Sequence[Slot], parts: Sequence[Part], owners: Sequence[range], group: Group
) -> Sequence[Tensor] | None:
    """Return a key a part for this step; None where rounding is to the nearest."""
    of_slots = draw_keys(slots, group)
    if of_slots is None:
        return None
    keys = [key for key, own in zip(of_slots, owners, strict=True) for _ in own]
    return [
        key + part.first_entry if part.first_entry else key
        for key, part in zip(keys, parts, strict=True)
    ]


def count_step(group: Group) -> None:
    """Count a step of the group, whose next one draws other keys."""
    if group.get("rounding_step") is not None:
        group["rounding_step"].add_(1)
