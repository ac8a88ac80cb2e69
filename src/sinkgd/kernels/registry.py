"""The backends, how one of them is chosen, and what ``torch.compile`` sees of it.

A compiler cannot look into a backend's loops. It sees the operators ``torch.ops.sinkgd.scales`` and
``torch.ops.sinkgd.update_``, with the shapes of their results. Each operator chooses the backend
when it runs. Learning rates are tensors in the graph, so that a new rate needs no new graph.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sinkgd.kernels.backend import Backend, Cautious, CorrectedScales, Keep, Scales, factor_of
from sinkgd.kernels.eager import EagerBackend, without_corrections
from sinkgd.precision import in_full_precision

# Backends that run on a type of device only if they are named; "auto" skips them. Triton's
# interpreter, which runs on CPUs, is for tests.
ONLY_BY_NAME = frozenset({("triton", "cpu")})


@cache
def backends() -> tuple[Backend, ...]:
    """Return every backend, fastest first, always the same objects."""
    # Imported by the first step, so that `import sinkgd` takes little time.
    from sinkgd.kernels.cpu import CpuBackend
    from sinkgd.kernels.triton import TritonBackend

    return CpuBackend(), TritonBackend(), EagerBackend()


def select(name: str, device: torch.device) -> Backend:
    """Return the backend called ``name`` for ``device``, as `find_backend` does.

    While ``torch.compile`` captures a graph, return one that puts operators into the graph.
    """
    return CompiledBackend(name) if torch.compiler.is_compiling() else find_backend(name, device)


def find_backend(name: str, device: torch.device) -> Backend:
    """Return the backend called ``name``, or for ``"auto"`` the fastest that runs on ``device``.

    If a backend for ``device`` is installed but cannot run, ``"auto"`` skips it, and a warning says
    why, once.

    Raises:
        ValueError: If no backend has this name, or the named backend does not run on ``device``.
        ImportError: If the named backend is not installed, or cannot run here. The message gives
            the reason; if the backend is not installed, it also says how to install it.
    """
    if name == "auto":
        return next(backend for backend in backends() if _takes(backend, device))
    for backend in backends():
        if backend.name == name:
            break
    else:
        names = ", ".join(["auto", *(backend.name for backend in backends())])
        raise ValueError(f"backend must be one of {names}; got {name!r}")
    reason = backend.missing()
    if reason is not None:
        raise ImportError(f"backend {name!r} cannot run here: {_with_remedy(backend, reason)}")
    if not backend.supports(device):
        raise ValueError(f"backend {name!r} does not run on {device}; use 'auto'")
    return backend


def describe(device: torch.device) -> list[tuple[str, bool, str]]:
    """List every backend, fastest first: name, whether ``"auto"`` may choose it, and a sentence.

    If ``"auto"`` cannot choose the backend, the sentence says why. Otherwise, it says how the
    backend works.
    """
    rows = []
    for backend in backends():
        reason = backend.missing()
        if reason is not None:
            rows.append((backend.name, False, _with_remedy(backend, reason)))
        elif not backend.supports(device):
            rows.append((backend.name, False, f"does not run on {device}"))
        elif (backend.name, device.type) in ONLY_BY_NAME:
            rows.append((backend.name, False, f"runs on {device} only if it is named"))
        else:
            rows.append((backend.name, True, str(backend.__class__.__doc__).splitlines()[0]))
    return rows


def _takes(backend: Backend, device: torch.device) -> bool:
    """Whether ``"auto"`` takes a backend for ``device``."""
    if (backend.name, device.type) in ONLY_BY_NAME or not backend.supports(device):
        return False
    reason = backend.missing()
    if reason is not None and _is_installed(backend):
        _warn_once(backend.name, reason)
    return reason is None


@cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(
        f"backend {name!r} cannot run here: {reason}. A slower backend is used instead; to silence "
        "this warning, name one, such as backend='eager'",
        RuntimeWarning,
        stacklevel=2,
    )


def _is_installed(backend: Backend) -> bool:
    return importlib.util.find_spec(backend.package) is not None


def _with_remedy(backend: Backend, reason: str) -> str:
    return reason if _is_installed(backend) else f"{reason}; {backend.install}"


class CompiledBackend(EagerBackend):
    """Calls the operators, which run the backend called ``name``.

    The compiler traces all other methods, which are those of `EagerBackend`.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def scales(
        self,
        grads: Sequence[Tensor],
        num_iters: int,
        *,
        tol: float | None = None,
        starts: Sequence[Tensor | None] | None = None,
    ) -> list[Scales]:
        """Run ``num_iters`` iterations on each gradient ``(..., m, n)``."""
        begin = [None] * len(grads) if starts is None else list(starts)
        found = scales(list(grads), num_iters, self.name, tol, begin)
        return [Scales(*pair) for pair in zip(found[::2], found[1::2], strict=True)]

    def update_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        scales: Sequence[Scales | CorrectedScales],
        *,
        keep: Keep,
        step: float | Tensor,
        allowed: Sequence[Tensor] | None = None,
        keys: Sequence[Tensor] | None = None,
    ) -> None:
        """Set each parameter to ``keep * param + step * row * grad * col``, rounded once."""
        grads, pairs = without_corrections(grads, scales)
        factor, is_cautious = factor_of(keep)
        update_(
            list(params),
            list(grads),
            [row for row, _ in pairs],
            [col for _, col in pairs],
            _as_tensor(factor),
            _as_tensor(step),
            self.name,
            [] if allowed is None else list(allowed),
            [] if keys is None else list(keys),
            is_cautious,
        )


def _as_tensor(value: float | Tensor) -> Tensor:
    # A product stays symbolic if the number may change. torch.tensor() would make it a constant.
    return (
        value
        if isinstance(value, Tensor)
        else torch.ones((), dtype=torch.float64, device="cpu") * value
    )


def _as_number(value: Tensor) -> float | Tensor:
    return float(value) if value.device.type == "cpu" else value  # do not wait for a device


# With this tag the operators run between the CUDA graphs of torch.compile, which must not own the
# tables that the operators keep on the device. Older versions of torch do not have the tag.
_OPTIONS: dict[str, Any] = (
    {"tags": torch.Tag.cudagraph_unsafe} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


@torch.library.custom_op("sinkgd::scales", mutates_args=(), **_OPTIONS)
def scales(
    grads: list[Tensor],
    num_iters: int,
    backend: str,
    tol: float | None,
    starts: list[Tensor | None],
) -> list[Tensor]:
    """Return the row and column scales of each gradient, alternating."""
    chosen = find_backend(backend, grads[0].device)
    run = in_full_precision(chosen.scales)
    found = run(grads, num_iters, tol=tol, starts=starts)
    return [scale.clone() for pair in found for scale in pair]  # results must not share memory


@scales.register_fake
def _(
    grads: list[Tensor],
    num_iters: int,  # noqa: ARG001 - the signature is the operator's
    backend: str,  # noqa: ARG001
    tol: float | None,  # noqa: ARG001
    starts: list[Tensor | None],  # noqa: ARG001
) -> list[Tensor]:
    shapes = []
    for grad in grads:
        dtype = torch.promote_types(grad.dtype, torch.float32)
        shapes.append(grad.new_empty((*grad.shape[:-1], 1), dtype=dtype))
        shapes.append(grad.new_empty((*grad.shape[:-2], 1, grad.shape[-1]), dtype=dtype))
    return shapes


@torch.library.custom_op("sinkgd::update_", mutates_args={"params"}, **_OPTIONS)
def update_(  # noqa: PLR0913, PLR0917 - the operator's signature is flat
    params: list[Tensor],
    grads: list[Tensor],
    rows: list[Tensor],
    cols: list[Tensor],
    keep: Tensor,
    step: Tensor,
    backend: str,
    allowed: list[Tensor],
    keys: list[Tensor],
    is_cautious: bool = False,
) -> None:
    """Update each parameter from its gradient and scales.

    An empty list stands for no ``allowed`` or no ``keys``. If ``is_cautious``, ``keep`` is the
    factor of a `Cautious`.
    """
    chosen = find_backend(backend, params[0].device)
    pairs = [Scales(*pair) for pair in zip(rows, cols, strict=True)]
    in_full_precision(chosen.update_)(
        params,
        grads,
        pairs,
        keep=Cautious(_as_number(keep)) if is_cautious else _as_number(keep),
        step=_as_number(step),
        allowed=allowed or None,
        keys=keys or None,
    )


@update_.register_fake
def _(  # noqa: PLR0913, PLR0917
    params: list[Tensor],
    grads: list[Tensor],
    rows: list[Tensor],
    cols: list[Tensor],
    keep: Tensor,
    step: Tensor,
    backend: str,
    allowed: list[Tensor],
    keys: list[Tensor],
    is_cautious: bool = False,
) -> None:
    """Return nothing."""
