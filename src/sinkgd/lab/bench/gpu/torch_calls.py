"""Calls of torch in a step: work of the host that must not grow with the number of matrices.

Launches of our kernels are replaced by nothing, so sizes do not matter.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sinkgd
from sinkgd.lab.bench.gpu.launches import taken_down, with_triton
from sinkgd.lab.bench.workloads import Shape
from sinkgd.lab.models import build_model

# AdamW's own: for the step counts, the update, and what holds back a step of the counts.
ADAMW = {"aten._foreach_add_.Scalar", "aten._fused_adamw_.default", "aten._foreach_sub_.List"}
_SMALLER = 64  # sides of a model's parameters are divided by it


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the calls of torch by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def calls_of_step(groups: Sequence[dict[str, Any]]) -> Counter[str]:
    """Count the calls of a step, by name: the second, as the first makes state and tables."""
    with with_triton(), taken_down():
        optimizer = sinkgd.SinkGD([{"lr": 1e-3, "nonfinite": "skip", **group} for group in groups])
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        optimizer.step()
        calls = Calls()
        with calls:
            optimizer.step()
    return calls.counts


def calls_of_matrices(shapes: Sequence[Shape], **options: Any) -> Counter[str]:
    """Count the calls of a step along matrices of these shapes."""
    params = [_ones(shape) for shape in shapes]
    return calls_of_step([{"params": params, "algorithm": "sinkgd", **options}])


def calls_of_a_matrix_more(**options: Any) -> float:
    """Return how many calls a step has more for each further matrix, of shapes that it has."""
    few, many = 2, 12
    shapes = [(32, 85), (85, 32), (32, 32)]
    counts = [calls_of_matrices(shapes * number, **options).total() for number in (few, many)]
    return (counts[1] - counts[0]) / ((many - few) * len(shapes))


def calls_of_model(preset: str, **options: Any) -> Counter[str]:
    """Count the calls of a step of a whole model, matrices by SinkGD and the rest by AdamW.

    Args:
        preset: A name in `sinkgd.lab.models.PRESETS`.
        options: Of the groups of matrices.
    """
    return calls_of_step(small_groups(preset, **options))


def small_groups(preset: str, **options: Any) -> list[dict[str, Any]]:
    """Return the groups of a model whose parameters are smaller."""
    with torch.device("meta"):
        model = build_model(preset)
    groups = [dict(group) for group in sinkgd.param_groups(model)]
    for group in groups:
        group["params"] = [
            _ones([max(2, side // _SMALLER) for side in param.shape])
            for _, param in group["params"]
        ]
        group.pop("param_names", None)
        if group["algorithm"] == "sinkgd":
            group.update(options)
    return groups


def _ones(shape: Sequence[int]) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape, dtype=torch.float32, device="cpu"))


def without_adamw(counts: Counter[str]) -> int:
    """Return the number of calls, AdamW's own apart."""
    return sum(count for name, count in counts.items() if name not in ADAMW)
