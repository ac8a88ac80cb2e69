"""Find scales and update parameters, in a descent that reads a gradient once per iteration.

A bucket is a set of matrices that are launched together: once for each iteration, and once for the
update. For matrices that are transposed in memory, the update also finds the last column scales. If
there is no update, or if it waits for other buckets, one more launch finds them. Nothing waits for
the device.

Apart from addresses and the options of the descent, launches depend only on the signature of the
tensors: shapes, strides, types, devices and alignments. A later step of the same signature and
options allocates the scales of all matrices, the partial sums of a bucket and some counters, sends
the addresses of all tensors if one has moved, and starts the launches. Every step computes the
signature of every tensor, so a signature has only what torch returns immediately.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import Parameter

from sinkgd.kernels.backend import Scales
from sinkgd.kernels.eager import no_movement
from sinkgd.kernels.triton import launch
from sinkgd.kernels.triton.half_iterations import UpdateFactors
from sinkgd.kernels.triton.launch import (
    GpuTarget,
    PreparedLaunch,
    PreparedLaunches,
    kernels,
)
from sinkgd.kernels.triton.schedule import Bucket, Kind, Schedule, half_panel, schedule_of
from sinkgd.kernels.triton.tables import GIVEN, SCALED, UNSCALED, DeviceTables, operand_of

MAX_PREPARED = 64  # descents; a model has few, even if its parameters are updated one by one
FEW_THREADS = 128
REGISTERS = 1 << 16  # registers of a streaming multiprocessor


class DescentTensors(NamedTuple):
    """The tensors of a descent, in lists of equal length; a list may also be empty."""

    grads: Sequence[Tensor]
    starts: Sequence[Tensor | None] = ()  # initial column scales
    params: Sequence[Tensor] = ()
    keys: Sequence[Tensor] = ()
    # Number of gradients of each owner, a parameter of the user; empty without params
    sizes: tuple[int, ...] = ()


class _Iterations(NamedTuple):
    """How scales are found."""

    num_iters: int
    tol: float | None
    started: bool  # whether some gradient has initial column scales


class _Update(NamedTuple):
    """What the update reads from the device, and whether it is cautious."""

    overflow: bool
    keep: bool
    step: bool
    rounding: bool
    is_cautious: bool


class _Prepared(NamedTuple):
    schedule: Schedule
    launches: PreparedLaunches
    shapes: tuple[torch.Size, ...]


class PreparedDescents:
    """Runs descents, and keeps what it prepares for them."""

    def __init__(self, tables: DeviceTables) -> None:
        self._tables = tables
        self._prepared: OrderedDict[Hashable, _Prepared] = OrderedDict()

    def run(
        self,
        tensors: DescentTensors,
        num_iters: int,
        tol: float | None,
        factors: UpdateFactors,
        *,
        bucket_bytes: int,
        if_prepared: bool,
    ) -> "tuple[FlatScales, Tensor] | None":
        """Find scales, and update parameters if there are any.

        Args:
            tensors: Tensors on one device, of dtypes and layouts that the kernels accept.
            num_iters: Iterations, at least 1.
            tol: Stop iterating a matrix once no row scale changes by more than this fraction; None
                to run all iterations.
            factors: Factors of the update.
            bucket_bytes: Bytes of gradients in a bucket.
            if_prepared: Run only if a descent of this signature was prepared before. The tensors
                need no check then: those of the earlier one were checked.

        Returns:
            The scales, and ``(owners,)`` bool, whether the gradients of each owner are finite. None
            if ``if_prepared`` is set and no such descent was prepared, if there is no gradient, or
            if a tensor is of a subclass other than Parameter.
        """
        grads, starts, params, keys, sizes = tensors
        filling = [None] * (len(grads) % 2)  # aligns each list of addresses to 16 bytes
        lists = [own for own in (grads, starts, params, keys) if own]
        found = _signature_of([x for own in lists for x in (*own, *filling)])
        if found is None or not grads:
            return None
        signature, addresses = found
        device = grads[0].device
        iterations = _Iterations(num_iters, tol, bool(starts))
        update = _update_of(factors, rounding=bool(keys)) if params else None
        key = signature, sizes, iterations, update, bucket_bytes
        prepared = self._prepared.get(key)
        if prepared is None:
            if if_prepared:
                return None
            prepared = _prepare(tensors, iterations, update, bucket_bytes)
            self._prepared[key] = prepared
            if len(self._prepared) > MAX_PREPARED:
                self._prepared.popitem(last=False)
        else:
            self._prepared.move_to_end(key)
        on_device = self._tables.addresses(tuple(addresses), device).view(len(lists), -1).unbind()
        scales, counters = self._start(prepared, tensors, on_device, factors)
        return scales, counters[slice(*prepared.schedule.nonfinite)] == 0

    def _start(
        self,
        prepared: _Prepared,
        tensors: DescentTensors,
        addresses: Sequence[Tensor],
        factors: UpdateFactors,
    ) -> "tuple[FlatScales, Tensor]":
        """Start the launches with new buffers, and return the scales and the counters."""
        schedule, launches, shapes = prepared
        grads, starts = addresses[0], addresses[1 if tensors.starts else 0]
        device = grads.device
        table = self._tables.table(schedule.table, device)
        scales = torch.empty(schedule.scales, dtype=torch.float32, device=device)
        partial_sums = torch.empty(schedule.partial_sums, dtype=torch.float32, device=device)
        counters = torch.zeros(schedule.counters, dtype=torch.int32, device=device)
        # A pointer that a kernel does not read may point to any tensor.
        params, keys = grads, grads
        if tensors.params:
            _, *others = addresses[1:] if tensors.starts else addresses
            params, keys = others[0], others[1] if tensors.keys else grads
        keep, step, overflow, _ = factors
        overflow = counters if overflow is None else overflow
        launches.start(
            (
                (grads, starts, table, scales, partial_sums, counters),
                (grads, params, keys, overflow, table, scales, counters, keep, step),
            )
        )
        return FlatScales(scales, shapes, schedule.rows, schedule.cols), counters


_ITERATION, _FINISH = 0, 1  # indices of the lists of arguments above


def _signature_of(
    tensors: Sequence[Tensor | None],
) -> tuple[tuple[Hashable, ...], list[int]] | None:
    """Return the signature of tensors, and their addresses, 0 for None.

    Return None if one of them is of a subclass other than Parameter, which may have no address.
    """
    signature: list[Hashable] = [torch.is_grad_enabled()]
    addresses = []
    for x in tensors:
        if x is None:
            signature.append(None)
            addresses.append(0)
            continue
        if type(x) is not Tensor and type(x) is not Parameter:
            return None
        at = x.data_ptr()
        addresses.append(at)
        signature.append((x.shape, x.stride(), x.dtype, x.device, at % 16, x.requires_grad))
    return tuple(signature), addresses


def _update_of(factors: UpdateFactors, *, rounding: bool) -> _Update:
    keep, step = isinstance(factors.keep, Tensor), isinstance(factors.step, Tensor)
    return _Update(factors.overflow is not None, keep, step, rounding, factors.is_cautious)


def _prepare(
    tensors: DescentTensors, iterations: _Iterations, update: _Update | None, bucket_bytes: int
) -> _Prepared:
    grads, _, params, _, sizes = tensors
    device = grads[0].device
    shapes = tuple(grad.shape for grad in grads)
    read = tuple(map(operand_of, grads))
    written = tuple(map(operand_of, params)) or read
    owners = tuple(i for i, size in enumerate(sizes or [1] * len(grads)) for _ in range(size))
    schedule = schedule_of(read, written, shapes, owners, bucket_bytes)
    launches = [*_launches(schedule, iterations, update, launch.target_of(device))]
    return _Prepared(schedule, PreparedLaunches(launches), shapes)


def _launches(
    schedule: Schedule, iterations: _Iterations, update: _Update | None, target: GpuTarget | None
) -> Iterator[PreparedLaunch]:
    """Yield the launches of a descent; without an update they only find scales."""
    waiting = []
    for bucket in schedule.buckets:
        yield from _iterate(bucket, iterations, target)
        if update is None or bucket.waits:
            if bucket.kind.transposed:
                yield _finish(bucket, iterations, None, target)
            waiting.append(bucket)
        else:
            yield _finish(bucket, iterations, update, target)
    if update is not None:
        for bucket in reversed(waiting):  # the gradients that were read last are in the cache
            yield _finish(bucket, iterations, update, target, known=True)


def _iterate(
    bucket: Bucket, iterations: _Iterations, target: GpuTarget | None
) -> Iterator[PreparedLaunch]:
    """Read a bucket once per iteration.

    This finds all scales, except the last u of transposed matrices.
    """
    count, tol, started = iterations
    kernel, last = kernels("full_iteration").full_iteration, 1 + bucket.kind.transposed
    bounds = no_movement(0.0 if tol is None else tol)
    for i in range(count):
        phase = min(i, last)
        constants = iteration_constants(bucket.kind, phase, tol is not None, started, target)
        fixed = *_offsets(bucket), i % 2, i + 1, int(i + 1 == count), *bounds
        yield PreparedLaunch(kernel, bucket.program_count, _ITERATION, fixed, constants)


def _finish(
    bucket: Bucket,
    iterations: _Iterations,
    update: _Update | None,
    target: GpuTarget | None,
    *,
    known: bool = False,
) -> PreparedLaunch:
    """Read a bucket once more: find the last u of transposed matrices unless ``known``, and update.

    Without ``update``, no parameter is written.
    """
    u_from = min(iterations.num_iters, SCALED) if bucket.kind.transposed and not known else GIVEN
    constants = finish_constants(bucket.kind, u_from, update, target)
    fixed = *_offsets(bucket), iterations.num_iters % 2
    return PreparedLaunch(kernels("update").finish, bucket.program_count, _FINISH, fixed, constants)


def _offsets(bucket: Bucket) -> tuple[int, int, int]:
    return bucket.matrices, bucket.programs, bucket.program_count


@lru_cache(maxsize=1024)
def iteration_constants(
    kind: Kind, phase: int, tol: bool, started: bool, target: GpuTarget | None
) -> dict[str, object]:
    """Return the compile-time constants of an iteration.

    Args:
        kind: Kind of the bucket.
        phase: 0 for the first iteration. For transposed matrices, 1 for the second iteration and 2
            for all later ones; for other matrices, 1 for all iterations after the first.
        tol: Whether converged matrices are skipped.
        started: Whether some gradient has initial column scales.
        target: None for the interpreter.
    """
    origins = [(GIVEN, UNSCALED), (UNSCALED, SCALED)] if kind.transposed else [(UNSCALED, UNSCALED)]
    u_from, v_from = (*origins, (SCALED, SCALED))[phase]
    panel, threads = kind.panel, kind.threads
    unscaled = UNSCALED in (u_from, v_from)
    if unscaled:
        panel, threads = half_panel(panel, threads)  # unscaled entries need more registers
    lean = not unscaled and not tol and kind.dtype.itemsize == 2
    return {
        "DTYPE": kernels("primitives").DTYPES[kind.dtype],
        **panel._asdict(),
        "U_FROM": u_from,
        "V_FROM": v_from,
        "TRANSPOSED": kind.transposed,
        "STARTED": started and unscaled,
        "TOL": tol,
        "CHUNK": min(panel.A, 4 * threads),
        "VECTOR": kind.vector,
        **options_of(target, threads, wide=kind.vector > 1, unscaled=unscaled, lean=lean),
    }


@lru_cache(maxsize=1024)
def finish_constants(
    kind: Kind, u_from: int, update: _Update | None, target: GpuTarget | None
) -> dict[str, object]:
    """Return the compile-time constants of `finish`; without ``update``, it writes only scales."""
    dtypes = kernels("primitives").DTYPES
    overflow, keep, step, rounding, is_cautious = update or (False,) * 5
    return {
        "DTYPE": dtypes[kind.param_dtype],
        "GRAD_DTYPE": dtypes[kind.dtype],
        **kind.panel._asdict(),
        "U_FROM": u_from,
        "WRITE": update is not None,
        "OVERFLOW": overflow,
        "KEEP_IS_STORED": keep,
        "STEP_IS_STORED": step,
        "ROUND": rounding and kind.param_dtype == torch.bfloat16,
        "CAUTIOUS": is_cautious,
        "VECTOR": kind.param_vector,
        **options_of(target, kind.threads, wide=kind.param_vector > 1),
    }


def options_of(
    target: GpuTarget | None,
    threads: int,
    *,
    wide: bool,
    unscaled: bool = False,
    lean: bool = False,
) -> dict[str, object]:
    """Return the compiler's options, such that no kernel runs out of registers.

    Args:
        target: None for the interpreter.
        threads: Number of threads that work on a panel.
        wide: Whether loads are of 16 bytes; narrow loads need more registers for their addresses.
        unscaled: Whether the kernel is an iteration that finds scales from the unscaled gradient.
        lean: Whether the kernel needs few registers, as most iterations on entries of 2 bytes do.
            A thread may then take 128 registers, or 168 if few threads work on a panel.
    """
    if target is None:
        return {}
    if target.backend == "hip" and unscaled:
        threads *= 2 if wide else 4  # so that scalar registers hold the masks of all loads
    options: dict[str, object] = {"num_warps": threads // target.warp, "enable_fp_fusion": True}
    if target.backend == "cuda":
        # Two programs of 256 threads, or three of 128, hide each other's latency. If `maxnreg` is
        # not set, the compiler takes at most 128 registers and spills the rest.
        most = 255
        if lean:
            most = 128 if threads > FEW_THREADS else 168
        options["maxnreg"] = min(most, REGISTERS // threads)
    return options


class FlatScales(Sequence[Scales]):
    """The scales of many matrices, as views of one tensor that are created on access."""

    def __init__(
        self,
        flat: Tensor,
        shapes: Sequence[torch.Size],
        rows: Sequence[int],
        cols: Sequence[int],
    ) -> None:
        """Take the offsets in ``flat`` of the row and column scales of each matrix or batch."""
        self._flat, self._shapes, self._rows, self._cols = flat, shapes, rows, cols

    def __len__(self) -> int:
        """Return the number of matrices, or of batches of them."""
        return len(self._shapes)

    @overload
    def __getitem__(self, i: int) -> Scales: ...

    @overload
    def __getitem__(self, i: slice) -> list[Scales]: ...

    def __getitem__(self, i: int | slice) -> Scales | list[Scales]:
        """Return views."""
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        *batch, m, n = self._shapes[i]
        row, col = self._rows[i], self._cols[i]
        return Scales(self._view(row, (*batch, m, 1)), self._view(col, (*batch, 1, n)))

    def __iter__(self) -> Iterator[Scales]:
        """Yield the views of all matrices, with four calls of torch and two more per batch."""
        sizes, end = [], 0
        for (*batch, m, n), row, col in zip(self._shapes, self._rows, self._cols, strict=True):
            sizes += [row - end, prod(batch) * m]
            end = row + sizes[-1]
            sizes += [col - end, prod(batch) * n]
            end = col + sizes[-1]
        sizes.append(len(self._flat) - end)
        us = self._flat.view(-1, 1).split_with_sizes(sizes)[1::4]
        vs = self._flat.view(1, -1).split_with_sizes(sizes, 1)[3::4]
        for (*batch, m, n), u, v in zip(self._shapes, us, vs, strict=True):
            yield Scales(u.view(*batch, m, 1), v.view(*batch, 1, n)) if batch else Scales(u, v)

    def _view(self, offset: int, shape: tuple[int, ...]) -> Tensor:
        return self._flat[offset : offset + prod(shape)].view(shape)
