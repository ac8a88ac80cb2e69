"""The options of groups: where their values come from, and which of them are refused.

The rules, for every optimizer of this package:

- A group's own value comes first, then the preset of its method, if any, then the constructor's
  argument, then the default.
- An argument that no group uses is an error, unless it equals what the groups have.
- A group that has an option which its method does not have is an error.
- An unknown argument is refused, with the nearest name in the error.
- A value of the wrong kind is refused, with the name of its argument in the error.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn

from sinkgd.norms import as_norms
from sinkgd.number_check import (
    check_betas,
    check_flag,
    check_number,
    check_whole_number,
    is_one_number,
    is_whole_number,
)
from sinkgd.optim.method import Method
from sinkgd.optim.methods import METHODS

P = ParamSpec("P")
T = TypeVar("T")

Check = Callable[[str, Any], None]

COMMON: Mapping[str, Any] = {"maximize": False, "nonfinite": "raise", "cautious_decay": False}
# Options that optimizers of older versions lack, each with the value that keeps the behavior of
# these versions. A new option of an existing method belongs here: an older pickled optimizer then
# gets it, and a run of the laboratory that was begun without it can be resumed.
ADDED_LATER: Mapping[str, Any] = {
    "cautious_decay": False,
    "averaged_scales": 0.0,
    "cross_fit": False,
}
_RATES = ("lr", "weight_decay")

# Keys of a group that are not options: torch's own, those of its schedulers, timm's factor of a
# layer, and a name.
_OTHER_KEYS = {
    *("params", "param_names", "name", "lr_scale"),
    *("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"),
}

# Arguments of the optimizers that `param_groups` takes, too.
_OF_PARAM_GROUPS = {"lr", "weight_decay", "cautious_decay", "betas", "deflated_rank"}


def find_method(name: object, argument: str = "algorithm") -> Method:
    """Return the method called ``name``, which the caller passed as ``argument``.

    Raises:
        TypeError: If ``name`` is not a string.
        ValueError: If no method has this name; the message gives the nearest name.
    """
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a name such as 'sinkgd', got {name!r}")
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it is one of {', '.join(METHODS)}"
        raise ValueError(f"there is no algorithm {name!r}, given as {argument}; {hint}")
    return METHODS[name]


def as_groups(params: Any, call: str) -> list[dict[str, Any]]:
    """Return ``params`` as a list of groups.

    Args:
        params: What the optimizer was given.
        call: The right call for a model.

    Raises:
        TypeError: If ``params`` is not an iterable of tensors, pairs or groups; the message gives
            the right call.
    """
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


def check_runs(
    optimizer: str, algorithm: str, groups: Sequence[Mapping[str, Any]], call: str
) -> None:
    """Refuse groups if none of them runs the optimizer's own method.

    If all groups run auxiliary methods, such as AdamW, they are allowed: a model may have no hidden
    matrix.

    Raises:
        ValueError: If no group runs ``algorithm``, and one runs another method that is not
            auxiliary; the message gives ``call``, the right call for a model.
    """
    names = list(dict.fromkeys(str(group["algorithm"]) for group in groups))
    if algorithm not in names and not all(METHODS[name].is_auxiliary for name in names):
        raise ValueError(
            f"{optimizer} would update no parameter by its own algorithm, {algorithm!r}: the "
            f"groups name {_quoted(names)}. Write {call}, or use SinkGD, which takes groups of "
            "every algorithm"
        )


def check_keys(group: Mapping[str, Any], source: str) -> None:
    """Refuse keys of a group that its method does not have.

    Args:
        group: The options of the group, with its algorithm.
        source: What set them, such as "group 3".

    Raises:
        ValueError: If the method does not have a key; the message gives the key, its value and the
            nearest option.
    """
    taken = options_of(group["algorithm"])
    counters = METHODS[group["algorithm"]].counters
    for key in group:
        if key in _OTHER_KEYS or key in taken or key == "algorithm":
            continue
        close = difflib.get_close_matches(key, ["algorithm", *taken], n=1)
        shown = ", ".join(sorted(option for option in taken if option not in counters))
        hint = f"did you mean {close[0]!r}?" if close else f"its options are {shown}"
        raise ValueError(
            f"{source} sets {key}={group[key]!r}, which algorithm {group['algorithm']!r} does not "
            f"take; {hint}"
        )


def options_of(algorithm: str) -> set[str]:
    """Return the names of the options of a group with this method."""
    return {*_RATES, *COMMON, *find_method(algorithm).options}


def passed_of(arguments: Mapping[str, Any], none_means: Mapping[str, Any]) -> dict[str, Any]:
    """Return the passed arguments; None means "not passed" for the names in ``none_means``."""
    return {k: v for k, v in arguments.items() if k not in none_means or v is not None}


def resolve(
    arguments: Mapping[str, Any], none_means: Mapping[str, Any], algorithm: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the defaults of an optimizer, and the arguments that were passed.

    An argument of ``none_means`` counts as not passed if it is None, any other argument if it
    equals its documented default.

    Args:
        arguments: The arguments of the constructor.
        none_means: The defaults of the arguments for which None means "not passed".
        algorithm: The optimizer's own method; its options give the other defaults.
    """
    documented = {**COMMON, **find_method(algorithm).options, **none_means}
    defaults, passed = {}, {}
    for name, value in arguments.items():
        unset = value is None if name in none_means else equal(value, documented[name])
        defaults[name] = documented[name] if unset else value
        if not unset:
            passed[name] = value
    return defaults, passed


def defaults_of_groups(
    defaults: Mapping[str, Any],
    passed: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the optimizer's defaults in agreement with its groups.

    If every group sets an option to the same value, that value becomes the default. If learning
    rates or weight decays differ, the default becomes the largest value: with `param_groups`, this
    is AdamW's rate. Schedulers that read ``optimizer.defaults["lr"]`` then scale every group alike.

    Args:
        defaults: The defaults of all arguments.
        passed: The arguments that were passed.
        own: The groups as the caller gave them, each with its algorithm.

    Raises:
        ValueError: If no group uses an argument that was passed; the message gives the argument,
            its value and the remedy.
    """
    agreed = dict(defaults)
    for name in defaults:
        takers = [group for group in own if name in options_of(group["algorithm"])]
        values = [{**METHODS[group["algorithm"]].presets, **group} for group in takers]
        if not all(name in value for value in values):
            continue  # a group takes the default
        found = [value[name] for value in values]
        agree = bool(found) and all(equal(value, found[0]) for value in found)
        if name in passed and not (agree and equal(passed[name], found[0])):
            raise ValueError(_no_effect(name, passed[name], found, own))
        if agree:
            agreed[name] = found[0]
        elif found and name in _RATES:
            agreed[name] = max(found, key=float)
    return agreed


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
            f"{shown} has no effect: the groups run {_quoted(names)}, which take no {name}. "
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


def _quoted(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))


def list_names(names: Sequence[str], most: int = 5) -> str:
    """List names for a message, at most ``most`` of them, and count the others."""
    left = len(names) - most
    if left > 0:
        return f"{', '.join(names[:most])} and {left} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def plain(value: Any) -> Any:
    """Return numbers of other libraries, such as NumPy's, as Python's; all else as it is.

    ``torch.load(weights_only=True)`` refuses a checkpoint with NumPy's numbers.
    """
    if type(value) in (bool, int, float):
        return value
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def check_kinds(options: Mapping[str, Any]) -> None:
    """Refuse options of the wrong kind, and rates and betas out of range.

    Methods check all other ranges.

    Raises:
        TypeError: If an option has the wrong kind; the message gives its name and its value.
        ValueError: If a number is out of range, such as a negative rate; the message gives the
            option's name and its value.
    """
    for name, value in options.items():
        if name in KINDS:
            KINDS[name](name, value)


def _number(name: str, value: Any) -> None:
    check_number(name, value, least=None)


def _rate(name: str, value: Any) -> None:
    check_number(name, value)


def _or_none(check: Check) -> Check:
    def checked(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return checked


def _norms(name: str, value: Any) -> None:  # noqa: ARG001 - every check takes a name
    as_norms(value)


def _split(name: str, value: Any) -> None:
    sizes = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not all(map(is_whole_number, sizes)) or not sizes:
        raise TypeError(
            f"{name} must be a number of parts or a list of their sizes in rows, got {value!r}"
        )


# For each option, the function that checks the kind of its value. Options whose values are strings,
# such as ``rounding``, are not listed: methods compare these values with the allowed ones.
KINDS: Mapping[str, Check] = MappingProxyType(
    {
        **dict.fromkeys(("lr", "weight_decay"), _rate),
        **dict.fromkeys(
            (
                *("eps", "momentum", "low_rank_momentum", "averaged_scales", "tiny_row_threshold"),
                *("tau", "max_norm", "spike_z"),
            ),
            _number,
        ),
        **dict.fromkeys(("tol", "theta"), _or_none(_number)),
        **dict.fromkeys(
            (
                *("sinkhorn_iterations", "newton_schulz_steps", "num_iters", "n_iter"),
                *("deflated_rank", "momentum_rank", "seed", "momentum_bits"),
                *("clip_delay", "reset_interval", "warmup_steps", "norm_window"),
            ),
            check_whole_number,
        ),
        **dict.fromkeys(
            (
                *("maximize", "cautious_decay", "nesterov"),
                *("warm_start", "cross_fit", "weight_projection", "constant_norm"),
            ),
            check_flag,
        ),
        "fused": _or_none(check_flag),
        "betas": check_betas,
        "norms": _norms,
        "split": _split,
    }
)

# Arguments that only `param_groups` has, and the call that takes each.
OF_PARAM_GROUPS: Mapping[str, str] = MappingProxyType(
    {
        name: f"param_groups(model, {name}=...)"
        for name in (
            *("matrix_lr_scale", "adamw_lr", "matrix_algorithm"),
            *("betas", "overrides", "base_width", "state_bits", "only"),
        )
    }
)

# Options that `SinkGDVariant` takes, and `SinkGD` does not.
OF_VARIANT = (
    *("warm_start", "momentum_place", "momentum_bits", "momentum_rank", "low_rank_momentum"),
    *("cross_fit", "averaged_scales"),
    *("first", "last", "tiny_rows", "tiny_row_threshold"),
    *("deflated_start", "operator_norm", "weight_projection", "constant_norm"),
)

# Options of groups that no constructor takes, or only some do.
OF_GROUPS = frozenset({"fused", "layout", "split", "eps"})

# What other optimizers call an argument.
_SYNONYMS = MappingProxyType({"learning_rate": "lr", "wd": "weight_decay"})


def unknown_name(
    caller: str, name: str, names: Iterable[str], elsewhere: Mapping[str, str] = OF_PARAM_GROUPS
) -> str:
    """Return the message for an argument that does not exist, with the remedy.

    Args:
        caller: The name of the function or class in errors.
        name: The argument.
        names: The arguments that exist.
        elsewhere: Arguments of related functions, and the call that takes each.
    """
    names = list(names)
    said = f"{caller} has no argument {name!r}"
    if name in elsewhere:
        return f"{said}; write {elsewhere[name]}"
    if name in OF_GROUPS:
        return (
            f"{said}; it is an option of groups: set group[{name!r}] where the algorithm takes it, "
            f"or pass overrides={{pattern: {{{name!r}: ...}}}} to param_groups"
        )
    if close := _nearest(name, names):
        return f"{said}; did you mean {close!r}?"
    if other := _nearest(name, elsewhere):
        return f"{said}; did you mean {elsewhere[other]}?"
    return f"{said}; it takes {', '.join(names)}"


def _nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of ``names`` that a misspelled or shortened ``name`` may stand for, if any."""
    names = list(names)
    if _SYNONYMS.get(name) in names:
        return _SYNONYMS[name]
    close = difflib.get_close_matches(name, names, n=1)
    longer = [known for known in names if name in known.split("_")]
    return next(iter([*close, *longer]), None)


def suggest_names(
    elsewhere: Mapping[str, str] = OF_PARAM_GROUPS, passes_to: Callable[..., object] | None = None
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function or a constructor refuse unknown arguments with the nearest name.

    Its signature does not change.

    Args:
        elsewhere: Arguments of related functions, and the call that takes each.
        passes_to: The function that receives ``**options`` as its keyword-only arguments.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        is_init = function.__name__ == "__init__"
        taken = [*inspect.signature(function).parameters.values()][is_init:]
        if passes_to is not None:
            taken = [p for p in taken if p.kind is not p.VAR_KEYWORD]
            inner = inspect.signature(passes_to).parameters.values()
            taken += [p for p in inner if p.kind is p.KEYWORD_ONLY]
        names = [p.name for p in taken]

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            for name in kwargs:
                if name not in names:
                    caller = type(args[0]).__name__ if is_init else function.__name__
                    raise TypeError(unknown_name(caller, name, names, elsewhere))
            return function(*args, **kwargs)

        return checked

    return decorate
