"""What ``state_dict`` returns beyond torch's, and what becomes of a dict that is loaded."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sinkgd.optim.algorithms.contract import Group

# The only entry of a state dict without tensors. To load a full state dict, torch looks in it for
# the device: torch/distributed/checkpoint/state_dict.py, _load_optim_state_dict.
PLACEHOLDER = "no_state"

# Options of torch.optim.AdamW that our AdamW does not have.
_TORCHS_OPTIONS = {
    "amsgrad",
    "capturable",
    "decoupled_weight_decay",
    "differentiable",
    "foreach",
}

# State that torch's AdamW works on; torch decides its device and dtype.
_TORCHS_OWN = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


def saved_options(group: Group) -> Group:
    """Return the options of a group as they are saved: norms as text, so no class is pickled."""
    options = {key: value for key, value in group.items() if key != "params"}
    if "norms" in options:
        options["norms"] = tuple(map(repr, options["norms"]))
    return options


def to_saved_form(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Save options as text, and list the parameters that have no state.

    torch's ``set_optimizer_state_dict`` takes a parameter that is not listed for a loss.
    """
    for group in state_dict["param_groups"]:
        group.update(saved_options(group))
    state = state_dict["state"]
    if not state:
        return
    for group in state_dict["param_groups"]:
        for i in group["params"]:
            state.setdefault(i, {})
    tensors = [x for own in state.values() for x in own.values() if isinstance(x, Tensor)]
    if not any(x.dim() > 0 for x in tensors):
        device = optimizer.param_groups[0]["params"][0].device
        first = next(iter(state))
        empty = torch.empty(0, dtype=torch.float32, device=device)
        state[first] = {**state[first], PLACEHOLDER: empty}


def without_placeholders(state: dict[Any, Any]) -> dict[Any, Any]:
    """Return the ``state`` of a state dict without the entry that stands for no state."""
    return {
        key: {name: value for name, value in own.items() if name != PLACEHOLDER}
        for key, own in state.items()
    }


def from_saved_form(state: dict[Any, Any]) -> dict[Any, Any]:
    """Return the ``state`` of a state dict with numbers as tensors, as old torch saved steps."""
    return {
        key: {
            name: torch.tensor(float(value), dtype=torch.float32, device="cpu")
            if isinstance(value, (int, float))
            else value
            for name, value in own.items()
        }
        for key, own in without_placeholders(state).items()
    }


def adopt_adamw(own_groups: Sequence[Group], saved_groups: Sequence[Group]) -> list[Group]:
    """Return the saved groups; those of ``torch.optim.AdamW`` as groups of ``"adamw"``.

    Raises:
        ValueError: If another optimizer saved a group that this optimizer does not give to AdamW.
    """
    if all("algorithm" in saved for saved in saved_groups):
        return [*saved_groups]
    algorithms = [own["algorithm"] for own in own_groups]
    if len(own_groups) != len(saved_groups) or {*algorithms} != {"adamw"}:
        raise ValueError(
            "the checkpoint names no algorithm: another optimizer saved it, such as "
            f"torch.optim.AdamW, and this one has groups of {', '.join(map(repr, algorithms))}. "
            "Load the model's weights alone and start this optimizer afresh; the state of AdamW "
            "can be loaded where every group has algorithm='adamw' and the same parameters"
        )
    return [
        _adopt(index, own, saved)
        for index, (own, saved) in enumerate(zip(own_groups, saved_groups, strict=True))
    ]


def _adopt(index: int, own: Group, saved: Group) -> Group:
    if not {"lr", "betas", "eps", "weight_decay"} <= saved.keys():
        raise ValueError(
            f"group {index} of the checkpoint has no betas and no algorithm, so neither AdamW nor "
            "an optimizer of this package saved it; load the model's weights alone"
        )
    if saved.get("amsgrad"):
        raise ValueError(
            f"group {index} of the checkpoint has amsgrad=True, and 'adamw' has no AMSGrad; load "
            "the model's weights alone and start this optimizer afresh"
        )
    if saved["weight_decay"] and not saved.get("decoupled_weight_decay", True):
        raise ValueError(
            f"group {index} of the checkpoint was saved by torch.optim.Adam, whose weight_decay "
            f"({saved['weight_decay']}) is part of the gradient; 'adamw' decays weights directly. "
            "Load the model's weights alone and start this optimizer afresh"
        )
    kept = {key: value for key, value in saved.items() if key not in _TORCHS_OPTIONS}
    return {**kept, "algorithm": "adamw", "fused": own["fused"]}


def restore_types(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    before: Mapping[Tensor, Mapping[str, Any]],
) -> None:
    """Bring our own state to the type it was saved in; torch casts it to the parameter's.

    Args:
        optimizer: After torch has loaded ``state_dict``.
        state_dict: What was loaded.
        before: The optimizer's state before. A tensor of it that was filled in place is taken as it
            is; any other is copied, so that two optimizers never share state.
    """
    saved_params = [i for group in state_dict["param_groups"] for i in group["params"]]
    own_params = [param for group in optimizer.param_groups for param in group["params"]]
    for i, param in zip(saved_params, own_params, strict=True):
        own = optimizer.state[param] if i in state_dict["state"] else {}
        was = before.get(param, {})
        for key, saved in state_dict["state"].get(i, {}).items():
            if not isinstance(saved, Tensor):
                continue
            if key not in _TORCHS_OWN:
                own[key] = saved.to(own.get("step", param).device)
            if own[key] is saved and saved is not was.get(key):
                own[key] = saved.clone()
