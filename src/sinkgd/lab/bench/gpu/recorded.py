"""Steps whose launches are recorded instead of started, and the calls of torch in a step.

The calls of torch are work of the host that should not grow with the number of matrices. Launches
do nothing while these calls are counted, so sizes do not matter.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch
from warnings import catch_warnings, filterwarnings

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sinkgd import SinkGD, SinkGDVariant, kernels, param_groups
from sinkgd.kernels.triton import TritonBackend
from sinkgd.lab.bench.gpu.cases import CACHE_BYTES, Target
from sinkgd.lab.bench.workloads import Shape
from sinkgd.lab.models import build_model


@dataclass(frozen=True)
class Launch:
    """A kernel, and its arguments."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def gradient_bytes(self) -> int | None:
        """Bytes per entry of the gradient that the kernel reads; None if it reads no gradient."""
        kind = self.constants.get("GRAD_DTYPE", self.constants.get("DTYPE"))
        return None if kind is None else int(kind.primitive_bitwidth) // 8


@contextmanager
def recorded_launches(target: Target | None = None) -> Iterator[list[Launch]]:
    """Record launches instead of starting them, so that kernels write nothing.

    Args:
        target: The GPU whose compiler options the launches get; by default they get none.
    """
    from sinkgd.kernels.triton import backend, launch

    found: list[Launch] = []

    def record(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        found.append(Launch(kernel, programs, arguments, constants))

    replaced: list[tuple[Any, str, Any]] = [
        (launch, "launch", record),
        (launch, "is_direct", lambda: False),
        (backend, "INTERPRETER_BYTES", CACHE_BYTES),
    ]
    if target is not None:
        own = launch.GpuTarget(target.backend, target.warp)
        replaced.append((launch, "target_of", lambda _: own))
    with ExitStack() as stack:
        for module, name, value in replaced:
            stack.enter_context(patch.object(module, name, value))
        yield found


def take_step(
    shapes: Sequence[Shape],
    *,
    dtype: str = "bfloat16",
    param_dtype: str | None = None,
    transposed: bool = False,
    on_device: bool = False,
    whole_rows: bool = True,
    **options: Any,
) -> None:
    """Take a step with the backend triton; gradients are allocated, but never written.

    Args:
        shapes: Shapes of the parameters.
        dtype: Type of the gradients.
        param_dtype: Type of the parameters; by default that of the gradients.
        transposed: Whether columns, instead of rows, are contiguous in memory.
        on_device: Whether kernels read the learning rate from the device.
        whole_rows: Whether programs hold whole rows.
        options: Options of `sinkgd.SinkGDVariant`.
    """
    made = [_empty(shape, param_dtype or dtype, transposed=transposed) for shape in shapes]
    params = [nn.Parameter(x) for x in made]
    for param, shape in zip(params, shapes, strict=True):
        if param_dtype is not None:
            param.grad_dtype = None  # allows any type
        param.grad = _empty(shape, dtype, transposed=transposed)
    lr = torch.tensor(1e-3, dtype=torch.float32, device="cpu") if on_device else 1e-3
    with with_triton(whole_rows=whole_rows):
        with lost_updates_allowed():
            optimizer = SinkGDVariant(params, lr=lr, nonfinite="skip", **options)
        optimizer.step()


def _empty(shape: Shape, dtype: str, *, transposed: bool) -> Tensor:
    *batch, m, n = shape
    own = (*batch, n, m) if transposed else shape
    made = torch.empty(own, dtype=getattr(torch, dtype), device="cpu")
    return made.mT if transposed else made


@contextmanager
def lost_updates_allowed() -> Iterator[None]:
    """Ignore the warning of lost updates: weights are uninitialized here, and may have any size."""
    with catch_warnings():
        filterwarnings("ignore", ".*rounding to the nearest loses", UserWarning)
        yield


@contextmanager
def with_triton(*, whole_rows: bool = True) -> Iterator[TritonBackend]:
    """Let every optimizer use a new backend triton, whose tensors may be on the CPU."""
    backend = TritonBackend(whole_rows=whole_rows)

    def select(*_: object) -> TritonBackend:
        return backend

    with patch.object(kernels, "select", select):
        yield backend


def launches_of_bucket() -> int:
    """Return how many launches a plain step takes for matrices that are launched together."""
    with recorded_launches() as launches:
        take_step([(2048, 2048)] * 2)
    return len(launches)


class TorchCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
    """Count the calls of torch in the second step; the first also creates state and tables."""
    with with_triton(), recorded_launches():
        optimizer = SinkGD([{"lr": 1e-3, "nonfinite": "skip", **group} for group in groups])
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        optimizer.step()
        calls = TorchCalls()
        with calls:
            optimizer.step()
    return calls.counts


def calls_of_matrices(shapes: Sequence[Shape], **options: Any) -> Counter[str]:
    """Count the calls of torch in a step of SinkGD on matrices of these shapes."""
    params = [_ones(shape) for shape in shapes]
    return calls_of_step([{"params": params, "algorithm": "sinkgd", **options}])


def calls_per_further_matrix(**options: Any) -> float:
    """Return how many more calls a step makes per further matrix of a shape that it already has."""
    few, many = 2, 12
    shapes = [(32, 85), (85, 32), (32, 32)]
    counts = [calls_of_matrices(shapes * number, **options).total() for number in (few, many)]
    return (counts[1] - counts[0]) / ((many - few) * len(shapes))


def calls_of_model(preset: str, **options: Any) -> Counter[str]:
    """Count the calls of a whole model's step: SinkGD updates matrices, and AdamW the rest.

    Args:
        preset: A name in `sinkgd.lab.models.PRESETS`.
        options: Options of the groups of matrices.
    """
    return calls_of_step(small_groups(preset, **options))


_SMALLER = 64  # divisor of the sides of a model's parameters


def small_groups(preset: str, **options: Any) -> list[dict[str, Any]]:
    """Return the groups of a model, with the sides of all parameters divided by 64."""
    with torch.device("meta"):
        model = build_model(preset)
    groups = [dict(group) for group in param_groups(model)]
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


# AdamW's own calls: for the step counts, for the update, and to undo a step count.
ADAMW = {"aten._foreach_add_.Scalar", "aten._fused_adamw_.default", "aten._foreach_sub_.List"}


def without_adamw(counts: Counter[str]) -> int:
    """Return the number of calls, not counting AdamW's own."""
    return sum(count for name, count in counts.items() if name not in ADAMW)
