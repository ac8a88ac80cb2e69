"""Overrides of `param_groups`: patterns of names, and the algorithm or options that they set."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sinkgd.optim.arguments import check_kinds
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


def match(overrides: Overrides, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the options that overrides set, by the name of the parameter.

    Raises:
        ValueError: If an override matches no parameter, or only such that an earlier one matches.
    """
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    unmatched = dict.fromkeys(overrides)
    for name in names:
        for pattern, override in overrides.items():
            if matches(pattern, name):
                unmatched.pop(pattern, None)
                options[name] = (
                    {"algorithm": override} if isinstance(override, str) else dict(override)
                )
                break
    for pattern in unmatched:
        if any(matches(pattern, name) for name in names):
            raise ValueError(
                f"override {pattern!r} has no effect, because earlier overrides match all of its "
                "parameters; put it before them"
            )
        raise ValueError(
            f"override {pattern!r} matches no parameter; "
            "see the names in describe_param_groups(model)"
        )
    return options
