"""Matrix products in full precision, whatever autocast and the matmul precision are set to.

Two settings lower the precision of a product of float32 matrices: autocast, which is set per
thread, and the float32 matmul precision (TF32 on a GPU, bfloat16 on some CPUs), which is set per
process.
"""

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_AUTOCAST_TYPES = ("cpu", "cuda", "xpu", "mps")
_FULL = ("none", "ieee")


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Make ``function`` return the same bits under autocast and reduced matmul precision.

    The matmul precision is set for the process: while ``function`` runs, other threads compute
    products in full precision, too.

    ``torch.compile`` captures ``function`` without autocast. It cannot capture a change of the
    matmul precision, so products that become part of a compiled graph follow
    ``torch.set_float32_matmul_precision``.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        lowered = [kind for kind in _AUTOCAST_TYPES if torch.is_autocast_enabled(kind)]
        if torch.compiler.is_compiling() or not _MATMUL.enter():
            return _without_autocast(lowered, function, *args, **kwargs)
        try:
            return _without_autocast(lowered, function, *args, **kwargs)
        finally:
            _MATMUL.leave()

    return run


def _without_autocast(
    kinds: list[str], function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> R:
    if not kinds:
        return function(*args, **kwargs)
    with torch.autocast(kinds[0], enabled=False):
        return _without_autocast(kinds[1:], function, *args, **kwargs)


class _MatmulPrecision:
    """Sets the float32 matmul precision to full, from the first `enter` to the last `leave`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entered = 0
        self._saved: list[tuple[Any, str]] = []

    def enter(self) -> bool:
        """Raise the precision, or keep it raised.

        Returns:
            False if the user's setting is full precision; `leave` must then not be called.
        """
        with self._lock:
            if self._entered == 0:
                self._saved = _reduced()
                if not self._saved:
                    return False
                for setting, _ in self._saved:
                    setting.fp32_precision = "ieee"
            self._entered += 1
            return True

    def leave(self) -> None:
        """If this is the last `leave`, restore the precision from before the first `enter`."""
        with self._lock:
            self._entered -= 1
            if self._entered == 0:
                for setting, precision in self._saved:
                    _restore(setting, precision)


class _OldSetting:
    """The setting of torch before 2.9, with the attribute of the newer settings."""

    @property
    def fp32_precision(self) -> str:
        """Return ``"ieee"``, or torch's name for a lower precision."""
        found = torch.get_float32_matmul_precision()
        return "ieee" if found == "highest" else found

    @fp32_precision.setter
    def fp32_precision(self, value: str) -> None:
        torch.set_float32_matmul_precision("highest" if value == "ieee" else value)


def _settings() -> tuple[Any, ...]:
    # Once a new setting has been written, torch refuses to read the old one. Writing the old one
    # sets both.
    backends: Any = torch.backends  # torch does not declare mkldnn.matmul
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        return backends.cuda.matmul, backends.mkldnn.matmul
    return (_OldSetting(),)


def _reduced() -> list[tuple[Any, str]]:
    """Return the settings below full precision, with their values."""
    found = [(setting, setting.fp32_precision) for setting in _SETTINGS]
    return [(setting, precision) for setting, precision in found if precision not in _FULL]


def _restore(setting: Any, precision: str) -> None:
    if not isinstance(setting, _OldSetting):
        # "none" follows torch.backends.fp32_precision, which a user may change later.
        setting.fp32_precision = "none"
        if setting.fp32_precision == precision:
            return
    setting.fp32_precision = precision


_SETTINGS = _settings()
_MATMUL = _MatmulPrecision()
