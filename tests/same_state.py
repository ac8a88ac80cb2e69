"""Whether two states are the same bit for bit: of optimizers, models or schedulers."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path


def differences(one: Any, other: Any) -> list[str]:
    """List the places at which two nested states differ in a value, a dtype or a type."""
    mine, theirs = (
        {str(path): leaf for path, leaf in tree_flatten_with_path(state)[0]}
        for state in (one, other)
    )
    places = [*dict.fromkeys([*mine, *theirs])]
    return [
        place
        for place in places
        if place not in mine or place not in theirs or not _same(mine[place], theirs[place])
    ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
