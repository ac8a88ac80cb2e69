"""What the kernels support: which devices, and which tensors.

Gradients and parameters are float32, bfloat16 or float16, in any mix, with dense rows or dense
columns; scales are contiguous float32. Kernels read memory and record nothing for autograd, so they
support no tensors of a subclass and no tensors that autograd follows.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn import Parameter

from sinkgd.kernels.backend import CorrectedScales, Scales
from sinkgd.kernels.layout import layout_of, may_be_written
from sinkgd.kernels.triton.products import MAX_VECTORS
from sinkgd.kernels.triton.schedule import LONGEST

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def missing() -> str | None:
    """Return what is missing: triton or a C compiler; None if nothing is."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not interpreting() and not _has_compiler(os.environ.get("CC"), os.environ.get("PATH")):
        return "triton finds no C compiler for its launchers; install gcc or clang, or set CC"
    return None


def interpreting() -> bool:
    """Whether kernels run in triton's interpreter; this is fixed when they are first imported."""
    kernels = sys.modules.get("sinkgd.kernels.triton.primitives")
    if kernels is not None:
        return bool(kernels.IS_INTERPRETED)
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@cache
def _has_compiler(named: str | None, path: str | None) -> bool:
    return named is not None or any(shutil.which(name, path=path) for name in ("gcc", "clang"))


def supports(device: torch.device) -> bool:
    """Whether kernels run on a device: CUDA from compute capability 8.0, or ROCm.

    Under triton's interpreter, which serves tests, they run on CPUs only.
    """
    if interpreting():
        return device.type == "cpu"
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def native(x: Tensor) -> bool:
    """Whether kernels can read a tensor, provided that its rows or columns are dense."""
    return _native(type(x), x.dtype, x.shape) and not (x.requires_grad and torch.is_grad_enabled())


@lru_cache(maxsize=4096)
def _native(kind: type, dtype: torch.dtype, shape: torch.Size) -> bool:
    # The kernels read memory, where a subclass of Tensor may not have its entries.
    whole = len(shape) >= 2 and 0 not in shape and max(shape[-2:]) < 1 << 31
    return kind in (Tensor, Parameter) and dtype in DTYPES and whole


def readable(grad: Tensor, start: Tensor | None) -> bool:
    """Whether kernels can find the scales of a gradient, from ``start`` if it is given."""
    return native(grad) and (
        start is None
        or (start.dtype == torch.float32 and start.is_contiguous() and start.device == grad.device)
    )


def writable(
    param: Tensor,
    grad: Tensor,
    scales: Scales | CorrectedScales | None,
    allowed: Tensor | None,
    key: Tensor | None,
) -> bool:
    """Whether kernels can update a parameter by ``scales``; None means scales that they find.

    `subtracted` checks the correction of `CorrectedScales`.
    """
    pair = () if scales is None else (scales.row, scales.col)
    others = (grad, *pair, *(x for x in (allowed, key) if x is not None))
    return (
        native(param)
        and _native(type(grad), grad.dtype, grad.shape)
        and param.shape == grad.shape
        and may_be_written(param.shape, param.stride())
        and all(scale.dtype == torch.float32 and scale.is_contiguous() for scale in pair)
        and (allowed is None or allowed.dtype == torch.bool)
        and (key is None or key.dtype == torch.int64)
        and all(x.device == param.device for x in others)
    )


def multiplied(grads: Sequence[Tensor], scales: Sequence[Scales]) -> bool:
    """Whether kernels can multiply the updates of gradients by vectors."""
    return all(map(native, grads)) and all(
        x.dtype == torch.float32 and x.is_contiguous() and x.device == grads[0].device
        for pair in scales
        for x in pair
    )


def subtracted(scales: CorrectedScales, device: torch.device) -> bool:
    """Whether kernels can subtract the correction, a matrix of low rank, from an update."""
    factor = scales.factor
    return 0 < scales.correction.left.shape[-1] <= MAX_VECTORS and all(
        x.dtype == torch.float32 and x.device == device
        for x in (*scales.correction, *(() if factor is None else (factor,)))
    )


def rows_fit(grad: Tensor) -> bool:
    """Whether a gradient has dense rows in memory, each short enough for a program's registers."""
    layout = layout_of(grad.shape, grad.stride())
    return layout is not None and layout.Q <= LONGEST


def overflow_readable(overflow: Tensor | None, device: torch.device) -> bool:
    """Whether kernels can read the flag that forbids all writing, if there is one."""
    return overflow is None or (overflow.dtype == torch.bool and overflow.device == device)
