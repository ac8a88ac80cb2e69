"""Where the parameters of an optimizer stand, and whether they are those that were checked."""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from sinkgd.optim.algorithms.contract import Group, Slot
from sinkgd.optim.arguments import find_algorithm
from sinkgd.optim.exchanged import Listed, Met, are_same, index_of, is_at, listed, meet, newcomers
from sinkgd.optim.group_check import check_param


class Listing:
    """The parameters of the groups, each by itself.

    It is made once a step and anew where a parameter is no longer where it was. The groups are
    given with every call, as torch exchanges their list.
    """

    def __init__(self, groups: Sequence[Group] = ()) -> None:
        self._met: list[Met] = [meet(group, index) for index, group in enumerate(groups)]
        self._index: dict[Tensor, Listed] | None = None

    @property
    def is_made(self) -> bool:
        """Whether it was made since `begin_step`."""
        return self._index is not None

    def begin_step(self) -> None:
        """Forget where parameters stood; `find` looks again."""
        self._index = None

    def add(self, group: Group, index: int) -> None:
        """Add a group whose parameters were checked, the last one."""
        self._met.append(meet(group, index))
        self._index = None

    def check(self, groups: Sequence[Group]) -> None:
        """Check the parameters that came without ``add_param_group``."""
        if not torch.compiler.is_compiling() and not are_same(groups, self._met):
            self._check_newcomers(groups)

    def _check_newcomers(self, groups: Sequence[Group]) -> None:
        for index, name, param in newcomers(groups, self._met):
            group = groups[index]
            check_param(name, param, group, find_algorithm(group["algorithm"]))
        self._met = [meet(group, index) for index, group in enumerate(groups)]
        self._index = None

    def find(self, params: Collection[Tensor], groups: Sequence[Group]) -> list[Listed]:
        """Return where parameters stand in the groups; leave out those that are in none."""
        if self._index is None or not all(self._is_there(param, groups) for param in params):
            self.check(groups)
            self._index = index_of(groups)
        index = self._index
        return sorted((index[p] for p in params if p in index), key=lambda own: own.number)

    def _is_there(self, param: Tensor, groups: Sequence[Group]) -> bool:
        found = None if self._index is None else self._index.get(param)
        if found is None or found.group >= len(groups):
            return False
        return is_at(param, found.place, groups[found.group]["params"])

    def slots(
        self, groups: Sequence[Group], optimizer: str, some: Iterable[Listed] | None = None
    ) -> list[tuple[int, list[Slot]]]:
        """List what has a gradient: the number of the group, and its parameters of one device.

        Args:
            groups: Of the optimizer.
            optimizer: What errors call it.
            some: From `find`; all parameters by default.
        """
        found: dict[tuple[int, torch.device], list[Slot]] = {}
        is_compiling = torch.compiler.is_compiling()
        for param, name, index, place, number in listed(groups) if some is None else some:
            if param.grad is None:
                continue
            if not is_compiling and self._met[index].is_changed(place, param):
                self._check_newcomers(groups)
            if param.numel() == 0:
                continue
            if param.grad.is_sparse:
                raise TypeError(
                    f"{name!r} has a sparse gradient, which {optimizer} cannot normalize; make it "
                    "dense, e.g. Embedding(sparse=False)"
                )
            slot = Slot(name, number, param, param.grad)
            found.setdefault((index, param.device), []).append(slot)
        return [(index, slots) for (index, _), slots in found.items()]
