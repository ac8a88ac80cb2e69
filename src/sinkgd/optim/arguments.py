"""Where a group's options come from, and the refusal of arguments that change nothing.

The rule, for every optimizer of this package:

- A group's own value comes first, then the constructor's argument, then the default.
- An argument that no group takes up is an error, unless it equals what the groups have.
- A group that holds an option which its algorithm does not take is an error.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sinkgd.number_check import is_one_number
from sinkgd.optim.algorithms import ALGORITHMS, FORMS
from sinkgd.optim.algorithms.contract import Algorithm

COMMON: Mapping[str, Any] = {"maximize": False, "nonfinite": "raise"}
_RATES = ("lr", "weight_decay")

# Keys of a group that are no options: torch's own, those that its schedulers add, timm's factor of
# a layer, and a name.
_OTHER_KEYS = {
    *("params", "param_names", "name", "lr_scale"),
    *("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"),
}

# Algorithms for what is no hidden matrix; no optimizer is named after them.
_FOR_THE_REST = {"adamw", "sage", "normalize"}

# Arguments that `param_groups` takes too.
_OF_PARAM_GROUPS = {"lr", "weight_decay", "betas", "deflated_rank"}


def find_algorithm(name: object, argument: str = "algorithm") -> Algorithm:
    """Return the algorithm called ``name``, which the caller passed as ``argument``.

    Raises:
        TypeError: If it is no name.
        ValueError: If there is none; the message gives the nearest name.
    """
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a name such as 'sinkgd', got {name!r}")
    if name not in ALGORITHMS:
        close = difflib.get_close_matches(name, ALGORITHMS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it is one of {', '.join(ALGORITHMS)}"
        raise ValueError(f"there is no algorithm {name!r}, given as {argument}; {hint}")
    return ALGORITHMS[name]


def as_groups(params: Any, optimizer: str, algorithm: str) -> list[dict[str, Any]]:
    """Return ``params`` as a list of groups.

    Args:
        params: What the optimizer was given.
        optimizer: The name of its class.
        algorithm: The algorithm of groups that name none.

    Raises:
        TypeError: If ``params`` is no iterable of tensors, pairs or groups; the message gives the
            right call.
    """
    call = f"{optimizer}(param_groups(model))"
    if algorithm != "stateless":
        call = f"{optimizer}(param_groups(model, matrix_algorithm={algorithm!r}), ...)"
    if isinstance(params, nn.Module):
        raise TypeError(f"params is a model, {type(params).__name__}; write {call}")
    if isinstance(params, Tensor | Mapping | str) or not isinstance(params, Iterable):
        raise TypeError(
            f"params must be a list of groups, tensors or (name, tensor) pairs, got "
            f"{type(params).__name__}; for a model, write {call}"
        )
    groups = list(params)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    return groups


def check_initialized(name: str, param: Tensor) -> None:
    """Refuse the parameter of a lazy module, such as ``nn.LazyLinear``, that has no shape yet.

    Raises:
        ValueError: With its name.
    """
    if nn.parameter.is_lazy(param):
        raise ValueError(
            f"{name!r} belongs to a lazy module and has no shape yet; run one forward pass first"
        )


def check_runs(optimizer: str, algorithm: str, groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse groups none of which runs the optimizer's own algorithm.

    Groups of the algorithms for the rest alone, such as AdamW, are allowed: a model may have no
    hidden matrix. SinkGD takes groups of every algorithm; its own is that of groups without a name.

    Raises:
        ValueError: With the call that gives matrices to this algorithm.
    """
    if algorithm == "stateless":
        return
    names = list(dict.fromkeys(str(group["algorithm"]) for group in groups))
    if algorithm not in names and not _FOR_THE_REST.issuperset(names):
        raise ValueError(
            f"{optimizer} would update no parameter by its own algorithm: the groups name "
            f"{_listed(names)}. Make them with param_groups(model, matrix_algorithm="
            f"{algorithm!r}), or use SinkGD, which takes groups of every algorithm"
        )


def check_keys(group: Mapping[str, Any], index: int) -> None:
    """Refuse keys of a group that its algorithm does not take.

    Raises:
        ValueError: With the key, its value and the nearest option.
    """
    taken = options_of(group["algorithm"])
    for key in group:
        if key in _OTHER_KEYS or key in taken or key == "algorithm":
            continue
        close = difflib.get_close_matches(key, taken, n=1)
        shown = ", ".join(sorted(option for option in taken if option not in _COUNTS))
        hint = f"did you mean {close[0]!r}?" if close else f"its options are {shown}"
        raise ValueError(
            f"group {index} sets {key}={group[key]!r}, which algorithm {group['algorithm']!r} does "
            f"not take; {hint}"
        )


# Kept in a group for its checkpoint, and no option of the caller's.
_COUNTS = {"rounding_step", "norm_history"}


def options_of(algorithm: str) -> set[str]:
    """Return the names of the options of a group with this algorithm."""
    return {*_RATES, *COMMON, *find_algorithm(algorithm).options}


def passed_of(arguments: Mapping[str, Any], none_means: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments but those whose None says that they were not passed."""
    return {k: v for k, v in arguments.items() if k not in none_means or v is not None}


def resolve(
    arguments: Mapping[str, Any], none_means: Mapping[str, Any], algorithm: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the defaults of an optimizer, and those of its arguments that were passed.

    Args:
        arguments: The constructor's.
        none_means: The defaults of arguments for which None is "not passed".
        algorithm: The optimizer's own, whose options have the defaults of the other arguments.
    """
    documented = {**COMMON, **find_algorithm(algorithm).options, **none_means}
    defaults, passed = {}, {}
    for name, value in arguments.items():
        unset = value is None if name in none_means else equal(value, documented[name])
        defaults[name] = documented[name] if unset else value
        if not unset:
            passed[name] = value
    return defaults, passed


def settle(
    defaults: Mapping[str, Any],
    passed: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the optimizer's defaults as its groups have them.

    Where every group sets an option, the default is what they agree on; of learning rates and
    weight decays it is the largest, the rate of AdamW in `param_groups`. Schedulers that read
    ``optimizer.defaults["lr"]`` then scale every group alike.

    Args:
        defaults: Of all arguments.
        passed: The arguments that were passed.
        own: The groups as the caller gave them.

    Raises:
        ValueError: If an argument was passed that no group takes up; it names argument, value and
            remedy.
    """
    settled = dict(defaults)
    for name in defaults:
        takers = [group for group in own if name in options_of(group["algorithm"])]
        values = [{**FORMS.get(group["algorithm"], {}), **group} for group in takers]
        if not all(name in value for value in values):
            continue  # a group takes the default
        found = [value[name] for value in values]
        agree = bool(found) and all(equal(value, found[0]) for value in found)
        if name in passed and not (agree and equal(passed[name], found[0])):
            raise ValueError(_no_effect(name, passed[name], found, own))
        if agree:
            settled[name] = found[0]
        elif found and name in _RATES:
            settled[name] = max(found, key=float)
    return settled


def check_momentum(groups: Sequence[dict[str, Any]], had: Sequence[bool]) -> None:
    """Refuse momentum in a group that was built without it.

    torch's OneCycleLR and CyclicLR write ``momentum`` into every group. In a group of AdamW it
    becomes the first of ``betas``, as these schedulers do to torch's AdamW.

    Args:
        groups: The optimizer's.
        had: Whether each was built with momentum.

    Raises:
        ValueError: With the group and the remedy.
    """
    for index, (group, had_it) in enumerate(zip(groups, had, strict=False)):
        if "momentum" in group and "betas" in group:
            group["betas"] = (group.pop("momentum"), group["betas"][1])
        elif group.get("momentum") and not had_it:
            raise ValueError(
                f"group {index} was built without momentum and now has momentum="
                f"{group['momentum']}; give the scheduler cycle_momentum=False, or build the "
                "optimizer with momentum"
            )


def equal(one: Any, other: Any) -> bool:
    """Whether two values of an option are the same; tensors of one element count as numbers."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not (is_one_number(one) and is_one_number(other)):
            return one is other
        return float(one) == float(other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return bool(one == other)


def _no_effect(
    name: str, value: Any, found: Sequence[Any], own: Sequence[Mapping[str, Any]]
) -> str:
    shown = f"{name}={value!r}"
    if not found:
        names = list(dict.fromkeys(str(group["algorithm"]) for group in own))
        return (
            f"{shown} has no effect: the groups run {_listed(names)}, which take no {name}. "
            "Leave it out"
        )
    others = ", ".join(dict.fromkeys(f"{float(x):g}" if name in _RATES else repr(x) for x in found))
    remedy = f"pass it to param_groups(model, {shown})"
    if name not in _OF_PARAM_GROUPS:
        remedy = "set it in the groups"
    return (
        f"{shown} has no effect: every group sets its own {name} ({others}); {remedy}, or leave it "
        "out"
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))
