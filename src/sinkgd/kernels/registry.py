"""The table of backends, fastest first, and the choice of one for a device."""

import torch

from sinkgd.kernels.backend import Backend
from sinkgd.kernels.cpu import CpuBackend
from sinkgd.kernels.eager import EagerBackend
from sinkgd.kernels.triton import TritonBackend

BACKENDS: tuple[Backend, ...] = (CpuBackend(), TritonBackend(), EagerBackend())

# Backends that "auto" passes over on a type of device: triton's interpreter is there for tests.
BY_NAME_ALONE = frozenset({("triton", "cpu")})


def select(name: str, device: torch.device) -> Backend:
    """Return the backend called ``name``; for ``"auto"`` the fastest that runs on ``device``.

    Raises:
        ValueError: If there is no such backend, or it does not run on ``device``.
        ImportError: If it was asked for and is not installed; the message says how to get it.
    """
    if name == "auto":
        return next(
            backend
            for backend in BACKENDS
            if (backend.name, device.type) not in BY_NAME_ALONE
            and backend.missing() is None
            and backend.supports(device)
        )
    for backend in BACKENDS:
        if backend.name == name:
            break
    else:
        names = ", ".join(["auto", *(backend.name for backend in BACKENDS)])
        raise ValueError(f"backend must be one of {names}; got {name!r}")
    reason = backend.missing()
    if reason is not None:
        raise ImportError(f"backend {name!r} cannot run here: {reason}; {backend.install}")
    if not backend.supports(device):
        raise ValueError(f"backend {name!r} does not run on {device}; use 'auto'")
    return backend


def describe(device: torch.device) -> list[tuple[str, bool, str]]:
    """List every backend as (name, whether it can run on ``device``, why), fastest first."""
    rows = []
    for backend in BACKENDS:
        reason = backend.missing()
        if reason is not None:
            rows.append((backend.name, False, f"{reason}; {backend.install}"))
        elif not backend.supports(device) or (backend.name, device.type) in BY_NAME_ALONE:
            rows.append((backend.name, False, f"does not run on {device}"))
        else:
            rows.append((backend.name, True, str(backend.__class__.__doc__).splitlines()[0]))
    return rows
