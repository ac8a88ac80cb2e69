"""What is counted while triton's interpreter runs the kernels on a CPU: readings, and errors.

`main` is the program that counts. It runs in a process of its own, because triton decides at its
import whether kernels are interpreted. `main` writes a line of JSON.

A reading is one read of one entry. Loads by kernels are counted by address, entry by entry.
Readings by torch are counted from the arguments of its calls. Float32 copies of gradients are
watched like gradients.
"""

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sinkgd import SinkGD, kernels
from sinkgd.lab.bench.bench_step import relative_error
from sinkgd.lab.bench.contenders import ITERATIONS
from sinkgd.lab.bench.gpu.cases import RANK, output_of
from sinkgd.lab.bench.gpu.recorded import with_triton
from sinkgd.lab.bench.step_record import worst_of
from sinkgd.lab.bench.workloads import Shape
from sinkgd.lab.disk import parse_json

# Nearly square, wide, tall, and one with llama-1b's 5461 columns, where the size of a row is not a
# multiple of 16 bytes.
SHAPES: tuple[Shape, ...] = ((96, 128), (24, 688), (688, 24), (20, 5461))


@dataclass(frozen=True)
class Interpreted:
    """What is counted in the interpreter."""

    readings: float  # per entry of a gradient in a plain step
    deflated_readings: float  # the same in a deflated step, including readings of copies
    deflated_copies: float  # number of float32 copies per gradient that a deflated step makes
    relative_error: float  # error of r·c against float64, with float32 gradients
    deflated_error: float  # error of a deflated update against float64, relative to its RMS


def interpreted() -> Interpreted:
    """Count in a process of its own.

    Raises:
        RuntimeError: If the process fails.
    """
    try:
        written = output_of(__name__, "main", interprets=True)
    except RuntimeError as error:
        raise RuntimeError(f"triton's interpreter failed: {error}") from None
    fields: dict[str, Any] = parse_json(written)
    return Interpreted(**fields)


def count() -> Interpreted:
    """Count in this process, in which triton interprets kernels."""
    plain, deflated = readings_of_step(0), readings_of_step(RANK)
    return Interpreted(
        readings=plain.per_entry,
        deflated_readings=deflated.per_entry,
        deflated_copies=deflated.copies,
        relative_error=largest_error(),
        deflated_error=largest_deflated_error(),
    )


def main() -> None:
    """Count, and write the result."""
    warnings.simplefilter("ignore")  # the interpreter computes with numpy, which warns about NaN
    sys.stdout.write(json.dumps(asdict(count())) + "\n")


def readings_of_step(rank: int, shapes: tuple[Shape, ...] = SHAPES) -> "Readings":
    """Count the readings of bfloat16 gradients in a step, deflated if ``rank`` is above 0."""
    params = _params(shapes, torch.bfloat16)
    optimizer = SinkGD(params, lr=1e-3, deflated_rank=rank)
    with with_triton():
        optimizer.step()
        with readings([grad_of(param) for param in params]) as found:
            optimizer.step()
    return found


def largest_error(shapes: tuple[Shape, ...] = SHAPES) -> float:
    """Return the largest relative error of r·c on float32 gradients, against float64."""
    grads = [grad_of(param) for param in _params(shapes, torch.float32)]
    with with_triton() as backend:
        found = backend.scales(grads, ITERATIONS[0])
    eager = kernels.select("eager", torch.device("cpu"))
    exact = eager.scales([grad.double() for grad in grads], ITERATIONS[0])
    return worst_of(map(relative_error, found, exact))


def largest_deflated_error(shapes: tuple[Shape, ...] = SHAPES) -> float:
    """Return the largest error of a deflated update, divided by the update's root mean square.

    The reference is the same step on float64.
    """
    updates = []
    for dtype in (torch.float32, torch.float64):
        params = _params(shapes, torch.float32)
        made = [torch.nn.Parameter(torch.zeros_like(param, dtype=dtype)) for param in params]
        for zeros, param in zip(made, params, strict=True):
            zeros.grad = grad_of(param).to(dtype)
        with with_triton():
            SinkGD(made, lr=1.0, deflated_rank=RANK).step()
        updates.append([param.detach().double() for param in made])
    pairs = zip(*updates, strict=True)
    return worst_of(float((x - y).abs().max() / y.square().mean().sqrt()) for x, y in pairs)


def _params(shapes: tuple[Shape, ...], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(shape: Shape) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return drawn.to(dtype)

    params = []
    for shape in shapes:
        params.append(torch.nn.Parameter(normal(shape)))
        params[-1].grad = normal(shape)
    return params


def grad_of(param: Tensor) -> Tensor:
    """Return the gradient of a parameter that has one."""
    assert param.grad is not None
    return param.grad


# Calls that read only a tensor's shape, not its entries.
_SHAPE_CALLS = ("empty_like", "zeros_like", "ones_like", "full_like", "new_")


@dataclass
class Readings:
    """How many entries of gradients and of their copies were read, and how many were copied."""

    gradients: int  # number of entries of all gradients
    by_kernels: int = 0  # entries that kernels read
    by_torch: int = 0  # entries that torch read
    copied: int = 0  # entries that were copied
    _ranges: list[tuple[int, int]] = field(default_factory=list)

    def watch(self, x: Tensor) -> None:
        """Count the readings of a tensor from now on."""
        self._ranges.append((x.data_ptr(), x.data_ptr() + x.nbytes))

    def is_watched(self, x: Tensor) -> bool:
        """Whether a tensor's memory is watched."""
        return any(begin <= x.data_ptr() < end for begin, end in self._ranges)

    def load(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        """Count the loads of one instruction of one program."""
        for begin, end in self._ranges:
            self.by_kernels += int(np.count_nonzero((pointers >= begin) & (pointers < end) & mask))

    @property
    def per_entry(self) -> float:
        """Readings per entry of a gradient, on average."""
        return (self.by_kernels + self.by_torch) / self.gradients

    @property
    def copies(self) -> float:
        """Float32 copies per gradient, on average."""
        return self.copied / self.gradients


@contextmanager
def readings(grads: Sequence[Tensor]) -> Iterator[Readings]:
    """Count readings of gradients, by kernels in triton's interpreter and by torch."""
    from triton.runtime.interpreter import interpreter_builder as builder

    found = Readings(sum(grad.numel() for grad in grads))
    for grad in grads:
        found.watch(grad)
    masked = builder.create_masked_load

    def load(pointers: Any, mask: Any, *others: Any) -> Any:
        found.load(pointers.data, mask.data)
        return masked(pointers, mask, *others)

    sides = {_sides(grad) for grad in grads}
    with patch.object(builder, "create_masked_load", load), _TorchReadings(found, sides):
        yield found


class _TorchReadings(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts readings by torch, and copies: new float32 matrices with a gradient's sides."""

    def __init__(self, found: Readings, sides: set[tuple[int, ...]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found, self.sides = found, sides
        self.kept: list[Tensor] = []  # so that no other tensor takes a copy's memory

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        if not _is_view(func) and not any(name in str(func) for name in _SHAPE_CALLS):
            read = _tensors([*args, *(x for name, x in given.items() if name != "out")])
            self.found.by_torch += sum(x.numel() for x in read if self.found.is_watched(x))
        for x in _tensors(result):
            is_copy = x.dtype == torch.float32 and _sides(x) in self.sides
            if is_copy and not self.found.is_watched(x):
                self.found.copied += x.numel()
                self.found.watch(x)
                self.kept.append(x)
        return result


def _sides(x: Tensor) -> tuple[int, ...]:
    return tuple(sorted(x.shape[-2:]))


def _is_view(func: Any) -> bool:
    aliases = [one.alias_info for one in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, tuple | list):
        for x in found:
            yield from _tensors(x)
