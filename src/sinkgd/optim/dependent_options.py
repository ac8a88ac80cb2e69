"""Options that need another one, as ``nesterov`` needs momentum: refused if that one is off.

A group's own option must have an effect in this group. An argument of an optimizer may be meant for
some of the groups, so it must have an effect in one of them. A value that equals the default is
never refused, and neither is ``seed``: without random numbers a run repeats anyway.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sinkgd.optim.arguments import equal, options_of
from sinkgd.optim.method import Group, Need
from sinkgd.optim.methods import METHODS

# What options of every method need. `param_groups` sets ``cautious_decay`` in groups that do not
# decay, too, so it is only checked as an argument.
_OF_ARGUMENTS: Mapping[str, Need] = MappingProxyType(
    {"cautious_decay": Need("weight_decay", 0.0, "a weight_decay above 0, e.g. weight_decay=0.1")}
)


def check_own_options(given: Mapping[str, Any], group: Group) -> None:
    """Refuse an option that a group sets and that has no effect in this group.

    Args:
        given: The group as the caller gave it.
        group: The same group with the values of all options.

    Raises:
        ValueError: If an option has no effect; the message gives it, its value and the remedy.
    """
    method = METHODS[group["algorithm"]]
    for option, need in method.needs.items():
        is_given = option in given and not equal(given[option], method.options[option])
        if is_given and not _is_met(need, group):
            raise ValueError(_without_effect(option, given[option], need))


def check_passed_options(passed: Mapping[str, Any], groups: Sequence[Group]) -> None:
    """Refuse an argument of an optimizer that has no effect in any group.

    Args:
        passed: The arguments that the caller passed.
        groups: The groups of the optimizer.

    Raises:
        ValueError: If an argument has no effect; the message gives it, its value and the remedy.
    """
    for option, value in passed.items():
        takers = [
            group
            for group in groups
            if option in options_of(group["algorithm"]) and equal(group[option], value)
        ]
        needs = [{**_OF_ARGUMENTS, **METHODS[own["algorithm"]].needs}.get(option) for own in takers]
        unmet = [
            need
            for need, group in zip(needs, takers, strict=True)
            if need is not None and not _is_met(need, group)
        ]
        if unmet and len(unmet) == len(takers):
            raise ValueError(_without_effect(option, value, unmet[0]))


def _is_met(need: Need, group: Group) -> bool:
    return not equal(group[need.switch], need.off)


def _without_effect(option: str, value: Any, need: Need) -> str:
    return f"{option}={value!r} needs {need.remedy}; without it, leave out {option}"
