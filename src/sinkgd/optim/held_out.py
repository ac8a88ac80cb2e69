"""What `GroupedOptimizer.hold_out` holds out, and until when.

The scales lie in the optimizer's ``state``, under the names of `sinkgd.optim.transforms.cross_fit`,
until the end of the next step. Whether any are held out is read from there alone, so that copies,
wrappers and checkpoints of an optimizer agree about it.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from sinkgd.distributed.shards import all_have_values
from sinkgd.exchange import Computation
from sinkgd.optim.method import Context, Group, Slot
from sinkgd.optim.methods import METHODS
from sinkgd.optim.methods.sinkhorn import Sinkhorn
from sinkgd.optim.transforms.cross_fit import forget_held, is_held, is_waiting

Found = Sequence[tuple[int, list[Slot]]]  # as `ParameterIndex.slots` returns it
States = Mapping[Tensor, Mapping[str, Any]]


def find_to_hold(found: Found, groups: Sequence[Group], states: States) -> Found:
    """Return the matrices whose scales can be held out now.

    Raises:
        ValueError: If no group takes such scales, some are held out already, or no matrix that is
            trained has a gradient.
    """
    takers = [group for group in groups if group.get("cross_fit")]
    if not takers:
        raise ValueError(
            "hold_out() keeps scales for groups with cross_fit=True, and no group has it; use "
            "SinkGDVariant(params, cross_fit=True). A checkpoint that was saved without it turns "
            "it off: set it in optimizer.param_groups after loading"
        )
    if _are_held(states):
        raise ValueError(
            "hold_out() was called twice in a step, and would discard the gradients in between: "
            "call it once. If the last step was not taken, optimizer.zero_grad() gives it up"
        )
    own = _matrices(found, groups)
    params = [param for group in takers for param in group["params"]]
    if not own and any(p.requires_grad and p.ndim >= 2 and p.numel() for p in params):
        raise ValueError(
            "hold_out() found no gradient of a matrix with cross_fit=True: call it after a "
            "backward pass. If gradients are averaged over ranks, this backward pass must do so; "
            "with FSDP2, that is model.set_requires_gradient_sync(True) before it"
        )
    return own


def hold(found: Found, groups: Sequence[Group], context: Context) -> list[Computation[Tensor]]:
    """Return the computations that keep the scales of what `find_to_hold` found."""
    held = []
    for index, slots in found:
        if all_have_values([slot.grad for slot in slots]):
            method = METHODS[groups[index]["algorithm"]]
            assert isinstance(method, Sinkhorn), "no other method takes cross_fit"
            held.append(method.hold_out(slots, groups[index], context))
    return held


def check_is_held(index: int, slots: Sequence[Slot], states: States) -> None:
    """Refuse to update matrices of a group with ``cross_fit=True`` before `hold_out` was called.

    Raises:
        ValueError: If nothing is held out for any parameter.
    """
    if any(slot.param.ndim >= 2 for slot in slots) and not _are_held(states):
        raise ValueError(
            f"group {index} has cross_fit=True, which takes the scales from a part of the batch, "
            "and none was held out: call hold_out() between the backward passes of two "
            "micro-batches, or set cross_fit=False"
        )


def check_is_used(found: Found, groups: Sequence[Group], states: States) -> None:
    """Refuse a step of which `hold_out` cleared all gradients of matrices.

    Raises:
        ValueError: If scales are held out for a matrix that is trained, and no matrix of a group
            with ``cross_fit=True`` has a gradient now, or has been updated in this step.
    """
    if _matrices(found, groups):
        return
    held = [state for param, state in states.items() if is_held(state) and param.requires_grad]
    if held and all(map(is_waiting, held)):
        raise ValueError(
            "hold_out() cleared the gradients of this step, and no backward pass followed it: call "
            "it between the backward passes of two micro-batches, and zero_grad() to give up this "
            "step"
        )


def forget(states: Mapping[Tensor, MutableMapping[str, Any]]) -> None:
    """Forget what was held out."""
    for state in states.values():
        forget_held(state)


def _are_held(states: States) -> bool:
    return any(map(is_held, states.values()))


def _matrices(found: Found, groups: Sequence[Group]) -> Found:
    """Return the matrices of groups with ``cross_fit=True``."""
    own = [
        (index, [slot for slot in slots if slot.param.ndim >= 2])
        for index, slots in found
        if groups[index].get("cross_fit")
    ]
    return [(index, slots) for index, slots in own if slots]
