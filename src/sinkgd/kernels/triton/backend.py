"""The backend ``triton``: which tensors the kernels take, and what becomes of the others.

They take float32, bfloat16 and float16, in any mix, with dense rows or dense columns; an update
that deflation lowers is neither made nor copied, for up to 31 directions. What else:
    gradients with other strides, or turned against their parameter: a copy is read
    more than 31 directions: the updates are made in float32
    float64, parameters with other strides, tensor subclasses, gradients that autograd follows,
        empty ones: `EagerBackend`

The kernels' speed is not timed.
"""

import importlib.util
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from sinkgd.deflation import Products
from sinkgd.kernels.backend import Descent, Lowered, Matrices, Scales, Shared, Stack
from sinkgd.kernels.eager import EagerBackend
from sinkgd.kernels.layout import (
    aligned,
    check_scales,
    check_start,
    dense,
    dense_layout,
    layout_of,
    may_be_written,
)
from sinkgd.kernels.products import eager_products, nothing_to_take
from sinkgd.kernels.triton.fields import Addresses
from sinkgd.kernels.triton.launch import find_scales, new_scratch, update_parameters
from sinkgd.kernels.triton.panels import LONGEST
from sinkgd.kernels.triton.pieces import TritonSums
from sinkgd.kernels.triton.plan import Destination, Taken, plan_of_scales, plan_of_update
from sinkgd.kernels.triton.products import MOST, SkinnyProducts, scales_are_usual
from sinkgd.kernels.triton.skinny_plan import plan_of_products
from sinkgd.kernels.triton.stacks import StackProducts
from sinkgd.kernels.triton.tables import Tables, capturing
from sinkgd.kernels.triton.tiles import AREA
from sinkgd.kernels.triton.whole_rows import Descending, Factors, ScalesOf, WholeRows, source_of
from sinkgd.kernels.two_halves import TwoHalves, chosen, merged

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What a GPU reads from its memory at 3 TB/s while the host prepares a launch, about 20 µs: outside
# of a graph, a bucket that is read faster waits for the host. Not timed.
LAUNCH_BYTES = 1 << 26
INTERPRETER_BYTES = 1 << 20


class TritonBackend(TwoHalves):
    """Kernels for CUDA and ROCm: a launch an iteration, whatever the number of matrices."""

    name = "triton"
    package = "triton"
    install = "pip install triton"  # on CUDA and ROCm it comes with torch

    def __init__(self, *, whole_rows: bool = True, products_by_dot: bool = True) -> None:
        """Choose how gradients are read.

        Args:
            whole_rows: Whether a program holds whole rows of a gradient, so that one launch reads
                it once and is one iteration; where not, or where rows are too long, a launch is
                half an iteration.
            products_by_dot: Whether kernels multiply gradients by vectors, and subtract what
                deflation takes as they write a parameter; where not, torch does so on updates that
                are made in float32.
        """
        self.whole_rows = whole_rows
        self.products_by_dot = products_by_dot
        self._tables = Tables()
        self._rows = WholeRows(self._tables)
        self._lock = threading.Lock()  # backward hooks may step from several threads

    @property
    def packs_vectors(self) -> bool:  # type: ignore[override]
        """Whether products are the kernels'."""
        return self.products_by_dot

    def missing(self) -> str | None:
        """Say what is absent: triton, which torch brings on CUDA and ROCm, or a C compiler."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not interpreting() and not _has_compiler(os.environ.get("CC"), os.environ.get("PATH")):
            return "triton finds no C compiler for its launchers; install gcc or clang, or set CC"
        return None

    def supports(self, device: torch.device) -> bool:
        """CUDA from compute capability 8.0, ROCm; CPUs under triton's interpreter, for tests."""
        if interpreting():
            return device.type == "cpu"
        if device.type != "cuda" or not torch.cuda.is_available():
            return False
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)

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
        known = self._run(Descending(grads, given), num_iters, tol, Factors(), is_known=True)
        if known is not None:
            return list(known[0])
        first = given or [None] * len(grads)
        results: dict[int, Scales] = {}
        by_device: dict[torch.device, list[int]] = {}
        for i, grad in enumerate(grads):
            check_start(grad, first[i])
            if _readable(grad, first[i]):
                by_device.setdefault(grad.device, []).append(i)
            else:
                (results[i],) = EagerBackend().scales([grad], num_iters, tol=tol, starts=[first[i]])
        for members in by_device.values():
            own = [dense(grads[i]) for i in members], [first[i] for i in members]
            results.update(zip(members, self._scales(*own, num_iters, tol), strict=True))
        return [results[i] for i in range(len(grads))]

    def _scales(
        self, grads: list[Tensor], starts: list[Tensor | None], num_iters: int, tol: float | None
    ) -> list[Scales]:
        fits = [self.whole_rows and _fits(grad) for grad in grads]
        results: list[Scales | None] = [None] * len(grads)
        for choice in set(fits):
            members = [i for i, fit in enumerate(fits) if fit == choice]
            own, first = [grads[i] for i in members], [starts[i] for i in members]
            if choice:
                found = self._run(Descending(own, _some(first)), num_iters, tol, Factors())
                assert found is not None, "all are readable"
                scales: Sequence[Scales] = found[0]
            else:
                with self._lock, _on(own[0].device):
                    scales = self._by_halves(own, first, num_iters, tol)
            for i, one in zip(members, scales, strict=True):
                results[i] = one
        return [scales for scales in results if scales is not None]

    def _run(
        self,
        tensors: Descending,
        num_iters: int,
        tol: float | None,
        factors: Factors,
        *,
        is_known: bool = False,
    ) -> tuple[ScalesOf, Tensor] | None:
        if not tensors.grads or not self.whole_rows:
            return None
        device = tensors.grads[0].device
        room = _cached_bytes(device)
        with self._lock, _on(device):
            return self._rows.run(tensors, num_iters, tol, factors, room=room, is_known=is_known)

    def _addresses(self, tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
        read = tuple(0 if x is None else x.data_ptr() for x in tensors)
        return self._tables.addresses(read, device)

    def _by_halves(
        self, grads: list[Tensor], starts: list[Tensor | None], num_iters: int, tol: float | None
    ) -> list[Scales]:
        device = grads[0].device
        shapes = tuple(grad.shape for grad in grads)
        plan = plan_of_scales(tuple(map(source_of, grads)), shapes, _room(device))
        table = self._tables.table(plan.table, device)
        addresses = self._addresses(grads, device), self._addresses(starts, device)
        scratch = new_scratch(plan, num_iters, tol, device)
        for bucket in plan.buckets:
            find_scales(bucket, scratch, table, addresses, num_iters, tol)
        return list(ScalesOf(scratch.scales[0], shapes, plan.rows, plan.cols))

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
        """Find all scales and take all steps, bucket by bucket."""
        device = matrices.grads[0].device if matrices.grads else torch.device("cpu")
        factors = Factors(_factor(keep, device), _factor(step, device), overflow)
        tensors = Descending(
            matrices.grads,
            _some(matrices.starts),
            matrices.params,
            matrices.keys or (),
            tuple(map(len, matrices.owners)),
        )
        found = None
        if _may_forbid(overflow, device):
            found = self._run(tensors, num_iters, tol, factors, is_known=True)
        if found is None:
            ours = [self._takes(matrices, own, overflow) for own in matrices.owners]
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
        """Descend on some owners in one go, on others in two halves."""
        in_halves: Callable[..., Descent] = super().descend_
        if not any(ours):
            return in_halves(matrices, **options)
        others = chosen(matrices, [not own for own in ours])
        some = self.descend_(chosen(matrices, ours), **options)
        return merged(ours, matrices, some, in_halves(others, **options))

    def _takes(self, matrices: Matrices, own: range, overflow: Tensor | None) -> bool:
        """Whether the kernels of whole rows take all matrices of one owner."""
        if not self.whole_rows or len(own) == 0:
            return False
        device = matrices.params[0].device
        nothing = [None] * len(matrices.params)
        starts, keys = matrices.starts or nothing, matrices.keys or nothing
        return all(
            _readable(grad, starts[i])
            and _writable(param, grad, None, overflow, keys[i])
            and param.device == device
            and _fits(grad)
            and dense_layout(grad).turned == dense_layout(param).turned
            for i, param, grad in ((i, matrices.params[i], matrices.grads[i]) for i in own)
        )

    def sums(self, grads: Sequence[Tensor]) -> TritonSums:
        """Return the sums of the squares of gradients: a launch for each kind of them."""
        return TritonSums(grads, self._tables)

    def products(self, stacks: Sequence[Stack]) -> Products:
        """Return the products of updates, by kernels that read the gradients as they lie."""
        if not self.products_by_dot:
            return eager_products(stacks)
        return StackProducts(stacks, lambda stack: _multiplied(*stack), self._products_of)

    def packed_products(
        self, grads: Sequence[Tensor], scales: Sequence[Scales], shared: Shared
    ) -> SkinnyProducts | None:
        """Return the products of updates, where the kernels read all of them."""
        alone = len({grad.device for grad in grads}) == 1
        fits = shared.vectors.shape[-1] <= MOST
        if not (self.products_by_dot and alone and fits and _multiplied(grads, scales)):
            return None
        return self._products_of(grads, scales, shared)

    def _products_of(
        self, grads: Sequence[Tensor], scales: Sequence[Scales], shared: Shared | None = None
    ) -> SkinnyProducts:
        sources, device = [dense(grad) for grad in grads], grads[0].device
        shapes = tuple(grad.shape for grad in grads)
        first = shared.first if shared is not None else (0,) * len(grads)
        plan = plan_of_products(tuple(map(source_of, sources)), shapes, first, _room(device))
        read = [x for source, own in zip(sources, scales, strict=True) for x in (source, *own)]
        with self._lock, _on(device):
            addresses = self._addresses(read, device)
            on_device = partial(self._tables.table, device=device)
            return SkinnyProducts(plan, shapes, on_device, addresses, read, shared)

    def are_finite(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return ``(len(tensors),)`` bool: whether each holds finite numbers alone."""
        return EagerBackend().are_finite(tensors)

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
        for param, own in zip(params, scales, strict=True):
            check_scales(param, own.row, own.col)
        grads, pairs = self._to_be_taken(params, grads, scales)
        flags = [None] * len(params) if allowed is None else allowed
        bits = [None] * len(params) if keys is None else keys
        others: list[int] = []
        by_device: dict[torch.device, list[_Write]] = {}
        for i, given in enumerate(zip(params, grads, pairs, flags, bits, strict=True)):
            if _writable(*given):
                by_device.setdefault(params[i].device, []).append(_Write(*given))
            else:
                others.append(i)
        for device, writes in by_device.items():
            with self._lock, _on(device):
                self._update(writes, (_factor(keep, device), _factor(step, device)), device)
            increment_version([write.param for write in writes])
        if others:
            EagerBackend().update_(
                [params[i] for i in others],
                [grads[i] for i in others],
                [pairs[i] for i in others],
                keep=keep,
                step=step,
                allowed=None if allowed is None else [allowed[i] for i in others],
                keys=None if keys is None else [keys[i] for i in others],
            )

    def _to_be_taken(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        scales: Sequence[Scales | Lowered],
    ) -> tuple[list[Tensor], list[Scales | Lowered]]:
        """Return gradients and scales; where kernels subtract nothing, updates stand for some."""
        found_grads, found_scales = [*grads], [*scales]
        for i, own in enumerate(scales):
            if isinstance(own, Lowered) and not (
                self.products_by_dot and _native(params[i]) and _subtracted(own, params[i].device)
            ):
                (found_grads[i],), (found_scales[i],) = nothing_to_take([grads[i]], [own])
        return found_grads, found_scales

    def _update(
        self,
        writes: "list[_Write]",
        factors: tuple[float | Tensor, float | Tensor],
        device: torch.device,
    ) -> None:
        sources = [
            aligned(write.grad, write.param) for write in writes
        ]  # kept until all is launched
        destinations = tuple(
            Destination(source_of(write.param), source_of(source), _taken(write.scales))
            for write, source in zip(writes, sources, strict=True)
        )
        shapes = tuple(write.param.shape for write in writes)
        plan = plan_of_update(destinations, shapes, _room(device))
        table = self._tables.table(plan.table, device)
        addresses: list[int] = []
        for write, source, to in zip(writes, sources, destinations, strict=True):
            own, turned = write.scales, to.param.layout.turned
            read: list[Tensor | None] = [
                write.param,
                source,
                *_in_memory((own.row, own.col), turned=turned),
            ]
            read += write.allowed, write.key
            if isinstance(own, Lowered):
                read += own.factor, *_in_memory(own.taken, turned=turned)
            addresses += Addresses(*(0 if x is None else x.data_ptr() for x in read))
        rows = self._tables.addresses(tuple(addresses), device)
        rounding = writes[0].key is not None
        for bucket in reversed(plan.buckets):  # the gradients that were read last are in the cache
            update_parameters(bucket, table, rows, factors, rounding=rounding)


class _Write(NamedTuple):
    """A parameter to update."""

    param: Tensor
    grad: Tensor
    scales: Scales | Lowered
    allowed: Tensor | None
    key: Tensor | None


def interpreting() -> bool:
    """Whether kernels run in triton's interpreter; settled when they are first imported."""
    kernels = sys.modules.get("sinkgd.kernels.triton.primitives")
    if kernels is not None:
        return bool(kernels.IS_INTERPRETED)
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@cache
def _has_compiler(named: str | None, path: str | None) -> bool:
    return named is not None or any(shutil.which(name, path=path) for name in ("gcc", "clang"))


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _room(device: torch.device) -> int:
    """Return how many bytes of gradients a bucket of half iterations holds."""
    room = _cached_bytes(device)
    return room if device.type == "cpu" or capturing(device) else max(room, LAUNCH_BYTES)


def _cached_bytes(device: torch.device) -> int:
    return INTERPRETER_BYTES if device.type == "cpu" else _half_of_cache(device)


@cache
def _half_of_cache(device: torch.device) -> int:
    """Return what stays in the cache between two reads, and gives every processor two tiles."""
    properties = torch.cuda.get_device_properties(device)
    tiles = 2 * properties.multi_processor_count
    return max(properties.L2_cache_size // 2, tiles * AREA * 2)


def _some(starts: Sequence[Tensor | None] | None) -> Sequence[Tensor | None]:
    """Return column scales to begin from, or nothing where none are given."""
    return starts if starts and any(start is not None for start in starts) else ()


def _may_forbid(overflow: Tensor | None, device: torch.device) -> bool:
    """Whether the kernels read an overflow, where there is one."""
    return overflow is None or (overflow.dtype == torch.bool and overflow.device == device)


def _factor(value: float | Tensor, device: torch.device) -> float | Tensor:
    """Return a number as the kernels take it: a tensor of the device is read there."""
    if not isinstance(value, Tensor):
        return float(value)
    return value if value.device == device else float(value)


@lru_cache(maxsize=4096)
def _is_native(kind: type, dtype: torch.dtype, shape: torch.Size) -> bool:
    # The kernels read memory: no subclass may stand behind it.
    whole = len(shape) >= 2 and 0 not in shape and max(shape[-2:]) < 1 << 31
    return kind in (Tensor, Parameter) and dtype in DTYPES and whole


def _native(x: Tensor) -> bool:
    return _is_native(type(x), x.dtype, x.shape) and not (
        x.requires_grad and torch.is_grad_enabled()
    )


def _readable(grad: Tensor, start: Tensor | None) -> bool:
    return _native(grad) and (
        start is None
        or (start.dtype == torch.float32 and start.is_contiguous() and start.device == grad.device)
    )


def _in_memory(sides: Sequence[Tensor], *, turned: bool) -> Sequence[Tensor]:
    """Return what belongs to rows and to columns, those in memory."""
    return sides[::-1] if turned else sides


def _taken(scales: Scales | Lowered) -> Taken | None:
    if not isinstance(scales, Lowered):
        return None
    left, right = scales.taken
    aligned = all(x.data_ptr() % 16 == 0 for x in (left, right))
    return Taken(left.shape[-1], left.stride(), right.stride(), aligned)


def _subtracted(scales: Lowered, device: torch.device) -> bool:
    """Whether kernels subtract what is taken."""
    factor = scales.factor
    return 0 < scales.taken.left.shape[-1] <= MOST and all(
        x.dtype == torch.float32 and x.device == device
        for x in (*scales.taken, *(() if factor is None else (factor,)))
    )


def _writable(
    param: Tensor,
    grad: Tensor,
    scales: Scales | Lowered | None,
    allowed: Tensor | None,
    key: Tensor | None,
) -> bool:
    pair = () if scales is None else (scales.row, scales.col)
    beside = (grad, *pair, *(x for x in (allowed, key) if x is not None))
    return (
        _native(param)
        and _is_native(type(grad), grad.dtype, grad.shape)
        and param.shape == grad.shape
        and may_be_written(param.shape, param.stride())
        and all(scale.dtype == torch.float32 and scale.is_contiguous() for scale in pair)
        and (allowed is None or allowed.dtype == torch.bool)
        and (key is None or key.dtype == torch.int64)
        and all(x.device == param.device for x in beside)
    )


def _multiplied(grads: Sequence[Tensor], scales: Sequence[Scales]) -> bool:
    """Whether kernels multiply the updates of gradients by vectors."""
    return all(map(_native, grads)) and scales_are_usual(scales, grads[0].device)


def _fits(grad: Tensor) -> bool:
    """Whether a program's registers hold whole rows in memory."""
    layout = layout_of(grad.shape, grad.stride())
    return layout is not None and layout.Q <= LONGEST
