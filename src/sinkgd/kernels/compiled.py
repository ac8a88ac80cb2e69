"""Backends inside a graph of ``torch.compile``: the same contract, by operators that torch knows.

A compiler cannot look into the loops of a backend. It sees two operators instead,
``torch.ops.sinkgd.scales`` and ``torch.ops.sinkgd.update_``, with the shapes of what they return;
which backend runs is chosen when they are called. Learning rates are tensors to it, so that a new
one needs no new graph.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkgd.deflation import StoredProducts
from sinkgd.kernels import registry
from sinkgd.kernels.backend import Backend, Lowered, Scales, Stack
from sinkgd.kernels.eager import EagerBackend
from sinkgd.kernels.products import eager_products, nothing_to_take
from sinkgd.kernels.sums import EagerSums
from sinkgd.kernels.two_halves import TwoHalves
from sinkgd.precision import in_full_precision


def select(name: str, device: torch.device) -> Backend:
    """Return the backend called ``name`` for ``device``, as `registry.select` does.

    While a graph is captured it is one that puts the operators into the graph.
    """
    if torch.compiler.is_compiling():
        return CompiledBackend(name)
    return registry.select(name, device)


class CompiledBackend(TwoHalves):
    """The operators, which run the backend called ``name``."""

    package = "torch"
    install = "pip install sinkgd"

    def __init__(self, name: str) -> None:
        self.name = name

    def missing(self) -> str | None:
        """It is asked when the operators run."""
        return None

    def supports(self, device: torch.device) -> bool:  # noqa: ARG002 - part of the contract
        """It is asked when the operators run."""
        return True

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

    def sums(self, grads: Sequence[Tensor]) -> EagerSums:
        """Return the sums of the squares of gradients, in plain torch."""
        return EagerSums(grads)

    def products(self, stacks: Sequence[Stack]) -> StoredProducts:
        """Return the products of updates; the compiler can look into these."""
        return eager_products(stacks)

    def are_finite(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return ``(len(tensors),)`` bool; the compiler can look into this one."""
        return EagerBackend().are_finite(tensors)

    def update_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        scales: Sequence[Scales | Lowered],
        *,
        keep: float | Tensor,
        step: float | Tensor,
        allowed: Sequence[Tensor] | None = None,
        keys: Sequence[Tensor] | None = None,
    ) -> None:
        """Set each parameter to ``keep * param + step * row * grad * col``, rounded once."""
        grads, pairs = nothing_to_take(grads, scales)
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
    # A product stays symbolic where the number may change; torch.tensor() would fix it.
    return (
        value
        if isinstance(value, Tensor)
        else torch.ones((), dtype=torch.float64, device="cpu") * value
    )


def _as_number(value: Tensor) -> float | Tensor:
    return float(value) if value.device.type == "cpu" else value  # a device is not waited for


@torch.library.custom_op("sinkgd::scales", mutates_args=())
def scales(
    grads: list[Tensor],
    num_iters: int,
    backend: str,
    tol: float | None,
    starts: list[Tensor | None],
) -> list[Tensor]:
    """Return row and column scales of each gradient, in turns."""
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
    """Update each parameter from its gradient and scales.

    Empty lists stand for no flags and no keys.
    """
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
    """Nothing comes back."""
