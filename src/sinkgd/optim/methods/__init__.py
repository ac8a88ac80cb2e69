"""The table of methods, by the ``algorithm`` of a group. `sinkgd.contrib` adds methods to it."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from sinkgd.optim.method import Method
from sinkgd.optim.methods.adamw import AdamW
from sinkgd.optim.methods.multi_normalized import MultiNormalized, swan_norms
from sinkgd.optim.methods.normalize import Normalize
from sinkgd.optim.methods.sinkhorn import Sinkhorn


class MethodTable(dict[str, Method]):
    """Methods by name.

    A package that adds methods is imported when a name is not found, or when the names are listed.
    So `import sinkgd` does not wait for methods that the program does not use. The table is a
    dict, so that a step finds its method as fast as in any dict. Its length is that of the dict,
    and so counts only the methods that are imported so far: the guards of `torch.compile` read the
    dict's length, too.
    """

    def __init__(self, methods: Mapping[str, Method]) -> None:
        super().__init__(methods)
        self._packages: list[str] = []

    def add_package(self, name: str) -> None:
        """Let the package called ``name`` add its methods when they are needed."""
        self._packages.append(name)

    def __missing__(self, name: str) -> Method:
        if name not in self:
            raise KeyError(name)
        return self[name]

    def __contains__(self, name: object) -> bool:
        if not super().__contains__(name):
            self._import_packages()
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        self._import_packages()
        return super().__iter__()

    def keys(self) -> Any:
        """Return the names of all methods."""
        self._import_packages()
        return super().keys()

    def values(self) -> Any:
        """Return all methods."""
        self._import_packages()
        return super().values()

    def items(self) -> Any:
        """Return the names of all methods, and the methods."""
        self._import_packages()
        return super().items()

    def _import_packages(self) -> None:
        for name in self._packages:
            importlib.import_module(name)


# "sinkgd" deflates only if the group has a ``deflated_rank``, as the groups of `param_groups` have.
METHODS = MethodTable(
    {
        "sinkgd": Sinkhorn(),
        "swan": MultiNormalized({"newton_schulz_steps": 5, "num_iters": 1}, swan_norms),
        "mngd": MultiNormalized({"norms": (), "num_iters": 5}, lambda group: tuple(group["norms"])),
        "normalize": Normalize(),
        "stateless": Sinkhorn(vectors=Normalize()),
        "adamw": AdamW(),
    }
)
