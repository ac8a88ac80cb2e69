"""The backend ``cpu``: which tensors the compiled loops take, and what becomes of the others.

They take float32 and bfloat16, in any mix, with dense rows or dense columns. What else there is:
    gradients with other strides, or turned against their parameter: a copy is read
    float16 gradients: a float32 copy is read for the scales; `EagerBackend` updates
    float64, parameters of other types or strides, tensor subclasses, gradients that autograd
        follows, empty ones: `EagerBackend`
    a matrix whose squares leave float32's range: a copy scaled by powers of two is read, as in
        `sinkgd.kernels.eager`; where that fails too, as with a non-finite entry, `EagerBackend`
"""

import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from sinkgd.kernels.backend import Scales
from sinkgd.kernels.cpu.form import DTYPES, Form, form_of
from sinkgd.kernels.cpu.jobs import LookJob, ScalesJob, UpdateJob
from sinkgd.kernels.cpu.team import torch_team
from sinkgd.kernels.eager import EagerBackend, level_, sinkhorn
from sinkgd.kernels.layout import aligned, dense, matrix_of


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
        sources = [_readable(grad) for grad in grads]
        found = _room(sources)
        job = ScalesJob()
        owners: list[int] = []  # of every matrix of the job, the gradient
        for i, (grad, source) in enumerate(zip(grads, sources, strict=True)):
            start = None if starts is None else starts[i]
            if source is None:
                found[i] = sinkhorn(grad, num_iters, tol=tol, start=start)
                continue
            x, form = source
            row, col = found[i]
            if start is not None:
                torch.mul(start, start, out=col)
            job.add(x.data_ptr(), form, row.data_ptr(), col.data_ptr(), started=start is not None)
            owners.extend([i] * len(form.offsets))
        for failed in job.run(num_iters, tol):
            i = owners[failed]
            source, place = sources[i], failed - owners.index(i)
            assert source is not None, "it was not in the job"
            start = None if starts is None else starts[i]
            _repair(source.tensor, found[i], place, num_iters, tol=tol, start=start)
        return [found[i] for i in range(len(grads))]

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
            form = form_of(param)
            source = None
            if form is not None and _can_write(param, form, row, col, flag):
                source = _beside(grad, param, form)
            if form is None or source is None:
                others.append(i)
                continue
            x, source_form = source
            job.add(
                (param.data_ptr(), x.data_ptr()),
                (form, source_form),
                (row.data_ptr(), col.data_ptr()),
                flag=0 if flag is None else flag.data_ptr(),
                key=None if keys is None else int(keys[i]),
            )
            read.append(x)
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

    def are_finite(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return ``(len(tensors),)`` bool: whether each holds finite numbers alone."""
        flags = [True] * len(tensors)
        job = LookJob()
        looked: list[int] = []
        for i, x in enumerate(tensors):
            if type(x) in (Tensor, Parameter) and x.dtype in DTYPES and x.is_contiguous():
                job.add(x.data_ptr(), x.numel(), DTYPES[x.dtype])
                looked.append(i)
            else:
                flags[i] = bool(EagerBackend().are_finite([x]))
        for i, finite in zip(looked, job.run(), strict=True):
            flags[i] = finite
        return torch.tensor(flags)


class Source(NamedTuple):
    """A gradient as the loops read it."""

    tensor: Tensor
    form: Form


def _readable(grad: Tensor) -> Source | None:
    """Return what the loops can read of ``grad``; None where `EagerBackend` must."""
    if grad.requires_grad and torch.is_grad_enabled():
        return None
    form = form_of(grad)
    if form is not None:
        return Source(grad, form)
    if type(grad) not in (Tensor, Parameter) or not grad.is_cpu or grad.numel() == 0:
        return None
    if grad.dtype == torch.float16:
        return _with_form(dense(grad.float()))
    return _with_form(dense(grad)) if grad.dtype in DTYPES else None


def _beside(grad: Tensor, param: Tensor, form: Form) -> Source | None:
    """Return ``grad`` as it is read beside ``param``; None where `EagerBackend` must."""
    own = form_of(grad)
    if own is not None and own.turned == form.turned and param.shape == grad.shape:
        return Source(grad, own)
    if type(grad) not in (Tensor, Parameter) or not grad.is_cpu or param.shape != grad.shape:
        return None
    return _with_form(aligned(grad, param)) if grad.dtype in DTYPES else None


def _with_form(x: Tensor) -> Source:
    form = form_of(x)
    assert form is not None, f"strides {x.stride()}"
    return Source(x, form)


def _can_write(param: Tensor, form: Form, row: Tensor, col: Tensor, flag: Tensor | None) -> bool:
    return (
        form.may_be_written
        and not (param.requires_grad and torch.is_grad_enabled())
        and row.dtype == col.dtype == torch.float32
        and row.is_contiguous()
        and col.is_contiguous()
        and (flag is None or (flag.dtype == torch.bool and flag.is_cpu))
    )


def _room(sources: Sequence[Source | None]) -> dict[int, Scales]:
    """Return room for the scales of every gradient that the loops read, by its place."""
    alike: dict[torch.Size, list[int]] = {}
    for i, source in enumerate(sources):
        if source is not None:
            alike.setdefault(source.tensor.shape, []).append(i)
    found: dict[int, Scales] = {}
    for shape, members in alike.items():
        *batch, m, n = shape
        rows = torch.empty(len(members), *batch, m, 1).unbind()
        cols = torch.empty(len(members), *batch, 1, n).unbind()
        found.update(zip(members, map(Scales, rows, cols), strict=True))
    return found


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
    S, form = _with_form(dense(S))
    m, n = S.shape
    first = t if start is None else t * start
    found = Scales(torch.empty(m, 1), first.square().reshape(1, n))
    job = ScalesJob()
    job.add(S.data_ptr(), form, found.row.data_ptr(), found.col.data_ptr(), started=True)
    if job.run(num_iters, tol):
        return None
    limit = torch.finfo(torch.float32).max
    return Scales((found.row / s).clamp(max=limit), (found.col / t).clamp(max=limit))
