"""Parameters that a trainer exchanges after the optimizer was made.

accelerate exchanges them for FSDP2's DTensors of the same shape, which works. DeepSpeed ZeRO-1 and
ZeRO-2 exchange all parameters of a group for one flat piece, which has neither rows nor columns.
Others keep the parameter and set its ``data`` to a flat piece, or to another dtype.
"""

from collections.abc import Iterator, Sequence, Set
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.optim.algorithms import ELEMENTWISE
from sinkgd.optim.algorithms.contract import Group


class Met(NamedTuple):
    """The parameters that a group had when they were last checked."""

    params: list[Tensor]
    names: list[str]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]

    def is_changed(self, i: int, param: Tensor) -> bool:
        """Whether a parameter has lost the shape or the dtype with which it was checked."""
        return param.shape != self.shapes[i] or param.dtype != self.dtypes[i]


class Listed(NamedTuple):
    """A parameter and where it stands."""

    param: Tensor
    name: str  # as the model calls it, or what errors call it
    group: int
    place: int  # in its group
    number: int  # among all parameters of the optimizer


def listed(groups: Sequence[Group]) -> Iterator[Listed]:
    """Yield every parameter of the groups."""
    first = 0
    for index, group in enumerate(groups):
        for place, (name, param) in enumerate(named(group, index)):
            yield Listed(param, name, index, place, first + place)
        first += len(group["params"])


def index_of(groups: Sequence[Group]) -> dict[Tensor, Listed]:
    """Return every parameter of the groups by itself."""
    return {own.param: own for own in listed(groups)}


def is_at(param: Tensor, place: int, params: Sequence[Tensor]) -> bool:
    """Whether a list holds a parameter at a place."""
    return place < len(params) and params[place] is param


def meet(group: Group, index: int) -> Met:
    """Return what to remember of a group whose parameters were checked."""
    names, params = zip(*named(group, index), strict=True) if group["params"] else ((), ())
    shapes = [param.shape for param in params]
    return Met([*params], [*names], shapes, [param.dtype for param in params])


def named(group: Group, index: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a group with their names, or with what errors call them."""
    names = group.get("param_names") or ()
    for i, param in enumerate(group["params"]):
        yield (names[i] if i < len(names) else unnamed(i, index)), param


def unnamed(i: int, index: int) -> str:
    """Return what errors call parameter ``i`` of group ``index`` where it has no name."""
    return f"parameter {i} of group {index}"


def name_alike(groups: Sequence[Group], new: Group) -> None:
    """Name the parameters of groups without names if others have names; torch wants all."""
    params = new["params"]
    if isinstance(params, Set) or not groups:  # torch refuses a set
        return
    params = [params] if isinstance(params, Tensor) else list(params)
    new["params"] = params
    has_names = any(isinstance(param, tuple) for param in params)
    if "param_names" in groups[0] and not has_names:
        new["params"] = [(unnamed(i, len(groups)), param) for i, param in enumerate(params)]
    elif has_names and "param_names" not in groups[0]:
        for index, group in enumerate(groups):
            group["param_names"] = [unnamed(i, index) for i in range(len(group["params"]))]


def are_same(groups: Sequence[Group], met: Sequence[Met]) -> bool:
    """Whether the groups hold the very parameters that were checked."""
    return len(groups) == len(met) and all(
        len(group["params"]) == len(before.params) and all(map(is_, group["params"], before.params))
        for group, before in zip(groups, met, strict=True)
    )


def newcomers(groups: Sequence[Group], met: Sequence[Met]) -> Iterator[tuple[int, str, Tensor]]:
    """Yield the parameters that have not been checked: index of the group, name and parameter.

    Raises:
        TypeError: If one has another shape than the parameter that it replaces.
    """
    known = {
        param
        for before in met
        for i, param in enumerate(before.params)
        if not before.is_changed(i, param)
    }
    for index, group in enumerate(groups):
        new = [(name, param) for name, param in named(group, index) if param not in known]
        if new and index < len(met) and group["algorithm"] not in ELEMENTWISE:
            _check_shapes(group["params"], met[index], known)
        for name, param in new:
            yield index, name, param


def _check_shapes(params: Sequence[Tensor], before: Met, known: set[Tensor]) -> None:
    """Refuse parameters that replace others of another shape, or have another shape than before."""
    current, earlier = {*params}, {*before.params}
    gone = [i for i, param in enumerate(before.params) if param not in current]
    rest = [param for param in params if param not in known and param not in earlier]
    pairs = [(i, param) for i, param in enumerate(before.params) if param in current]
    for place, i in enumerate(gone):
        in_place = len(params) == len(before.params) and params[i] not in known
        pairs.append((i, params[i] if in_place else rest[min(place, len(rest) - 1)]))
    for i, new in sorted(pairs, key=lambda pair: pair[0]):
        if new.shape != before.shapes[i]:
            raise TypeError(
                f"{before.names[i]!r} had shape {tuple(before.shapes[i])} when its group was added "
                f"and was exchanged for a tensor of shape {tuple(new.shape)}. DeepSpeed ZeRO-1 and "
                "ZeRO-2 exchange parameters for flat pieces, which have neither rows nor columns; "
                "shard the model with fully_shard (FSDP2), or give the group algorithm='adamw'"
            )
