"""Backends under ``torch.compile``: custom operators that run the backend of the same name.

A compiler cannot look into a backend's loops. It sees the operators ``torch.ops.sinkgd.scales`` and
``torch.ops.sinkgd.update_``, with the shapes of their results. The backend is chosen when they run.
Learning rates are tensors in the graph, so that a new rate needs no new graph.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkgd.kernels import registry
from sinkgd.kernels.backend import Backend, CorrectedScales, Scales
from sinkgd.kernels.eager import EagerBackend, without_corrections
from sinkgd.precision import in_full_precision


def select(name: str, device: torch.device) -> Backend:
    """Return the backend called ``name`` for ``device``, as `registry.select` does.

    While a graph is captured, return a backend that puts the operators into the graph.
    """
    if torch.compiler.is_compiling():
        return CompiledBackend(name)
    return registry.select(name, device)


class CompiledBackend(EagerBackend):
    """The operators, which run the backend called ``name``. The compiler sees all other methods."""

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
        keep: float | Tensor,
        step: float | Tensor,
        allowed: Sequence[Tensor] | None = None,
        keys: Sequence[Tensor] | None = None,
    ) -> None:
        """Set each parameter to ``keep * param + step * row * grad * col``, rounded once."""
        grads, pairs = without_corrections(grads, scales)
        update_(
            list(params),
            list(grads),
            [row for row, _ in pairs],
            [col for _, col in pairs],
            _as_tensor(keep),
            _as_tensor(step),
            self.name,
            [] if allowed is None else list(allowed),
            [] if keys is None else list(keys),
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


@torch.library.custom_op("sinkgd::scales", mutates_args=())
def scales(
    grads: list[Tensor],
    num_iters: int,
    backend: str,
    tol: float | None,
    starts: list[Tensor | None],
) -> list[Tensor]:
    """Return the row and column scales of each gradient, alternating."""
    chosen = registry.select(backend, grads[0].device)
    run = in_full_precision(chosen.scales)
    found = run(grads, num_iters, tol=tol, starts=starts)
    return [scale.clone() for pair in found for scale in pair]  # results may not share memory


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


@torch.library.custom_op("sinkgd::update_", mutates_args={"params"})
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
) -> None:
    """Update each parameter from its gradient and scales. Empty lists: no flags, no keys."""
    chosen = registry.select(backend, params[0].device)
    pairs = [Scales(*pair) for pair in zip(rows, cols, strict=True)]
    in_full_precision(chosen.update_)(
        params,
        grads,
        pairs,
        keep=_as_number(keep),
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
) -> None:
    """Return nothing."""
