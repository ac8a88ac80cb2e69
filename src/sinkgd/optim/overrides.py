"""Overrides of `param_groups`: patterns of names, and the algorithm or options that they set."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sinkgd.optim.arguments import check_keys, check_kinds, find_method
from sinkgd.optim.roles import without_wrappers

Overrides = Mapping[str, str | Mapping[str, Any]]


def check_overrides(overrides: object) -> None:
    """Refuse overrides that do not map patterns to algorithms or options.

    Raises:
        TypeError: If an entry has another form, or an option the wrong type; the message gives it.
        ValueError: If a pattern is not a regular expression, or an option is out of range.
    """
    if overrides is None:
        return
    form = "overrides must map patterns to algorithms or options, such as {'head': 'sinkgd'}"
    if not isinstance(overrides, Mapping):
        raise TypeError(f"{form}; got {overrides!r}")
    for pattern, override in overrides.items():
        if not isinstance(pattern, str) or not isinstance(override, str | Mapping):
            raise TypeError(f"{form}; got {{{pattern!r}: {override!r}}}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"overrides: {pattern!r} is not a regular expression: {error}"
            ) from None
        if isinstance(override, Mapping):
            check_kinds(override)


def matches(pattern: str, name: str) -> bool:
    """Whether an override matches a parameter, whose name may have prefixes of wrappers."""
    return any(re.search(pattern, own) for own in (name, without_wrappers(name)))


def match(
    overrides: Overrides, model: nn.Module, params: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Return the options that overrides set, by the name of the parameter.

    Args:
        overrides: The overrides.
        model: The model.
        params: The parameters that are trained, each by the name that counts.

    Raises:
        ValueError: If an override matches no parameter, or only such that an earlier one matches.
    """
    options: dict[str, dict[str, Any]] = {name: {} for name in params}
    unmatched = dict.fromkeys(overrides)
    for name in params:
        for pattern, override in overrides.items():
            if matches(pattern, name):
                unmatched.pop(pattern, None)
                options[name] = (
                    {"algorithm": override} if isinstance(override, str) else dict(override)
                )
                break
    for pattern in unmatched:
        if any(matches(pattern, name) for name in params):
            raise ValueError(
                f"override {pattern!r} has no effect, because earlier overrides match all of its "
                "parameters; put it before them, or leave it out"
            )
        raise ValueError(
            f"override {pattern!r} matches no parameter; {_hint(pattern, model, params)}"
        )
    return options


def _hint(pattern: str, model: nn.Module, params: Mapping[str, Tensor]) -> str:
    """Return what may have been meant by an expression that matches no parameter."""
    names = {param: name for name, param in params.items()}
    for other, param in model.named_parameters(remove_duplicate=False):
        if param in names and matches(pattern, other):
            one, counted = without_wrappers(other), without_wrappers(names[param])
            return (
                f"{one!r} is {counted!r}, a tied weight, which counts under that name; write an "
                "expression that matches it"
            )
    return "see the names in describe_param_groups(model)"


def check_fits(overrides: Overrides, name: str, param: Tensor, options: Mapping[str, Any]) -> None:
    """Refuse an override that gives a parameter an algorithm or an option that does not fit.

    Args:
        overrides: All overrides.
        name: The name of a parameter.
        param: The parameter.
        options: What the override sets, and the parameter's algorithm.

    Raises:
        ValueError: If the algorithm does not exist, does not take an option, or needs more
            dimensions than the parameter has; the message gives the override and the parameter.
    """
    pattern = next((own for own in overrides if matches(own, name)), None)
    if pattern is None:
        return
    algorithm = options["algorithm"]
    least = find_method(algorithm).least_dims
    check_keys(options, f"override {pattern!r}, which matches {name!r},")
    if param.ndim < least:
        kind = "matrices" if least == 2 else "matrices and vectors"
        own = f"^{re.escape(without_wrappers(name))}$"
        remedy = f"put the override {{{own!r}: 'adamw'}} before it"
        if not name.endswith("weight"):
            remedy = f"end the expression in 'weight$', or {remedy}"
        raise ValueError(
            f"override {pattern!r} gives {name!r}, of shape {tuple(param.shape)}, to "
            f"{algorithm!r}, which updates {kind}; {remedy}"
        )
