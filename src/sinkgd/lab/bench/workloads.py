"""What is timed: the matrices of real models, and a few special collections.

Shapes are those of the modules that the presets build, as the optimizer sees them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn

from sinkgd.lab.models import LanguageModel, build_model

Shape = tuple[int, ...]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_TOO_SLOW = "left out of llama-1b, which is 24 times llama-1b-layer; timed there"


@dataclass(frozen=True)
class Workload:
    """Parameters that one optimizer step updates."""

    name: str
    title: str  # what they are, in words
    shapes: Callable[[], tuple[Shape, ...]]
    model: str | None = None  # the preset, where they are all parameters of a model
    dtypes: tuple[str, ...] = tuple(DTYPES)  # those it is timed in
    without_slow: str | None = None  # why slow contenders are left out, where they are


@cache
def matrix_shapes(preset: str, layers: int | None = None) -> tuple[Shape, ...]:
    """Return the shapes (m, n) of the linear weights inside a preset's blocks.

    Args:
        preset: A LLaMA in `sinkgd.lab.models.PRESETS`.
        layers: Count only the first so many blocks; all by default.

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
