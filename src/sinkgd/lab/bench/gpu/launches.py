"""What a step would launch on a GPU: launches are taken down in place of being started."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sinkgd import kernels
from sinkgd.kernels.triton import TritonBackend
from sinkgd.lab.bench.gpu.models import CACHE_BYTES
from sinkgd.lab.bench.workloads import Shape
from sinkgd.optim.sinkgd import SinkGD


@dataclass(frozen=True)
class Launch:
    """A kernel, and what it was to be given."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A kind of GPU."""

    name: str
    backend: str  # "cuda" or "hip"
    architecture: int | str
    warp: int  # threads that run together


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32),
        Target("sm_90", "cuda", 90, 32),
        Target("sm_100", "cuda", 100, 32),
        Target("gfx942", "hip", "gfx942", 64),
    )
}


@contextmanager
def taken_down(target: Target | None = None) -> Iterator[list[Launch]]:
    """Take down launches; nothing that kernels would write is written.

    Args:
        target: Whose compiler options they get; none by default.
    """
    from sinkgd.kernels.triton import backend, descent, launch, launcher

    found: list[Launch] = []

    def take_down(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        found.append(Launch(kernel, programs, arguments, constants))

    with ExitStack() as stack:
        stack.enter_context(patch.object(launch, "launch", take_down))
        stack.enter_context(patch.object(backend, "INTERPRETER_BYTES", CACHE_BYTES))
        stack.enter_context(patch.object(launcher, "is_direct", lambda: False))
        if target is not None:
            stack.enter_context(_options_for(target))
        for cached in (descent.sweep_constants, descent.finish_constants):
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        yield found


@contextmanager
def _options_for(target: Target) -> Iterator[None]:
    """Let the backend choose the compiler's options for a target in place of a tensor's device."""
    from sinkgd.kernels.triton import descent, launch, products

    def of_panels(_: torch.device, threads: int, **how: bool) -> dict[str, object]:
        every = {"bare": False, "lean": False, **how}
        return descent.options_of(target.backend, target.warp, threads, **every)

    def of_tiles(_: torch.device, **how: Any) -> dict[str, object]:
        return launch.options_of(target.backend, target.warp, **{"first": False, **how})

    def of_products(_: torch.device, **how: bool) -> dict[str, object]:
        return products.options_of(target.backend, target.warp, **{"wide": True, **how})

    replaced: list[tuple[Any, str, Any]] = [
        (descent, "panel_options", of_panels),
        (launch, "compile_options", of_tiles),
        (launch, "multiplies_tf32", lambda _: target.backend == "cuda"),
        (products, "options", of_products),
    ]
    with ExitStack() as stack:
        for place, name, value in replaced:
            stack.enter_context(patch.object(place, name, value))
        yield


def step_of(
    shapes: Sequence[Shape],
    *,
    dtype: str = "bfloat16",
    param_dtype: str | None = None,
    transposed: bool = False,
    on_device: bool = False,
    whole_rows: bool = True,
    **options: Any,
) -> None:
    """Take a step along gradients that are allocated and never written, with the backend triton.

    Args:
        shapes: Of the parameters.
        dtype: Of the gradients.
        param_dtype: Of the parameters, that of the gradients by default.
        transposed: Whether columns are dense in place of rows.
        on_device: Whether the learning rate lies on the device, and kernels read it there.
        whole_rows: Whether programs hold whole rows.
        options: SinkGD's.
    """
    made = [_empty(shape, param_dtype or dtype, transposed=transposed) for shape in shapes]
    params = [torch.nn.Parameter(x) for x in made]
    for param, shape in zip(params, shapes, strict=True):
        if param_dtype is not None:
            param.grad_dtype = None  # any
        param.grad = _empty(shape, dtype, transposed=transposed)
    lr = torch.tensor(1e-3, dtype=torch.float32, device="cpu") if on_device else 1e-3
    with with_triton(whole_rows=whole_rows):
        SinkGD(params, lr=lr, nonfinite="skip", **options).step()


def _empty(shape: Shape, dtype: str, *, transposed: bool) -> Tensor:
    *batch, m, n = shape
    own = (*batch, n, m) if transposed else shape
    made = torch.empty(own, dtype=getattr(torch, dtype), device="cpu")
    return made.mT if transposed else made


@contextmanager
def with_triton(*, whole_rows: bool = True) -> Iterator[TritonBackend]:
    """Let every optimizer take a new backend triton, whose tensors may lie on the CPU."""
    backend = TritonBackend(whole_rows=whole_rows)

    def select(*_: object) -> TritonBackend:
        return backend

    with patch.object(kernels, "select", select):
        yield backend


def of_gradient(launch: Launch) -> int | None:
    """Return the bytes of an entry of the gradient that a kernel reads; None if it reads none."""
    kind = launch.constants.get("GRAD_DTYPE", launch.constants.get("DTYPE"))
    return None if kind is None else int(kind.primitive_bitwidth) // 8
