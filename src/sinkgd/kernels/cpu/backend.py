"""The backend ``cpu``: compiled loops, and what happens to tensors that the loops cannot take.

The loops take float32 and bfloat16, in any mix, with dense rows or dense columns. Other tensors:
    gradients with other strides, or in another order in memory than their parameter: a copy is read
    float16 gradients: a float32 copy is read; `update_` leaves them to `EagerBackend`
    float64, parameters of other types or strides, tensor subclasses, tensors that autograd follows,
        empty tensors: `EagerBackend`
    a matrix whose squares leave float32's range: a copy scaled by powers of two is read, as in
        `sinkgd.kernels.eager`; if that fails, too, as with a non-finite entry: `EagerBackend`
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from sinkgd.kernels.backend import (
    Cautious,
    CorrectedScales,
    Descent,
    Keep,
    Matrices,
    Scales,
    Stack,
    finite_of,
    of_each,
)
from sinkgd.kernels.cpu.launch import torch_openmp
from sinkgd.kernels.cpu.layout import (
    DTYPES,
    MatrixLayout,
    ScaleBuffer,
    dense_input,
    float32_address,
    readable,
    readable_as,
    writable,
)
from sinkgd.kernels.cpu.products import CpuProducts, CpuSums, low_rank_factors
from sinkgd.kernels.cpu.tables import FiniteTable, GradientTable, Target
from sinkgd.kernels.eager import EagerBackend, sinkhorn
from sinkgd.kernels.equilibrate import equilibrate_, scales_of
from sinkgd.kernels.layout import check_scales, check_start, dense, matrix_of


class CpuBackend(EagerBackend):
    """Compiled loops on torch's own threads: one pass over a gradient per iteration, few copies."""

    name = "cpu"
    package = "numba"
    install = "in a clone of the repository, run: pip install '.[cpu]'"

    def missing(self) -> str | None:
        """Return what is missing, numba or torch's OpenMP runtime; None if the backend can run."""
        if importlib.util.find_spec("numba") is None:
            return "numba is not installed"
        if torch_openmp() is None:
            return "torch's OpenMP runtime lacks GOMP_parallel, or is not found; use 'eager'"
        return None

    def supports(self, device: torch.device) -> bool:
        """Whether ``device`` is a CPU."""
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
        solver = _Solver(grads, starts)
        solver.run(num_iters, tol)
        return list(solver.scales)

    def update_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        scales: Sequence[Scales | CorrectedScales],
        *,
        keep: Keep,
        step: float | Tensor,
        allowed: Sequence[Tensor] | None = None,
        keys: Sequence[Tensor] | None = None,
    ) -> None:
        """Set each parameter to ``keep * param + step * row * grad * col``, rounded once."""
        is_cautious = isinstance(keep, Cautious)
        table = GradientTable(_number(keep), float(step))
        read: list[Tensor] = []  # keeps copies alive until the loops are done
        written: list[Tensor] = []
        others: list[int] = []
        for i, (param, grad, own) in enumerate(zip(params, grads, scales, strict=True)):
            check_scales(param, own.row, own.col)
            flag = None if allowed is None else allowed[i]
            layout = writable(param) if _are_usual(own, flag) else None
            source = None if layout is None else readable_as(grad, param, layout)
            if layout is None or source is None:
                others.append(i)
                continue
            target = Target(
                param.data_ptr(),
                layout,
                flag=0 if flag is None else flag.data_ptr(),
                key=None if keys is None else int(keys[i]),
                is_cautious=is_cautious,
            )
            if isinstance(own, CorrectedScales):
                correction = own.correction.mT if layout.transposed else own.correction
                left, right = low_rank_factors(correction)
                rank, at = left.shape[-1], (left.data_ptr(), right.data_ptr())
                target = target._replace(rank=rank, left=at[0], right=at[1])
                read += (left, right)
            row = own.row
            if isinstance(own, CorrectedScales) and own.factor is not None:
                row = own.factor * row
                read.append(row)
            addresses = row.data_ptr(), own.col.data_ptr()
            table.add(source.tensor.data_ptr(), source.layout, addresses, target)
            read.append(source.tensor)
            written.append(param)
        table.update()
        increment_version(written)  # as an in-place operation of torch does
        if others:
            super().update_(
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
        keep: Keep,
        step: float | Tensor,
        tol: float | None = None,
        overflow: Tensor | None = None,
    ) -> Descent:
        """Update a matrix as soon as its scales are known, while its gradient is in the cache.

        This is possible if the loops can write the parameter, the user's parameter has only this
        matrix, and the gradient has the parameter's order in memory. `update_` updates all other
        matrices at the end. If ``overflow`` is True, nothing is updated.
        """
        params, grads, ranges, starts, keys = matrices
        forbidden = overflow is not None and bool(overflow)
        may_update = {own.start for own in ranges if len(own) == 1 and not forbidden}
        solver = _Solver(grads, starts)
        is_cautious = isinstance(keep, Cautious)
        targets: dict[int, Target] = {}
        for i, source in enumerate(solver.inputs):
            layout = writable(params[i]) if source is not None and i in may_update else None
            if source is not None and layout is not None and _match(layout, source.layout):
                key = None if keys is None else int(keys[i])
                target = Target(params[i].data_ptr(), layout, key=key, is_cautious=is_cautious)
                targets[i] = target
        factors = _number(keep), float(step)
        failed = solver.run(num_iters, tol, targets=targets, factors=factors)
        increment_version([params[i] for i in targets])
        if not failed and len(targets) == len(params):
            finite = torch.ones(len(ranges), dtype=torch.bool, device="cpu")
            return Descent(finite, solver.scales)
        finite = finite_of(solver.scales, ranges)
        if not forbidden:
            flags = of_each(finite, ranges)
            later = [i for i in range(len(params)) if i in failed or i not in targets]
            self.update_(
                [params[i] for i in later],
                [grads[i] for i in later],
                [solver.scales[i] for i in later],
                keep=keep,
                step=step,
                allowed=[flags[i] for i in later],
                keys=None if keys is None else [keys[i] for i in later],
            )
        return Descent(finite, solver.scales)

    def sums(self, grads: Sequence[Tensor]) -> CpuSums:
        """Return an object that sums the squares of gradients."""
        return CpuSums(grads)

    def products(self, stacks: Sequence[Stack]) -> CpuProducts:
        """Return an object that multiplies updates by vectors, and reads gradients each time."""
        return CpuProducts(stacks)

    def are_finite(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return ``(len(tensors),)`` bool: whether all entries of each tensor are finite."""
        flags = [True] * len(tensors)
        table = FiniteTable()
        read: list[int] = []
        for i, x in enumerate(tensors):
            if (
                type(x) in (Tensor, Parameter)
                and x.dtype in DTYPES
                and x.is_cpu
                and x.is_contiguous()
            ):
                table.add(x.data_ptr(), x.numel(), DTYPES[x.dtype])
                read.append(i)
            else:
                flags[i] = bool(super().are_finite([x]))
        for i, finite in zip(read, table.run(), strict=True):
            flags[i] = finite
        return torch.tensor(flags, dtype=torch.bool, device="cpu")


def _are_usual(scales: Scales | CorrectedScales, flag: Tensor | None) -> bool:
    """Whether the loops can read the scales and the flag."""
    return all(x.dtype == torch.float32 and x.is_contiguous() for x in scales[:2]) and (
        flag is None or (flag.dtype == torch.bool and flag.is_cpu)
    )


def _number(keep: Keep) -> float:
    """Return the factor of a parameter as the loops take it."""
    return float(keep.keep if isinstance(keep, Cautious) else keep)


def _match(param: MatrixLayout, grad: MatrixLayout) -> bool:
    """Whether parameter and gradient are a single matrix, with the same order in memory."""
    one = len(param.offsets) == 1
    return one and param[:2] == grad[:2] and param.transposed == grad.transposed


class _Solver:
    """Finds the scales of gradients ``(..., m, n)``, and updates parameters on the way.

    Args:
        grads: Gradients of any kind.
        starts: The column scales from which the iterations of each gradient begin; None for ones.
    """

    def __init__(self, grads: Sequence[Tensor], starts: Sequence[Tensor | None] | None) -> None:
        self.grads = grads
        self.starts = [None] * len(grads) if starts is None else starts
        for grad, start in zip(grads, self.starts, strict=True):
            if start is not None:
                check_start(grad, start)
        self.inputs = [readable(grad) for grad in grads]
        self.scales = ScaleBuffer([source and source.layout for source in self.inputs], grads)

    def run(
        self,
        num_iters: int,
        tol: float | None,
        *,
        targets: Mapping[int, Target] | None = None,
        factors: tuple[float, float] = (1.0, 0.0),
    ) -> set[int]:
        """Find all scales, and update the parameters in ``targets``.

        Returns:
            The indices of the gradients whose scales the loops did not find, or found only for a
            rescaled copy. The parameters of these gradients are not updated.
        """
        targets = targets or {}
        table = GradientTable(*factors)
        for i, source in enumerate(self.inputs):
            if source is None:
                continue
            x, layout = source
            start = self.starts[i]
            if start is not None:
                torch.mul(start, start, out=self.scales[i].col)
            table.add(
                x.data_ptr(),
                layout,
                self.scales.addresses[i],
                targets.get(i),
                started=start is not None,
            )
        failed = {i for i, source in enumerate(self.inputs) if source is None}
        for i in failed:
            self.scales.put(i, sinkhorn(self.grads[i], num_iters, tol=tol, start=self.starts[i]))
        for i, index in self._matrices(table.find_scales(num_iters, tol)):
            self._solve_again(i, index, num_iters, tol=tol)
            failed.add(i)
        return failed

    def _matrices(self, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield two indices for each matrix whose number in the table is given.

        They are the index of its gradient, and the index of the matrix in this gradient.
        """
        if not numbers:
            return
        matrices = [
            (i, index)
            for i, source in enumerate(self.inputs)
            if source is not None
            for index in range(len(source.layout.offsets))
        ]
        yield from (matrices[number] for number in numbers)

    def _solve_again(self, i: int, index: int, num_iters: int, *, tol: float | None) -> None:
        """Find the scales of a matrix whose squares leave float32's range, or are not finite."""
        source, start = self.inputs[i], self.starts[i]
        assert source is not None
        matrix = matrix_of(source.tensor, index)
        m, n = matrix.shape
        begin = None if start is None else start.view(-1, 1, n)[index]
        found = _rescaled(matrix, num_iters, tol=tol, start=begin)
        if found is None:
            found = sinkhorn(matrix, num_iters, tol=tol, start=begin)
        own = self.scales[i]
        own.row.view(-1, m, 1)[index] = found.row
        own.col.view(-1, 1, n)[index] = found.col


def _rescaled(
    matrix: Tensor, num_iters: int, *, tol: float | None, start: Tensor | None
) -> Scales | None:
    """Run the loops on a copy scaled by powers of two; return None if that fails, too.

    Powers of two change no rounding, so the bits are those of a float32 with unlimited range.
    """
    S = matrix.to(torch.float32, copy=True).abs_()
    divisors = equilibrate_(S)
    S, layout = dense_input(dense(S))
    m, n = S.shape
    first = divisors.t if start is None else divisors.t * start
    found = Scales(
        torch.empty(m, 1, dtype=torch.float32, device="cpu"), first.square().float().reshape(1, n)
    )
    table = GradientTable()
    addresses = float32_address(found.row), float32_address(found.col)
    table.add(S.data_ptr(), layout, addresses, started=True)
    if table.find_scales(num_iters, tol):
        return None
    return scales_of(found.row / divisors.s, found.col / divisors.t, torch.float32)
