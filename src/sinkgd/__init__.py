"""Optimizers that by default keep no state for hidden matrices: SinkGD, SWAN and MNGD."""

import importlib as _importlib
import sys as _sys
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _sys.argv[:1] == ["-m"] and _sys.orig_argv[-len(_sys.argv)].startswith("sinkgd.lab"):
    # `begin` must run before torch is imported, and `python -m sinkgd.lab` imports this package,
    # and so torch, before the program's own code.
    from _sinkgd_cli import begin as _begin

    _begin()

from sinkgd.multi_normalize import multi_normalize as multi_normalize
from sinkgd.multi_normalize import residuals as residuals
from sinkgd.norms import ColumnNorm as ColumnNorm
from sinkgd.norms import DeflatedNorm as DeflatedNorm
from sinkgd.norms import FrobeniusNorm as FrobeniusNorm
from sinkgd.norms import Norm as Norm
from sinkgd.norms import RowNorm as RowNorm
from sinkgd.norms import SignNorm as SignNorm
from sinkgd.norms import SpectralNorm as SpectralNorm
from sinkgd.optim.describe_groups import describe_param_groups as describe_param_groups
from sinkgd.optim.from_adamw import from_adamw_state as from_adamw_state
from sinkgd.optim.methods import METHODS as _METHODS
from sinkgd.optim.mngd import MNGD as MNGD
from sinkgd.optim.nonfinite import NonFiniteGradientError as NonFiniteGradientError
from sinkgd.optim.param_groups import param_groups as param_groups
from sinkgd.optim.release import GradientRelease as GradientRelease
from sinkgd.optim.sinkgd import SinkGD as SinkGD
from sinkgd.optim.swan import SWAN as SWAN
from sinkgd.sinkhorn import sinkhorn_scales as sinkhorn_scales
from sinkgd.sinkhorn import sr_sinkhorn as sr_sinkhorn

if _TYPE_CHECKING:
    from sinkgd.contrib.adamw_spam import AdamWSPAM as AdamWSPAM
    from sinkgd.contrib.scale import SCALE as SCALE
    from sinkgd.contrib.scale import scale_groups as scale_groups
    from sinkgd.contrib.sinkgd_variant import SinkGDVariant as SinkGDVariant
    from sinkgd.contrib.spam import SPAM as SPAM
    from sinkgd.contrib.sron import SRON as SRON
    from sinkgd.contrib.tempered import TemperedSinkGD as TemperedSinkGD
    from sinkgd.contrib.tempered import temper as temper

__version__ = "0.1.0"

# Names of `sinkgd.contrib`. This package is imported when a program asks for one of the names, or
# when a parameter group names an algorithm that is not in `_METHODS` yet.
_IN_CONTRIB = {
    "AdamWSPAM": "adamw_spam",
    "SCALE": "scale",
    "scale_groups": "scale",
    "SinkGDVariant": "sinkgd_variant",
    "SPAM": "spam",
    "SRON": "sron",
    "TemperedSinkGD": "tempered",
    "temper": "tempered",
}
_METHODS.add_package("sinkgd.contrib")


def __dir__() -> list[str]:
    return sorted({*globals(), *_IN_CONTRIB, "contrib"})


if not _TYPE_CHECKING:  # type checkers see the imports above, and would accept any name

    def __getattr__(name: str) -> object:
        if name == "contrib":
            return _importlib.import_module("sinkgd.contrib")
        if name not in _IN_CONTRIB:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(_importlib.import_module(f"sinkgd.contrib.{_IN_CONTRIB[name]}"), name)
        globals()[name] = value
        return value

    # Without `__all__`, `from sinkgd import *` would leave out the names of `sinkgd.contrib`.
    __all__ = [name for name in __dir__() if not name.startswith("_")]
