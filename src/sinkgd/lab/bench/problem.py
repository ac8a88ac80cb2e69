"""A workload's parameters and gradients in memory, and whether memory has room for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from sinkgd.lab.bench.workloads import DTYPES, Shape, Workload
from sinkgd.lab.models import build_model

_MEMINFO = Path("/proc/meminfo")
_SPREAD = 0.5  # standard deviation of the logarithm of the rows' and columns' sizes


@dataclass(frozen=True)
class Problem:
    """Parameters, each with a gradient that stays the same from step to step."""

    params: list[nn.Parameter]
    model: nn.Module | None = field(default=None, repr=False)  # whose parameters they all are

    @property
    def grads(self) -> list[Tensor]:
        """The gradients, in the order of the parameters."""
        return [p.grad for p in self.params if p.grad is not None]

    @cached_property
    def flat_grads(self) -> Tensor:
        """A copy of the gradients in one vector; there is one for all who ask."""
        return torch.cat([grad.flatten() for grad in self.grads])

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.params[0].device

    @property
    def bytes(self) -> int:
        """Bytes of all parameters; the gradients have as many."""
        return sum(p.numel() * p.element_size() for p in self.params)


def build_problem(workload: Workload, dtype: str, device: torch.device) -> Problem:
    """Make a workload's parameters and gradients, the same for the same workload.

    Args:
        workload: What to make.
        dtype: A name in `DTYPES`, of both parameters and gradients.
        device: Where.
    """
    if workload.model is None:
        return random_problem(workload.shapes(), DTYPES[dtype], device)
    model = build_model(workload.model).to(device=device, dtype=DTYPES[dtype])
    params = list(model.parameters())
    _give_gradients(params, torch.Generator(device).manual_seed(1))
    return Problem(params, model)


def random_problem(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> Problem:
    """Make parameters of these shapes, and gradients whose rows and columns differ in size."""
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
    """Return the memory that is free for new tensors; None where the system does not say."""
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
