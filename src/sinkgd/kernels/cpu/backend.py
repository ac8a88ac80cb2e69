"""The backend ``cpu``: which tensors the compiled loops take, and what becomes of the others.

They take float32 and bfloat16, in any mix, with dense rows or dense columns. What else there is:
    gradients with other strides, or turned against their parameter: a copy is read
    float16 gradients: a float32 copy is read for the scales; `EagerBackend` updates
    float64, parameters of other types or strides, tensor subclasses, gradients that autograd
        follows, empty ones: `EagerBackend`
    a matrix whose squares leave float32's range, or with zero rows or columns: a copy scaled by
        powers of two is read, as in `sinkgd.kernels.eager`; where that fails too, as with a
        non-finite entry, `EagerBackend`
"""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from sinkgd.kernels.backend import Scales
from sinkgd.kernels.cpu.jobs import DTYPES, ScalesJob, UpdateJob
from sinkgd.kernels.cpu.layout import aligned, dense, dense_layout, matrix_of, may_be_written
from sinkgd.kernels.cpu.team import torch_team
from sinkgd.kernels.eager import EagerBackend, level_, sinkhorn


class CpuBackend:
    """Compiled loops on torch's own threads: one pass over a gradient an iteration, no copy."""

    name = "cpu"
    install = "pip install 'sinkgd[cpu]'"

    def missing(self) -> str | None:
        """Say what is absent: numba, or the entries of torch's OpenMP runtime."""
        if importlib.util.find_spec("numba") is None:
            return "numba is not installed"
        if torch_team() is None:
            return "torch's OpenMP runtime has no GOMP_parallel; use 'eager'"
        return None

    def supports(self, device: torch.device) -> bool:
        """CPUs."""
        return device.type == "cpu"

    def scales(
        self,
        grads: Sequence[Tensor],
        num_iters: int,
        *,
        tol: float | None = None,
        starts: Sequence[Tensor | None] | None = None,
    ) -> list[Scales]:
        """Run ``num_iters`` iterations on each gradient ``(..., m, n)``."""
        results: dict[int, Scales] = {}
        sources: dict[int, Tensor] = {}
        alike: dict[torch.Size, list[int]] = {}
        for i, grad in enumerate(grads):
            source = _readable(grad)
            if source is None:
                start = None if starts is None else starts[i]
                results[i] = sinkhorn(grad, num_iters, tol=tol, start=start)
            else:
                sources[i] = source
                alike.setdefault(source.shape, []).append(i)
        job = ScalesJob()
        owners: list[int] = []  # of every matrix of the job, the gradient
        for shape, members in alike.items():
            for i, found in zip(members, _empty_scales(shape, len(members)), strict=True):
                source = sources[i]
                layout = dense_layout(source)
                start = None if starts is None else starts[i]
                if start is not None:
                    torch.mul(start, start, out=found.col)
                started = start is not None
                job.add(source, layout, *found, dtype=DTYPES[source.dtype], started=started)
                owners.extend([i] * len(layout.offsets))
                results[i] = found
        for failed in job.run(num_iters, tol):
            i = owners[failed]
            place = failed - owners.index(i)
            start = None if starts is None else starts[i]
            _repair(sources[i], results[i], place, num_iters, tol=tol, start=start)
        return [results[i] for i in range(len(grads))]

    def update_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        scales: Sequence[Scales],
        *,
        keep: float | Tensor,
        step: float | Tensor,
        allowed: Sequence[Tensor] | None = None,
        keys: Sequence[Tensor] | None = None,
    ) -> None:
        """Set each parameter to ``keep * param + step * row * grad * col``, rounded once."""
        job = UpdateJob()
        read: list[Tensor] = []  # keeps copies alive until the job is done
        written: list[Tensor] = []
        others: list[int] = []
        for i, (param, grad, (row, col)) in enumerate(zip(params, grads, scales, strict=True)):
            flag = None if allowed is None else allowed[i]
            if not _writable(param, grad, row, col, flag):
                others.append(i)
                continue
            source = aligned(grad, param)
            layouts = dense_layout(param), dense_layout(source)
            dtypes = DTYPES[param.dtype], DTYPES[source.dtype]
            key = None if keys is None else keys[i]
            job.add(param, source, layouts, Scales(row, col), flag, key, dtypes=dtypes)
            read.append(source)
            written.append(param)
        job.run(float(keep), float(step))
        increment_version(written)  # what an in-place operation of torch does
        if others:
            EagerBackend().update_(
                [params[i] for i in others],
                [grads[i] for i in others],
                [scales[i] for i in others],
                keep=keep,
                step=step,
                allowed=None if allowed is None else [allowed[i] for i in others],
                keys=None if keys is None else [keys[i] for i in others],
            )


@lru_cache(maxsize=1024)
def _is_native(kind: type, dtype: torch.dtype, on_cpu: bool, shape: torch.Size) -> bool:
    # The loops read memory: no subclass may stand behind it.
    return kind in (Tensor, Parameter) and dtype in DTYPES and on_cpu and 0 not in shape


def _native(x: Tensor) -> bool:
    return _is_native(type(x), x.dtype, x.is_cpu, x.shape)


def _readable(grad: Tensor) -> Tensor | None:
    """Return what the loops can read of ``grad``; None where `EagerBackend` must."""
    if grad.requires_grad and torch.is_grad_enabled():
        return None
    if _native(grad):
        return dense(grad)
    if grad.dtype == torch.float16 and type(grad) in (Tensor, Parameter) and grad.numel() > 0:
        return dense(grad.float())
    return None


def _writable(param: Tensor, grad: Tensor, row: Tensor, col: Tensor, flag: Tensor | None) -> bool:
    return (
        _native(param)
        and _native(grad)
        and param.shape == grad.shape
        and may_be_written(param.shape, param.stride())
        and row.dtype == col.dtype == torch.float32
        and row.is_contiguous()
        and col.is_contiguous()
        and (flag is None or (flag.dtype == torch.bool and flag.is_cpu))
    )


def _empty_scales(shape: torch.Size, count: int) -> list[Scales]:
    """Return room for the scales of ``count`` gradients of one shape."""
    *batch, m, n = shape
    row, col = torch.empty(count, *batch, m, 1), torch.empty(count, *batch, 1, n)
    return [Scales(*pair) for pair in zip(row.unbind(), col.unbind(), strict=True)]


def _repair(
    source: Tensor,
    found: Scales,
    place: int,
    num_iters: int,
    *,
    tol: float | None,
    start: Tensor | None,
) -> None:
    """Find the scales of one matrix of ``source`` whose squares left float32's range."""
    matrix = matrix_of(source, place)
    m, n = matrix.shape
    begin = None if start is None else start.view(-1, 1, n)[place]
    again = _rescaled(matrix, num_iters, tol=tol, start=begin)
    if again is None:
        again = sinkhorn(matrix, num_iters, tol=tol, start=begin)
    found.row.view(-1, m, 1)[place] = again.row
    found.col.view(-1, 1, n)[place] = again.col


def _rescaled(
    matrix: Tensor, num_iters: int, *, tol: float | None, start: Tensor | None
) -> Scales | None:
    """Run the loops on a copy scaled by powers of two; None where that fails too.

    Powers of two change no rounding, so the bits are those that an unbounded float32 would give.
    """
    S = matrix.to(torch.float32, copy=True).abs_()
    s, t = level_(S)
    S = dense(S)
    m, n = S.shape
    first = t if start is None else t * start
    found = Scales(torch.empty(m, 1), first.square().reshape(1, n))
    job = ScalesJob()
    job.add(S, dense_layout(S), *found, dtype=DTYPES[S.dtype], started=True)
    if job.run(num_iters, tol):
        return None
    limit = torch.finfo(torch.float32).max
    return Scales((found.row / s).clamp(max=limit), (found.col / t).clamp(max=limit))
