"""The names of parameter groups, under which trainers log the groups' rates.

A name says what is in a group: ``"matrices"``, ``"embeddings-head-vectors"``. If several groups
would have the same name, each name also gives the options in which its group differs from the
others, unless they are defaults: ``"matrices-split-3"``. Names have only letters, digits, ``_``,
``-`` and ``.``, which TensorBoard and other logs accept unchanged. A ``name`` from an override may
have other characters.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from torch import Tensor

from sinkgd.number_check import is_one_number
from sinkgd.optim.arguments import COMMON, equal
from sinkgd.optim.method import Group
from sinkgd.optim.methods import METHODS
from sinkgd.optim.roles import ADAPTER, EMBEDDING, HEAD, ROUTER, Role

# What a group may hold, in the order in which its name lists it.
_KINDS = ("matrices", "adapters", "embeddings", "head", "routers", "others", "vectors")
_BY_REASON = {EMBEDDING: "embeddings", HEAD: "head", ADAPTER: "adapters", ROUTER: "routers"}


def name_groups(groups: Sequence[Group], roles: Mapping[Tensor, Role]) -> None:
    """Give every group a ``name`` of its own, which begins with the name from an override, if any.

    Args:
        groups: Groups of (name, parameter) pairs, no two with the same options.
        roles: The role of each parameter.
    """
    alike: dict[str, list[Group]] = {}
    for group in groups:
        alike.setdefault(str(group.get("name", _content(group, roles))), []).append(group)
    names: list[str] = []
    for name, same in alike.items():
        differing = _differing(same)
        for group in same:
            parts = [name, *_suffixes(group, differing)]
            group["name"] = unique_name("-".join(parts), names)
            names.append(group["name"])


def unique_name(name: str, taken: Collection[object]) -> str:
    """Return ``name``, with a number if it is among those that are taken.

    Examples:
        >>> unique_name("vectors", ["matrices", "vectors", "vectors-2"])
        'vectors-3'
    """
    numbered = (f"{name}-{number}" for number in count(2))
    return name if name not in taken else next(own for own in numbered if own not in taken)


def _content(group: Group, roles: Mapping[Tensor, Role]) -> str:
    """Say what kinds of parameters a group holds."""
    held = {_kind(param, roles[param]) for _, param in group["params"]}
    return "-".join(kind for kind in _KINDS if kind in held)


def _kind(param: Tensor, role: Role) -> str:
    if param.ndim < 2:
        return "vectors"
    return "matrices" if role.is_matrix else _BY_REASON.get(role.reason, "others")


def _differing(groups: Sequence[Group]) -> list[str]:
    """List the options whose values differ among the groups that take them."""
    found = []
    for option in dict.fromkeys(option for group in groups for option in group):
        values = [_value(group, option) for group in groups if _takes(group, option)]
        if option not in ("params", "name") and not all(equal(v, values[0]) for v in values):
            found.append(option)
    return found


def _takes(group: Group, option: str) -> bool:
    return option in group or option in METHODS[group["algorithm"]].options


def _value(group: Group, option: str) -> Any:
    defaults = {**COMMON, **METHODS[group["algorithm"]].options}
    return group.get(option, defaults.get(option))


def _suffixes(group: Group, options: Iterable[str]) -> Iterator[str]:
    """Yield the options of a group as parts of its name, except those that have their defaults."""
    off = {**COMMON, "weight_decay": 0.0, **METHODS[group["algorithm"]].options}
    for option in options:
        if option == "algorithm":
            yield str(group[option])
        elif option in group and not (option in off and equal(group[option], off[option])):
            yield f"{option}-{_text(group[option])}"


def _text(value: Any) -> str:
    text = f"{float(value):g}" if is_one_number(value) else str(value)
    return re.sub(r"[^\w.]+", "-", text, flags=re.ASCII).strip("-")
