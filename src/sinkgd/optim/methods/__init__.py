"""The table of methods, by the ``algorithm`` of a group. `sinkgd.contrib` adds methods to it."""

import importlib
from collections.abc import Iterator, Mapping

from sinkgd.optim.method import Method
from sinkgd.optim.methods.adamw import AdamW
from sinkgd.optim.methods.multi_normalized import MultiNormalized, swan_norms
from sinkgd.optim.methods.normalize import Normalize
from sinkgd.optim.methods.sinkhorn import Sinkhorn


class MethodTable(Mapping[str, Method]):
    """Methods by name.

    A package that adds methods is imported when a name is not found, or when the names are listed.
    So `import sinkgd` does not wait for methods that the program does not use.
    """

    def __init__(self, methods: Mapping[str, Method]) -> None:
        self._methods = dict(methods)
        self._packages: list[str] = []

    def add(self, methods: Mapping[str, Method]) -> None:
        """Add ``methods`` to the table."""
        self._methods.update(methods)

    def add_package(self, name: str) -> None:
        """Let the package called ``name`` add its methods when they are needed."""
        self._packages.append(name)

    def __getitem__(self, name: str) -> Method:
        if name not in self._methods:
            self._import_packages()
        return self._methods[name]

    def __iter__(self) -> Iterator[str]:
        self._import_packages()
        return iter(self._methods)

    def __len__(self) -> int:
        self._import_packages()
        return len(self._methods)

    def _import_packages(self) -> None:
        for name in self._packages:
            importlib.import_module(name)


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
