"""What is timed: matrices of real models, all parameters of one model, and many small matrices.

The shapes of a model's parameters are those of the module that its preset builds. Gradients are
random, with rows and columns of different magnitudes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sinkgd.lab.models import LanguageModel, build_model

Shape = tuple[int, ...]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_TOO_SLOW = "timed on llama-1b-layer, not on llama-1b, which is 24 times as large"


@dataclass(frozen=True)
class Workload:
    """Parameters that one optimizer step updates."""

    name: str
    title: str  # a description
    shapes: Callable[[], tuple[Shape, ...]]
    model: str | None = None  # the preset, if the workload is all parameters of a model
    dtypes: tuple[str, ...] = tuple(DTYPES)  # the types in which it is timed
    without_slow: str | None = None  # why slow optimizers are left out; None if they are not


@cache
def matrix_shapes(preset: str, layers: int | None = None) -> tuple[Shape, ...]:
    """Return the shapes (m, n) of the linear weights inside a preset's blocks.

    Args:
        preset: A LLaMA in `sinkgd.lab.models.PRESETS`.
        layers: Number of blocks to take, from the first; all by default.

    Examples:
        >>> matrix_shapes("llama-1b", layers=1)[-3:]
        ((5461, 2048), (5461, 2048), (2048, 5461))
    """
    blocks = _on_meta(preset).blocks[:layers]
    return tuple(
        tuple(module.weight.shape) for module in blocks.modules() if isinstance(module, nn.Linear)
    )


@cache
def parameter_shapes(preset: str) -> tuple[Shape, ...]:
    """Return the shapes of all parameters of a preset."""
    return tuple(tuple(parameter.shape) for parameter in _on_meta(preset).parameters())


def _on_meta(preset: str) -> LanguageModel:
    with torch.device("meta"):
        return build_model(preset)


def _many_small() -> tuple[Shape, ...]:
    return ((64, 64),) * 2000


WORKLOADS = {
    workload.name: workload
    for workload in (
        *(
            Workload(name, f"the matrices of {name}", partial(matrix_shapes, name))
            for name in ("llama-60m", "llama-130m", "llama-350m")
        ),
        Workload(
            "llama-1b-layer",
            "the matrices of one layer of llama-1b",
            partial(matrix_shapes, "llama-1b", 1),
        ),
        Workload(
            "llama-1b",
            "the matrices of llama-1b",
            partial(matrix_shapes, "llama-1b"),
            without_slow=_TOO_SLOW,
        ),
        Workload(
            "llama-60m-hybrid",
            "all parameters of llama-60m, matrices by SinkGD and the rest by AdamW",
            partial(parameter_shapes, "llama-60m"),
            model="llama-60m",
        ),
        Workload("many-small", "2,000 matrices of 64×64", _many_small, dtypes=("float32",)),
    )
}


_MEMINFO = Path("/proc/meminfo")
_SPREAD = 0.5  # standard deviation of the logarithms of the factors on rows and columns


@dataclass(frozen=True)
class Problem:
    """Parameters, each with a gradient that stays the same from step to step."""

    params: list[nn.Parameter]
    model: nn.Module | None = field(
        default=None, repr=False
    )  # a model that has exactly these parameters; None if they belong to no model

    @property
    def grads(self) -> list[Tensor]:
        """The gradients, in the order of the parameters."""
        return [p.grad for p in self.params if p.grad is not None]

    @cached_property
    def flat_grads(self) -> Tensor:
        """A copy of the gradients in one vector, made once."""
        return torch.cat([grad.flatten() for grad in self.grads])

    @property
    def device(self) -> torch.device:
        """The device that holds the parameters."""
        return self.params[0].device

    @property
    def bytes(self) -> int:
        """Bytes of all parameters; the gradients take the same number."""
        return sum(p.numel() * p.element_size() for p in self.params)


def build_problem(workload: Workload, dtype: str, device: torch.device) -> Problem:
    """Make the parameters and gradients of a workload; the same arguments give the same tensors.

    Args:
        workload: The workload.
        dtype: Type of both parameters and gradients, a name in `DTYPES`.
        device: The device that holds them.
    """
    if workload.model is None:
        return random_problem(workload.shapes(), DTYPES[dtype], device)
    model = build_model(workload.model).to(device=device, dtype=DTYPES[dtype])
    params = list(model.parameters())
    _give_gradients(params, torch.Generator(device).manual_seed(1))
    return Problem(params, model)


def random_problem(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> Problem:
    """Make parameters of these shapes; their gradients' rows and columns differ in magnitude."""
    generator = torch.Generator(device).manual_seed(0)
    params = [
        nn.Parameter(
            torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
            .mul_(0.02)
            .to(dtype)
        )
        for shape in shapes
    ]
    _give_gradients(params, generator)
    return Problem(params)


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that is free for new tensors, or None if the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not _MEMINFO.exists():
        return None
    for line in _MEMINFO.read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _give_gradients(params: Sequence[nn.Parameter], generator: torch.Generator) -> None:
    for param in params:
        entries = torch.randn(
            param.shape, generator=generator, dtype=torch.float32, device=param.device
        ).mul_(1e-3)
        for axis in range(param.ndim):
            size = [1] * param.ndim
            size[axis] = param.shape[axis]
            sizes = torch.randn(
                size, generator=generator, dtype=torch.float32, device=param.device
            ).mul_(_SPREAD)
            entries.mul_(sizes.exp_())
        param.grad = entries.to(param.dtype)
