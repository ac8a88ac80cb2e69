"""What is counted while triton's interpreter runs the kernels on a CPU: readings, and errors.

`main` is the program that counts, in a process of its own: whether kernels are interpreted is
decided when triton is imported. It writes a line of JSON.
"""

import json
import sys
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sinkgd import kernels
from sinkgd.lab.bench.bench_step import relative_error
from sinkgd.lab.bench.contenders import ITERATIONS
from sinkgd.lab.bench.gpu.launches import with_triton
from sinkgd.lab.bench.gpu.loads import Readings, readings
from sinkgd.lab.bench.gpu.own_process import output_of
from sinkgd.lab.bench.gpu.variants import RANK
from sinkgd.lab.bench.workloads import Shape
from sinkgd.lab.disk import parse_json
from sinkgd.optim.sinkgd import SinkGD

# Near square, wide, tall, and the columns of llama-1b that are no multiple of 16 bytes.
SHAPES: tuple[Shape, ...] = ((96, 128), (24, 688), (688, 24), (20, 5461))


@dataclass(frozen=True)
class Interpreted:
    """Figures of the interpreter."""

    readings: float  # of each entry of a gradient in a plain step
    deflated_readings: float  # the same in a deflated step, of its copies too
    deflated_copies: float  # float32 copies of each gradient that a deflated step makes
    relative_error: float  # of r·c against float64, float32 gradients
    deflated_error: float  # of a deflated update against float64, of its root mean square


def readings_of_step(rank: int, shapes: tuple[Shape, ...] = SHAPES) -> Readings:
    """Count what a step on bfloat16 reads of its gradients; deflated by a ``rank`` above 0."""
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
    return max(map(relative_error, found, exact))


def largest_deflated_error(shapes: tuple[Shape, ...] = SHAPES) -> float:
    """Return the largest error of a deflated update, as a part of the update's root mean square.

    The step on float64, which is the definition, is the reference.
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
    return max(float((x - y).abs().max() / y.square().mean().sqrt()) for x, y in pairs)


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


def interpreted() -> Interpreted:
    """Count in a process of its own.

    Raises:
        RuntimeError: If that process fails.
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
        readings=plain.an_entry,
        deflated_readings=deflated.an_entry,
        deflated_copies=deflated.copies,
        relative_error=largest_error(),
        deflated_error=largest_deflated_error(),
    )


def main() -> None:
    """Count, and write a line."""
    warnings.simplefilter("ignore")  # the interpreter's numbers are numpy's, which warns of NaN
    sys.stdout.write(json.dumps(asdict(count())) + "\n")
