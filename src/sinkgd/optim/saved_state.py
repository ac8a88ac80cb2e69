"""State dicts: what they contain beyond torch's, and how a saved one is checked and adopted."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sinkgd.optim.arguments import plain
from sinkgd.optim.method import Group
from sinkgd.optim.parameters import has_state, misfit_of_state, named
from sinkgd.optim.roles import without_wrappers

# Added to the state in a state dict that would have no tensor with dimensions. To load a full state
# dict, torch reads the device of such a tensor: torch/distributed/checkpoint/state_dict.py,
# _load_optim_state_dict.
PLACEHOLDER = "no_state"

# Options of torch.optim.AdamW that our AdamW does not have.
_TORCHS_OPTIONS = {
    "amsgrad",
    "capturable",
    "decoupled_weight_decay",
    "differentiable",
    "foreach",
}

# The state of torch's AdamW; torch decides its device and dtype. State that has some of these
# names, but not both moments, keeps its dtype.
_TORCHS_OWN = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
_BOTH_MOMENTS = {"exp_avg", "exp_avg_sq"}

# Options that must agree with the saved ones; all others may differ, and are loaded.
_ROUTING = ("algorithm", "layout", "split", "norms")

# What `sinkgd.optim.parameters.unnamed` returns.
_UNNAMED = re.compile(r"parameter \d+ of group \d+")


def saved_options(group: Group) -> Group:
    """Return the options of a group as they are saved: norms as text, so no class is pickled."""
    options = {key: plain(value) for key, value in group.items() if key != "params"}
    if "norms" in options:
        options["norms"] = tuple(map(repr, options["norms"]))
    return options


def to_saved_form(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Save norms as text, and list the parameters that have no state.

    torch's ``set_optimizer_state_dict`` would consider the state of an unlisted parameter lost. If
    no parameter will ever have state, all are listed even before the first step: torch's helpers
    create the entries of the state only if no parameter has a gradient, and a distributed
    checkpoint must have the same entries when it is saved and when it is loaded.
    """
    groups, state = state_dict["param_groups"], state_dict["state"]
    for group in groups:
        group.update(saved_options(group))
    if not state and any(map(has_state, optimizer.param_groups)):
        return
    for group in groups:
        for i in group["params"]:
            state.setdefault(i, {})
    tensors = [x for own in state.values() for x in own.values() if isinstance(x, Tensor)]
    if state and not any(x.dim() > 0 for x in tensors):
        first, param = next(
            (saved["params"][0], own["params"][0])
            for saved, own in zip(groups, optimizer.param_groups, strict=True)
            if own["params"]
        )
        empty = torch.empty(0, dtype=torch.float32, device=param.device)
        state[first] = {**state[first], PLACEHOLDER: empty}


def without_placeholders(state: dict[Any, Any]) -> dict[Any, Any]:
    """Return the ``state`` of a state dict without the placeholder."""
    return {
        key: {name: value for name, value in own.items() if name != PLACEHOLDER}
        for key, own in state.items()
    }


def from_saved_form(state: dict[Any, Any]) -> dict[Any, Any]:
    """Return the ``state`` of a state dict, with numbers, such as old torch's steps, as tensors.

    Empty entries are left out: the entry of a parameter that a trainer replaces would remain.
    """
    return {
        key: {
            name: torch.tensor(float(value), dtype=torch.float32, device="cpu")
            if isinstance(value, (int, float))
            else value
            for name, value in own.items()
        }
        for key, own in without_placeholders(state).items()
        if own
    }


def adopt_adamw(own_groups: Sequence[Group], saved_groups: Sequence[Group]) -> list[Group]:
    """Return the saved groups; turn those of ``torch.optim.AdamW`` into groups of ``"adamw"``.

    Raises:
        ValueError: If the saved groups name no algorithm, and one of them is not AdamW's, or this
            optimizer does not have as many groups, all of ``"adamw"``.
    """
    if all("algorithm" in saved for saved in saved_groups):
        return [*saved_groups]
    algorithms = [own["algorithm"] for own in own_groups]
    if len(own_groups) != len(saved_groups) or {*algorithms} != {"adamw"}:
        raise ValueError(
            "the checkpoint names no algorithm: another optimizer saved it, such as "
            f"torch.optim.AdamW, and this one has groups of {', '.join(map(repr, algorithms))}. "
            "Load only the model's weights, and create the optimizer with sinkgd.from_adamw_state("
            "model, state_dict), which keeps the moments of parameters that stay with AdamW; "
            "load_state_dict takes AdamW's state only if every group has algorithm='adamw' and the "
            "same parameters"
        )
    return [
        _adopt(index, own, saved)
        for index, (own, saved) in enumerate(zip(own_groups, saved_groups, strict=True))
    ]


def _adopt(index: int, own: Group, saved: Group) -> Group:
    check_is_adamw(index, saved)
    kept = {key: value for key, value in saved.items() if key not in _TORCHS_OPTIONS}
    return {**kept, "algorithm": "adamw", "fused": own["fused"]}


def check_is_adamw(index: int, saved: Group) -> None:
    """Refuse a group that was not saved by ``torch.optim.AdamW``, or was saved with AMSGrad.

    torch.optim.Adam without weight decay counts as AdamW.

    Raises:
        ValueError: If the group is refused; the message gives its index and the remedy.
    """
    lacking = [name for name in ("lr", "betas", "eps", "weight_decay") if name not in saved]
    if lacking:
        raise ValueError(
            f"group {index} of the checkpoint has no {', '.join(lacking)} and no algorithm, so "
            "neither AdamW nor an optimizer of this package saved it; load only the model's weights"
        )
    if saved.get("amsgrad"):
        raise ValueError(
            f"group {index} of the checkpoint has amsgrad=True, and 'adamw' has no AMSGrad; load "
            "only the model's weights, and start this optimizer without state"
        )
    if saved["weight_decay"] and not saved.get("decoupled_weight_decay", True):
        raise ValueError(
            f"group {index} of the checkpoint was saved by torch.optim.Adam, whose weight_decay "
            f"({saved['weight_decay']}) is part of the gradient; 'adamw' decays weights directly. "
            "Load only the model's weights, and start this optimizer without state"
        )


def check_same_routing(
    own_groups: Sequence[dict[str, Any]], saved_groups: Sequence[dict[str, Any]]
) -> None:
    """Refuse a state dict that was saved with another routing.

    Args:
        own_groups: Options of the optimizer's own groups, as they are saved.
        saved_groups: ``param_groups`` of the ``state_dict`` to load.

    Raises:
        ValueError: If the routing differs; the message gives the numbers of groups, or the first
            parameter or option that differs.
    """
    if len(own_groups) != len(saved_groups):
        raise ValueError(
            f"the checkpoint has {len(saved_groups)} parameter groups, this optimizer has "
            f"{len(own_groups)}; build it with the same param_groups() arguments"
        )
    for index, (own, saved) in enumerate(zip(own_groups, saved_groups, strict=True)):
        for option in _ROUTING:
            if _plain(own.get(option)) != _plain(saved.get(option)):
                raise ValueError(
                    f"group {index} has {option} {saved.get(option)!r} in the checkpoint and "
                    f"{own.get(option)!r} here; build the optimizer as it was when it was saved"
                )
        _check_same_names(index, own.get("param_names"), saved.get("param_names"))


def _check_same_names(index: int, own: Sequence[str] | None, saved: Sequence[str] | None) -> None:
    if own is None or saved is None:
        return
    here, there = [*map(without_wrappers, own)], [*map(without_wrappers, saved)]
    if len(here) == len(there):  # parameters without a name match any name
        pairs = [
            pair for pair in zip(here, there, strict=True) if not any(map(_UNNAMED.fullmatch, pair))
        ]
        here, there = [name for name, _ in pairs], [name for _, name in pairs]
    if here == there:
        return
    moved = sorted({*here} ^ {*there})
    if not moved:
        raise ValueError(f"group {index} of the checkpoint lists its parameters in another order")
    name = moved[0]
    where, other = "this optimizer", "the checkpoint"
    if name not in here:
        where, other = other, where
    raise ValueError(
        f"{name!r} is in group {index} of {where}, but not in group {index} of {other}; build the "
        "optimizer with the same param_groups() arguments as when it was saved"
    )


def check_state_shapes(
    own_groups: Sequence[Group],
    saved_groups: Sequence[Group],
    saved_state: Mapping[Any, Mapping[str, Any]],
) -> None:
    """Refuse state of parameters that had another shape when it was saved.

    Fused kernels do not compare the sizes of their inputs, and could read beyond the state.

    Args:
        own_groups: The optimizer's own groups.
        saved_groups: ``param_groups`` of the ``state_dict`` to load, as `adopt_adamw` returns them.
        saved_state: ``state`` of the ``state_dict`` to load.

    Raises:
        ValueError: If a shape differs; the message names the parameter.
    """
    for index, (own, saved) in enumerate(zip(own_groups, saved_groups, strict=True)):
        options = {**own, **saved, **{key: own[key] for key in ("norms",) if key in own}}
        for i, (name, param) in zip(saved["params"], named(own, index), strict=False):
            misfit = misfit_of_state(param, options, saved_state.get(i, {}))
            if misfit is not None:
                raise ValueError(
                    f"{name!r} has shape {tuple(param.shape)}, and its {misfit} was saved with "
                    "another shape; load the state into the model that it was saved with, or "
                    "start this optimizer without it"
                )


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def restore_types(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    before: Mapping[Tensor, Mapping[str, Any]],
) -> None:
    """Restore the dtype in which our own state was saved; torch casts it to the parameter's.

    Args:
        optimizer: The optimizer, after torch has loaded ``state_dict``.
        state_dict: The state dict that was loaded.
        before: The optimizer's state before loading. A loaded tensor that was in it already, as
            after loading in place, is kept; all others are copied, so that two optimizers never
            share state.
    """
    saved_params = [i for group in state_dict["param_groups"] for i in group["params"]]
    own_params = [param for group in optimizer.param_groups for param in group["params"]]
    for i, param in zip(saved_params, own_params, strict=True):
        own = optimizer.state[param] if i in state_dict["state"] else {}
        was = before.get(param, {})
        loaded = state_dict["state"].get(i, {})
        cast_by_torch = _TORCHS_OWN if loaded.keys() >= _BOTH_MOMENTS else set()
        for key, saved in loaded.items():
            if not isinstance(saved, Tensor):
                continue
            if key not in cast_by_torch:
                # Counters are on the device where torch puts the step, other state on the
                # parameter's.
                counts = saved.dim() == 0 < param.dim() and "step" in own
                own[key] = saved.to((own["step"] if counts else param).device)
            if own[key] is saved and saved is not was.get(key):
                own[key] = saved.clone()
