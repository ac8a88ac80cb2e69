"""The backend ``triton``: which tensors the kernels accept, and what happens to others.

The kernels accept float32, bfloat16 and float16, in any mix, with dense rows or dense columns. With
deflation, an update is neither stored nor copied, for up to 31 directions. All other cases:
    gradients with other strides, or of another order in memory than their parameter: a copy is read
    more than 31 directions: gradients are multiplied by 32 vectors at a time; above 32 directions,
        the updates are also stored in float32 before they are applied
    float64, parameters with other strides, tensor subclasses, tensors that autograd follows, empty
        tensors: `EagerBackend`

The speed of the kernels has not been measured.
"""

import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sinkgd.deflation import Products
from sinkgd.kernels.backend import (
    CorrectedScales,
    Descent,
    Keep,
    Matrices,
    Scales,
    Shared,
    Stack,
    factor_of,
    merge_descents,
    select_owners,
)
from sinkgd.kernels.eager import EagerBackend
from sinkgd.kernels.layout import aligned, check_scales, check_start, dense, dense_layout
from sinkgd.kernels.triton import support
from sinkgd.kernels.triton.descent import (
    DescentTensors,
    FlatScales,
    PreparedDescents,
)
from sinkgd.kernels.triton.half_iterations import (
    AREA,
    LowRankSides,
    UpdateFactors,
    UpdateOperands,
    find_scales,
    new_scratch,
    plan_of_scales,
    plan_of_update,
    update_parameters,
)
from sinkgd.kernels.triton.launch import on
from sinkgd.kernels.triton.product_plan import plan_of_products
from sinkgd.kernels.triton.products import MAX_VECTORS, SkinnyProducts, StackProducts
from sinkgd.kernels.triton.shard_sums import TritonSums
from sinkgd.kernels.triton.tables import DeviceTables, UpdateAddresses, operand_of

# At 3 TB/s a GPU reads about this many bytes from its memory while the host prepares a launch,
# which takes about 20 µs. A smaller bucket would make the GPU wait for the host. This has not been
# measured.
LAUNCH_BYTES = 1 << 26
INTERPRETER_BYTES = 1 << 20


class TritonBackend(EagerBackend):
    """Kernels for CUDA and ROCm: one launch runs an iteration, or half of one, on many matrices."""

    name = "triton"
    package = "triton"
    install = "pip install triton"  # torch's Linux wheels for CUDA and ROCm install it, too

    def __init__(self, *, whole_rows: bool = True, products_by_dot: bool = True) -> None:
        """Choose how gradients are read.

        Args:
            whole_rows: Whether a program keeps whole rows of a gradient in registers, so that one
                launch is one iteration and reads the gradient once. If not, or if rows are too
                long, a launch is half an iteration.
            products_by_dot: Whether kernels multiply gradients by vectors, and subtract the leading
                directions as they write a parameter. If not, torch does both, on updates stored in
                float32.
        """
        self.whole_rows = whole_rows
        self.products_by_dot = products_by_dot
        self._tables = DeviceTables()
        self._descents = PreparedDescents(self._tables)
        self._lock = threading.Lock()  # backward hooks may step from several threads

    @property
    def packs_vectors(self) -> bool:  # type: ignore[override]
        """Whether kernels compute products."""
        return self.products_by_dot

    def missing(self) -> str | None:
        """Return what is missing: triton or a C compiler; None if nothing is."""
        return support.missing()

    def supports(self, device: torch.device) -> bool:
        """Whether kernels run on ``device``; see `sinkgd.kernels.triton.support.supports`."""
        return support.supports(device)

    def scales(
        self,
        grads: Sequence[Tensor],
        num_iters: int,
        *,
        tol: float | None = None,
        starts: Sequence[Tensor | None] | None = None,
    ) -> list[Scales]:
        """Run ``num_iters`` iterations on each gradient ``(..., m, n)``."""
        given = _some(starts)
        known = self._run(
            DescentTensors(grads, given), num_iters, tol, UpdateFactors(), if_prepared=True
        )
        if known is not None:
            return list(known[0])
        first = given or [None] * len(grads)
        results: dict[int, Scales] = {}
        groups: dict[tuple[torch.device, bool], list[tuple[int, Tensor]]] = {}
        for i, grad in enumerate(grads):
            check_start(grad, first[i])
            if support.readable(grad, first[i]):
                read = dense(grad)
                fits = self.whole_rows and support.rows_fit(read)
                groups.setdefault((grad.device, fits), []).append((i, read))
            else:
                (results[i],) = super().scales([grad], num_iters, tol=tol, starts=[first[i]])
        for (_, fits), members in groups.items():
            scales_of = self._by_whole_rows if fits else self._by_halves
            own = [read for _, read in members], [first[i] for i, _ in members]
            for (i, _), scales in zip(members, scales_of(*own, num_iters, tol), strict=True):
                results[i] = scales
        return [results[i] for i in range(len(grads))]

    def _by_whole_rows(
        self, grads: list[Tensor], starts: list[Tensor | None], num_iters: int, tol: float | None
    ) -> Sequence[Scales]:
        tensors = DescentTensors(grads, _some(starts))
        found = self._run(tensors, num_iters, tol, UpdateFactors())
        assert found is not None, "all are readable"
        return found[0]

    def _by_halves(
        self, grads: list[Tensor], starts: list[Tensor | None], num_iters: int, tol: float | None
    ) -> Sequence[Scales]:
        device = grads[0].device
        shapes = tuple(grad.shape for grad in grads)
        with self._lock, on(device):
            plan = plan_of_scales(tuple(map(operand_of, grads)), shapes, _bucket_bytes(device))
            table = self._tables.table(plan.table, device)
            addresses = self._addresses(grads, device), self._addresses(starts, device)
            scratch = new_scratch(plan, num_iters, tol, device)
            for bucket in plan.buckets:
                find_scales(bucket, scratch, table, addresses, num_iters, tol)
        return FlatScales(scratch.scales[0], shapes, plan.rows, plan.cols)

    def _run(
        self,
        tensors: DescentTensors,
        num_iters: int,
        tol: float | None,
        factors: UpdateFactors,
        *,
        if_prepared: bool = False,
    ) -> tuple[FlatScales, Tensor] | None:
        if not tensors.grads or not self.whole_rows:
            return None
        device = tensors.grads[0].device
        size = _cached_bytes(device)
        with self._lock, on(device):
            return self._descents.run(
                tensors, num_iters, tol, factors, bucket_bytes=size, if_prepared=if_prepared
            )

    def _addresses(self, tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
        read = tuple(0 if x is None else x.data_ptr() for x in tensors)
        return self._tables.addresses(read, device)

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
        """Find all scales and take all steps, bucket by bucket where the kernels can."""
        device = matrices.grads[0].device if matrices.grads else torch.device("cpu")
        factors = _factors(keep, step, device)._replace(overflow=overflow)
        tensors = DescentTensors(
            matrices.grads,
            _some(matrices.starts),
            matrices.params,
            matrices.keys or (),
            tuple(map(len, matrices.ranges)),
        )
        found = None
        if support.overflow_readable(overflow, device):
            found = self._run(tensors, num_iters, tol, factors, if_prepared=True)
        if found is None:
            ours = [self._takes(matrices, own, overflow) for own in matrices.ranges]
            if not all(ours) or not ours:
                options = {"num_iters": num_iters, "keep": keep, "step": step}
                return self._in_part(matrices, ours, **options, tol=tol, overflow=overflow)
            for grad, start in zip(matrices.grads, matrices.starts or [], strict=False):
                check_start(grad, start)
            found = self._run(tensors, num_iters, tol, factors)
            assert found is not None, "all are readable"
        increment_version(list(matrices.params))
        scales, finite = found
        return Descent(finite, scales)

    def _in_part(self, matrices: Matrices, ours: list[bool], **options: Any) -> Descent:
        """Descend bucket by bucket on some owners; for the others, find the scales, then update."""
        in_halves: Callable[..., Descent] = super().descend_
        if not any(ours):
            return in_halves(matrices, **options)
        others = select_owners(matrices, [not own for own in ours])
        some = self.descend_(select_owners(matrices, ours), **options)
        return merge_descents(ours, matrices, some, in_halves(others, **options))

    def _takes(self, matrices: Matrices, own: range, overflow: Tensor | None) -> bool:
        """Whether the kernels of whole rows accept all matrices of one owner."""
        if not self.whole_rows or len(own) == 0:
            return False
        device = matrices.params[0].device
        nothing = [None] * len(matrices.params)
        starts, keys = matrices.starts or nothing, matrices.keys or nothing
        return all(
            support.readable(grad, starts[i])
            and support.writable(param, grad, None, overflow, keys[i])
            and param.device == device
            and support.rows_fit(grad)
            and dense_layout(grad).transposed == dense_layout(param).transposed
            for i, param, grad in ((i, matrices.params[i], matrices.grads[i]) for i in own)
        )

    def sums(self, grads: Sequence[Tensor]) -> TritonSums:
        """Return an object that sums the squares of gradients, a launch for each kind of matrix."""
        return TritonSums(grads, self._tables)

    def products(self, stacks: Sequence[Stack]) -> Products:
        """Return an object that multiplies updates by vectors, with kernels that read gradients."""
        if not self.products_by_dot:
            return super().products(stacks)
        return StackProducts(stacks, lambda stack: support.multiplied(*stack), self._products_of)

    def packed_products(
        self, grads: Sequence[Tensor], scales: Sequence[Scales], shared: Shared
    ) -> SkinnyProducts | None:
        """Return the products of updates with vectors, or None if no kernel computes them.

        The kernels need gradients that they can read, on one device, and at most `MAX_VECTORS`
        vectors; ``products_by_dot`` must be set.
        """
        on_one_device = len({grad.device for grad in grads}) == 1
        fits = shared.vectors.shape[-1] <= MAX_VECTORS
        if not (
            self.products_by_dot and on_one_device and fits and support.multiplied(grads, scales)
        ):
            return None
        return self._products_of(grads, scales, shared)

    def _products_of(
        self, grads: Sequence[Tensor], scales: Sequence[Scales], shared: Shared | None = None
    ) -> SkinnyProducts:
        sources, device = [dense(grad) for grad in grads], grads[0].device
        shapes = tuple(grad.shape for grad in grads)
        first = shared.first if shared is not None else (0,) * len(grads)
        plan = plan_of_products(
            tuple(map(operand_of, sources)), shapes, first, _bucket_bytes(device)
        )
        read = [x for source, own in zip(sources, scales, strict=True) for x in (source, *own)]
        with self._lock, on(device):
            addresses = self._addresses(read, device)
            on_device = partial(self._tables.table, device=device)
            return SkinnyProducts(plan, shapes, on_device, addresses, read, shared)

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
        for param, own in zip(params, scales, strict=True):
            check_scales(param, own.row, own.col)
        flags = [None] * len(params) if allowed is None else allowed
        bits = [None] * len(params) if keys is None else keys
        others: list[int] = []
        by_device: dict[torch.device, list[_Write]] = {}
        for i, given in enumerate(zip(params, grads, scales, flags, bits, strict=True)):
            if support.writable(*given) and self._corrects(params[i], scales[i]):
                by_device.setdefault(params[i].device, []).append(_Write(*given))
            else:
                others.append(i)
        for device, writes in by_device.items():
            with self._lock, on(device):
                self._update(writes, _factors(keep, step, device), device)
            increment_version([write.param for write in writes])
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

    def _corrects(self, param: Tensor, scales: Scales | CorrectedScales) -> bool:
        """Whether an update has no correction, or one that the kernels can subtract."""
        return not isinstance(scales, CorrectedScales) or (
            self.products_by_dot and support.subtracted(scales, param.device)
        )

    def _update(
        self,
        writes: "list[_Write]",
        factors: UpdateFactors,
        device: torch.device,
    ) -> None:
        # These may be copies, which must live until all kernels are launched.
        sources = [aligned(write.grad, write.param) for write in writes]
        operands = tuple(
            UpdateOperands(
                operand_of(write.param), operand_of(source), _low_rank_sides(write.scales)
            )
            for write, source in zip(writes, sources, strict=True)
        )
        shapes = tuple(write.param.shape for write in writes)
        plan = plan_of_update(operands, shapes, _bucket_bytes(device))
        table = self._tables.table(plan.table, device)
        addresses: list[int] = []
        for write, source, to in zip(writes, sources, operands, strict=True):
            own, transposed = write.scales, to.param.layout.transposed
            read: list[Tensor | None] = [
                write.param,
                source,
                *_in_memory((own.row, own.col), transposed=transposed),
            ]
            read += write.allowed, write.key
            if isinstance(own, CorrectedScales):
                read += own.factor, *_in_memory(own.correction, transposed=transposed)
            addresses += UpdateAddresses(*(0 if x is None else x.data_ptr() for x in read))
        rows = self._tables.addresses(tuple(addresses), device)
        rounding = writes[0].key is not None
        for bucket in reversed(plan.buckets):  # the gradients that were read last are in the cache
            update_parameters(bucket, table, rows, factors, rounding=rounding)


class _Write(NamedTuple):
    """A parameter to update, and what its update reads."""

    param: Tensor
    grad: Tensor
    scales: Scales | CorrectedScales
    allowed: Tensor | None
    key: Tensor | None


def _bucket_bytes(device: torch.device) -> int:
    """Return the most bytes of gradients in a bucket of half iterations, updates or products.

    It is the same while a graph is captured, so that the capture finds the tables of earlier steps.
    """
    size = _cached_bytes(device)
    return size if device.type == "cpu" else max(size, LAUNCH_BYTES)


def _cached_bytes(device: torch.device) -> int:
    """Return the most bytes of gradients in a bucket of whole rows."""
    return INTERPRETER_BYTES if device.type == "cpu" else _half_of_cache(device)


@cache
def _half_of_cache(device: torch.device) -> int:
    """Return half the size of the L2 cache, in bytes.

    If two tiles of bfloat16 for every processor are larger, return their size instead.
    """
    properties = torch.cuda.get_device_properties(device)
    tiles = 2 * properties.multi_processor_count
    return max(properties.L2_cache_size // 2, tiles * AREA * 2)


def _some(starts: Sequence[Tensor | None] | None) -> Sequence[Tensor | None]:
    """Return the initial column scales, or an empty sequence if no gradient has any."""
    return starts if starts and any(start is not None for start in starts) else ()


def _factors(keep: Keep, step: float | Tensor, device: torch.device) -> UpdateFactors:
    factor, is_cautious = factor_of(keep)
    return UpdateFactors(_factor(factor, device), _factor(step, device), is_cautious=is_cautious)


def _factor(value: float | Tensor, device: torch.device) -> float | Tensor:
    """Return a factor as the kernels accept it: a number, or a tensor on the device."""
    if not isinstance(value, Tensor):
        return float(value)
    return value if value.device == device else float(value)


def _in_memory(sides: Sequence[Tensor], *, transposed: bool) -> Sequence[Tensor]:
    """Return the sides of a matrix in memory order: the side of its rows in memory comes first."""
    return sides[::-1] if transposed else sides


def _low_rank_sides(scales: Scales | CorrectedScales) -> LowRankSides | None:
    if not isinstance(scales, CorrectedScales):
        return None
    left, right = scales.correction
    aligned = all(x.data_ptr() % 16 == 0 for x in (left, right))
    return LowRankSides(left.shape[-1], left.stride(), right.stride(), aligned)
