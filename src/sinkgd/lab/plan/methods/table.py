"""All methods by their names."""

from collections.abc import Mapping
from types import MappingProxyType

from sinkgd.lab.names import suggest
from sinkgd.lab.naming import GONE
from sinkgd.lab.plan.methods.baselines import BASELINES
from sinkgd.lab.plan.methods.family import FAMILY
from sinkgd.lab.plan.methods.method import Method
from sinkgd.lab.train.config import ConfigError

METHODS: Mapping[str, Method] = MappingProxyType(
    {method.name: method for method in (*FAMILY, *BASELINES)}
)


def find_method(name: str) -> Method:
    """Return the method called ``name``.

    Raises:
        ConfigError: If there is none; the message gives the nearest name.
    """
    if name in GONE:
        raise ConfigError(f"optimizer is {name!r}; it is called {GONE[name]!r} now")
    if name not in METHODS:
        raise ConfigError(f"optimizer is {name!r}; {suggest(name, METHODS)}")
    return METHODS[name]
