"""Continue a run of AdamW with SinkGD: convert its rates, and keep the moments that AdamW needs."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sinkgd.optim.arguments import equal, list_names
from sinkgd.optim.method import Group
from sinkgd.optim.methods import METHODS
from sinkgd.optim.methods.adamw import AdamW
from sinkgd.optim.param_groups import check_model, param_groups
from sinkgd.optim.roles import without_wrappers
from sinkgd.optim.saved_state import check_is_adamw
from sinkgd.optim.sinkgd import SinkGD


def from_adamw_state(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    names: Sequence[str] | None = None,
    **options: Any,
) -> SinkGD:
    """Return `SinkGD` for a model that AdamW has trained so far.

    Embeddings, the output head, norms and biases stay with AdamW and keep their moments and steps.
    Hidden matrices go to SinkGD; their moments are dropped. The groups are those of
    ``param_groups(model, adamw_lr=...)``, with AdamW's weight decay, betas and eps.

    If AdamW had a scheduler, its state has two rates: ``lr``, the present one, and ``initial_lr``,
    the peak. Each is converted and keeps its name, so that a scheduler with the same ``last_epoch``
    continues the curve. At the end of many schedules the present rate is 0, which warns. An
    ``adamw_lr`` that is passed replaces both: pass it to continue at another rate than the present
    one, or with a new scheduler.

    Args:
        model: The model with its trained weights.
        state_dict: The ``state_dict`` of ``torch.optim.AdamW``. Not modified.
        names: The names of the parameters in the order in which AdamW had them, group by group.
            Needed if AdamW had several groups and its state has no ``param_names``. A single
            group without names must have been ``model.parameters()``, or those of them that require
            gradients.
        **options: Options of `param_groups` except ``lr`` and ``matrix_lr_scale``. An option given
            here replaces that of the state; ``adamw_lr`` replaces both ``lr`` and ``initial_lr``.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``, or an option does not exist.
        ValueError: If another optimizer saved the state, the state lacks names, its parameters are
            not those of the model, or its groups differ in an option that is not given here or,
            without ``adamw_lr``, in the factor by which a scheduler has changed their rates.

    Examples:
        >>> import torch, sinkgd
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
        >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> adamw = torch.optim.AdamW(model.parameters(), lr=1e-4)
        >>> model(torch.ones(3, 2, 8)).square().sum().backward()
        >>> adamw.step()
        >>> optimizer = sinkgd.from_adamw_state(model, adamw.state_dict())
        >>> for group in optimizer.param_groups:
        ...     print(group["algorithm"], group["lr"], len(group["params"]))
        sinkgd 3e-05 2
        sinkgd 3e-05 6
        adamw 0.0001 16
    """
    check_model(model, "from_adamw_state")
    groups = _groups_of(state_dict)
    saved = _state_by_name(model, state_dict, groups, names)
    is_scheduled = all("initial_lr" in group for group in groups)
    has_rate = options.get("adamw_lr") is not None
    share = _share(groups) if is_scheduled and not has_rate else 1.0
    peak = "initial_lr" if is_scheduled else "lr"
    taken = {"adamw_lr": peak, "betas": "betas", "weight_decay": "weight_decay"}
    found = {
        option: _common(groups, name, option)
        for option, name in taken.items()
        if options.get(option) is None
    }
    routed = param_groups(model, **{**options, **found})
    for group in routed:
        if isinstance(METHODS[group["algorithm"]], AdamW):
            group.setdefault("eps", _common(groups, "eps", "overrides"))
        if is_scheduled:
            group["initial_lr"] = group["lr"]
            group["lr"] = group["lr"] * share
    if not has_rate:
        _warn_if_zero(routed, peak=float(found["adamw_lr"]))
    optimizer = SinkGD(routed)
    for group in optimizer.param_groups:
        method = METHODS[group["algorithm"]]
        if isinstance(method, AdamW):
            _take_moments(optimizer, group, method, saved)
    return optimizer


def _groups_of(state_dict: Mapping[str, Any]) -> list[Group]:
    """Return the groups of a state dict of AdamW, and refuse other state dicts."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("state_dict must be what torch.optim.AdamW's state_dict() returned")
    groups: list[Group] = list(state_dict["param_groups"])
    for index, group in enumerate(groups):
        if "algorithm" in group:
            raise ValueError(
                f"group {index} of state_dict has algorithm={group['algorithm']!r}: an optimizer "
                "of this package saved it. Create the optimizer and call its load_state_dict"
            )
        check_is_adamw(index, group)
    return groups


def _common(groups: Sequence[Group], name: str, argument: str) -> Any:
    """Return the value of an option that all groups share; for weight decay, ignore zeros."""
    values: list[Any] = []
    for group in groups:
        if not any(equal(group[name], value) for value in values):
            values.append(group[name])
    if name == "weight_decay" and len(values) > 1:
        values = [value for value in values if value != 0]
    if len(values) > 1:
        raise ValueError(
            f"the groups of state_dict have different {name} ({', '.join(map(repr, values))}); "
            f"pass {argument} to from_adamw_state"
        )
    (value,) = values
    return value.clone() if isinstance(value, Tensor) else value  # not shared with AdamW


def _state_by_name(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    groups: Sequence[Group],
    names: Sequence[str] | None,
) -> dict[str, Mapping[str, Any]]:
    """Return the state of each parameter by its name in the model."""
    places = [place for group in groups for place in group["params"]]
    known = [name for group in groups for name in group.get("param_names", ())]
    own = [without_wrappers(name) for name, _ in model.named_parameters()]
    if names is not None:
        known = list(names)
    elif not known:
        if len(groups) > 1:
            raise ValueError(
                f"state_dict has {len(groups)} groups and no names; pass names=[...], the names of "
                "the parameters in the order in which AdamW had them"
            )
        trained = [without_wrappers(n) for n, p in model.named_parameters() if p.requires_grad]
        known = own if len(places) == len(own) else trained
    known = [without_wrappers(name) for name in known]
    if len(known) != len(places):
        raise ValueError(
            f"state_dict has {len(places)} parameters, and there are {len(known)} names for them"
        )
    if unknown := [name for name in known if name not in own]:
        raise ValueError(f"the model has no parameters {list_names(unknown)}, which AdamW had")
    states = state_dict["state"]
    return {name: states.get(place, {}) for name, place in zip(known, places, strict=True)}


def _share(groups: Sequence[Group]) -> float:
    """Return the current rate relative to the initial one, which a scheduler saves."""
    shares = {float(group["lr"]) / (float(group["initial_lr"]) or 1.0) for group in groups}
    if max(shares) - min(shares) > 1e-6 * max(shares):
        raise ValueError(
            f"the scheduler of AdamW has scaled its groups differently, by {sorted(shares)}; pass "
            "adamw_lr, the rate at which to continue"
        )
    return max(shares)


def _warn_if_zero(groups: Sequence[Group], peak: float) -> None:
    """Warn if the rate is 0 in all groups, so that a step changes no weight."""
    if any(float(group["lr"]) for group in groups):
        return
    of_schedule = f" (at the peak of its schedule: {peak:g})" if peak else ""
    warnings.warn(
        f"AdamW's rate in state_dict is 0{of_schedule}, and so is the rate of every group of "
        "SinkGD: no weight changes until a scheduler sets another rate. Pass adamw_lr to "
        "from_adamw_state, the rate at which to continue",
        UserWarning,
        stacklevel=3,
    )


def _take_moments(
    optimizer: SinkGD, group: Group, method: AdamW, saved: Mapping[str, Mapping[str, Any]]
) -> None:
    """Copy the moments of a group's parameters, if AdamW has updated them before."""
    for name, param in zip(group["param_names"], group["params"], strict=True):
        state = saved.get(without_wrappers(name))
        if state is None:
            raise ValueError(f"AdamW did not have {name!r}, which is trained now; freeze it")
        if not state:
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            if state[key].shape != param.shape:
                raise ValueError(
                    f"{key} of {name!r} has shape {tuple(state[key].shape)}, the parameter "
                    f"{tuple(param.shape)}; check the order of names"
                )
        optimizer.state[param] = dict(method.adopt(param, group, state))
