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

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from sinkgd.kernels.backend import Descent, Lowered, Matrices, Scales, Shared, Stack
from sinkgd.kernels.cpu.form import DTYPES, Form
from sinkgd.kernels.cpu.jobs import LookJob, MatricesJob, Write
from sinkgd.kernels.cpu.piece_sums import CpuSums
from sinkgd.kernels.cpu.products import CpuProducts, to_be_added
from sinkgd.kernels.cpu.reading import Reading
from sinkgd.kernels.cpu.sources import beside, writable
from sinkgd.kernels.cpu.team import torch_team
from sinkgd.kernels.eager import EagerBackend
from sinkgd.kernels.layout import check_scales
from sinkgd.kernels.two_halves import finite_of, of_each


class CpuBackend:
    """Compiled loops on torch's own threads: one pass over a gradient an iteration, no copy."""

    name = "cpu"
    package = "numba"
    install = "pip install 'sinkgd[cpu]'"
    packs_vectors = False

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
        reading = Reading(grads, starts)
        reading.run(num_iters, tol)
        return list(reading.room)

    def update_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        scales: Sequence[Scales | Lowered],
        *,
        keep: float | Tensor,
        step: float | Tensor,
        allowed: Sequence[Tensor] | None = None,
        keys: Sequence[Tensor] | None = None,
    ) -> None:
        """Set each parameter to ``keep * param + step * row * grad * col``, rounded once."""
        job = MatricesJob(float(keep), float(step))
        read: list[Tensor] = []  # keeps copies alive until the job is done
        written: list[Tensor] = []
        others: list[int] = []
        for i, (param, grad, own) in enumerate(zip(params, grads, scales, strict=True)):
            check_scales(param, own.row, own.col)
            flag = None if allowed is None else allowed[i]
            form = writable(param) if _are_usual(own, flag) else None
            source = None if form is None else beside(grad, param, form)
            if form is None or source is None:
                others.append(i)
                continue
            write = Write(
                param.data_ptr(),
                form,
                flag=0 if flag is None else flag.data_ptr(),
                key=None if keys is None else int(keys[i]),
            )
            if isinstance(own, Lowered):
                left, right = to_be_added(own.taken.mT if form.turned else own.taken)
                rank, at = left.shape[-1], (left.data_ptr(), right.data_ptr())
                write = write._replace(rank=rank, left=at[0], right=at[1])
                read += (left, right)
            scales_at = own.row.data_ptr(), own.col.data_ptr()
            job.add(source.tensor.data_ptr(), source.form, scales_at, write)
            read.append(source.tensor)
            written.append(param)
        job.take_steps()
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

    def descend_(
        self,
        matrices: Matrices,
        num_iters: int,
        *,
        keep: float | Tensor,
        step: float | Tensor,
        tol: float | None = None,
        overflow: Tensor | None = None,
    ) -> Descent:
        """Take the step of a matrix as soon as its scales are known: its gradient is in the cache.

        Only where that matrix is all that its owner has, and nothing else may forbid the step.
        """
        params, grads, owners, starts, keys = matrices
        forbidden = overflow is not None and bool(overflow)
        alone = {own.start for own in owners if len(own) == 1 and not forbidden}
        reading = Reading(grads, starts)
        writes: dict[int, Write] = {}
        for i, source in enumerate(reading.sources):
            form = writable(params[i]) if source is not None and i in alone else None
            if source is not None and form is not None and _fit(form, source.form):
                key = None if keys is None else int(keys[i])
                writes[i] = Write(params[i].data_ptr(), form, key=key)
        factors = float(keep), float(step)
        failed = reading.run(num_iters, tol, writes=writes, factors=factors)
        increment_version([params[i] for i in writes])
        if not failed and len(writes) == len(params):
            return Descent(torch.ones(len(owners), dtype=torch.bool, device="cpu"), reading.room)
        finite = finite_of(reading.room, owners)
        if not forbidden:
            flags = of_each(finite, owners)
            later = [i for i in range(len(params)) if i in failed or i not in writes]
            self.update_(
                [params[i] for i in later],
                [grads[i] for i in later],
                [reading.room[i] for i in later],
                keep=keep,
                step=step,
                allowed=[flags[i] for i in later],
                keys=None if keys is None else [keys[i] for i in later],
            )
        return Descent(finite, reading.room)

    def sums(self, grads: Sequence[Tensor]) -> CpuSums:
        """Return the sums of the squares of gradients."""
        return CpuSums(grads)

    def products(self, stacks: Sequence[Stack]) -> CpuProducts:
        """Return the products of updates, straight from the gradients."""
        return CpuProducts(stacks)

    def packed_products(
        self,
        grads: Sequence[Tensor],
        scales: Sequence[Scales],
        shared: Shared,
    ) -> None:
        """Return None: it has no products of vectors that are packed together."""

    def are_finite(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return ``(len(tensors),)`` bool: whether each holds finite numbers alone."""
        flags = [True] * len(tensors)
        job = LookJob()
        looked: list[int] = []
        for i, x in enumerate(tensors):
            if (
                type(x) in (Tensor, Parameter)
                and x.dtype in DTYPES
                and x.is_cpu
                and x.is_contiguous()
            ):
                job.add(x.data_ptr(), x.numel(), DTYPES[x.dtype])
                looked.append(i)
            else:
                flags[i] = bool(EagerBackend().are_finite([x]))
        for i, finite in zip(looked, job.run(), strict=True):
            flags[i] = finite
        return torch.tensor(flags, dtype=torch.bool, device="cpu")


def _are_usual(scales: Scales | Lowered, flag: Tensor | None) -> bool:
    return all(x.dtype == torch.float32 and x.is_contiguous() for x in scales[:2]) and (
        flag is None or (flag.dtype == torch.bool and flag.is_cpu)
    )


def _fit(param: Form, grad: Form) -> bool:
    """Whether both hold one matrix, as it lies in memory."""
    return len(param.offsets) == 1 and param[:2] == grad[:2] and param.turned == grad.turned
