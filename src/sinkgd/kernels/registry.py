"""The table of backends, fastest first, and the choice of one for a device."""

import importlib.util
import warnings
from functools import cache

import torch

from sinkgd.kernels.backend import Backend
from sinkgd.kernels.cpu import CpuBackend
from sinkgd.kernels.eager import EagerBackend
from sinkgd.kernels.triton import TritonBackend

BACKENDS: tuple[Backend, ...] = (CpuBackend(), TritonBackend(), EagerBackend())

# Backends that "auto" skips on a type of device: triton's interpreter is for tests.
BY_NAME_ALONE = frozenset({("triton", "cpu")})


def select(name: str, device: torch.device) -> Backend:
    """Return the backend called ``name``, or for ``"auto"`` the fastest that runs on ``device``.

    If ``"auto"`` skips a backend that is installed for ``device``, a warning says why, once.

    Raises:
        ValueError: If there is no such backend, or it does not run on ``device``.
        ImportError: If it is named and not installed. The message says how to install it.
    """
    if name == "auto":
        return next(backend for backend in BACKENDS if _takes(backend, device))
    for backend in BACKENDS:
        if backend.name == name:
            break
    else:
        names = ", ".join(["auto", *(backend.name for backend in BACKENDS)])
        raise ValueError(f"backend must be one of {names}; got {name!r}")
    reason = backend.missing()
    if reason is not None:
        raise ImportError(f"backend {name!r} cannot run here: {_with_remedy(backend, reason)}")
    if not backend.supports(device):
        raise ValueError(f"backend {name!r} does not run on {device}; use 'auto'")
    return backend


def describe(device: torch.device) -> list[tuple[str, bool, str]]:
    """List every backend as (name, whether it can run on ``device``, why), fastest first."""
    rows = []
    for backend in BACKENDS:
        reason = backend.missing()
        if reason is not None:
            rows.append((backend.name, False, _with_remedy(backend, reason)))
        elif not backend.supports(device) or (backend.name, device.type) in BY_NAME_ALONE:
            rows.append((backend.name, False, f"does not run on {device}"))
        else:
            rows.append((backend.name, True, str(backend.__class__.__doc__).splitlines()[0]))
    return rows


def _takes(backend: Backend, device: torch.device) -> bool:
    """Whether ``"auto"`` takes a backend for ``device``."""
    if (backend.name, device.type) in BY_NAME_ALONE or not backend.supports(device):
        return False
    reason = backend.missing()
    if reason is not None and _is_installed(backend):
        _warn_once(backend.name, reason)
    return reason is None


@cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(
        f"backend {name!r} cannot run here: {reason}. A slower one takes its place; name it, e.g. "
        "backend='eager', to be told no more",
        RuntimeWarning,
        stacklevel=2,
    )


def _is_installed(backend: Backend) -> bool:
    return importlib.util.find_spec(backend.package) is not None


def _with_remedy(backend: Backend, reason: str) -> str:
    return reason if _is_installed(backend) else f"{reason}; {backend.install}"
