"""The launches of a descent that reads the gradient once an iteration.

A bucket takes as many launches as there are iterations and one more, the update; of a matrix whose
rows in memory are columns, the update is what finds the last column scales. Nothing waits for the
device, and nothing is looked up for a matrix once the schedule is made.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.kernels.eager import no_movement
from sinkgd.kernels.triton import launch
from sinkgd.kernels.triton.fields import BARE, GIVEN, SCALED
from sinkgd.kernels.triton.panels import halved
from sinkgd.kernels.triton.schedule import Bucket, Kind, Schedule

REGISTERS = 1 << 16  # of a processor
FEW_THREADS = 128


class Buffers(NamedTuple):
    """What the launches of a call read and write."""

    grads: Tensor  # addresses
    starts: Tensor
    table: Tensor
    scales: Tensor  # float32, of all matrices
    partial: Tensor  # partial sums of one bucket
    numbers: Tensor  # int32, zero at first
    started: bool  # whether some start is given


class Writing(NamedTuple):
    """What parameters become."""

    params: Tensor  # addresses
    keys: Tensor | None
    overflow: Tensor | None
    keep: float | Tensor
    step: float | Tensor


def new_buffers(
    schedule: Schedule, grads: Tensor, starts: Tensor, table: Tensor, *, started: bool
) -> Buffers:
    """Make room for the scales of a call and for what its launches tell each other."""
    device = table.device
    return Buffers(
        grads,
        starts,
        table,
        torch.empty(schedule.scales, dtype=torch.float32, device=device),
        torch.empty(schedule.partial, dtype=torch.float32, device=device),
        torch.zeros(schedule.numbers, dtype=torch.int32, device=device),
        started,
    )


def descend(
    schedule: Schedule,
    buffers: Buffers,
    num_iters: int,
    tol: float | None,
    writing: Writing | None,
) -> None:
    """Find the scales of every bucket, and take its step where there is something to write."""
    waiting = []
    for bucket in schedule.buckets:
        iterate(bucket, buffers, num_iters, tol)
        if writing is None:
            if bucket.kind.turned:
                complete(bucket, buffers, num_iters, None)
        elif bucket.waits:
            if bucket.kind.turned:
                complete(bucket, buffers, num_iters, None)
            waiting.append(bucket)
        else:
            complete(bucket, buffers, num_iters, writing)
    for bucket in reversed(waiting):  # the gradients that were read last are in the cache
        complete(bucket, buffers, num_iters, writing, known=True)


def iterate(bucket: Bucket, buffers: Buffers, num_iters: int, tol: float | None) -> None:
    """Read a bucket ``num_iters`` times: all scales are found, but a turned matrix's last u."""
    kernel = launch.sweep().sweep
    low, high = no_movement(0.0 if tol is None else tol)
    device, last = buffers.table.device, 1 + bucket.kind.turned
    constants = [
        sweep_constants(bucket.kind, phase, tol is not None, buffers.started, device)
        for phase in range(last + 1)
    ]
    for i in range(num_iters):
        launch.launch(
            kernel, bucket.programs, *buffers[:-1], bucket.blocks, bucket.walks, bucket.programs,
            i % 2, i + 1, int(i + 1 == num_iters), low, high, **constants[min(i, last)],
        )  # fmt: skip


def complete(
    bucket: Bucket,
    buffers: Buffers,
    num_iters: int,
    writing: Writing | None,
    *,
    known: bool = False,
) -> None:
    """Read a bucket once more: find a turned matrix's last u unless it is known, and write."""
    device = buffers.table.device
    origin = min(num_iters, SCALED) if bucket.kind.turned and not known else GIVEN
    grads, _, table, scales, _, numbers, _ = buffers
    params, keys, overflow, keep, step = writing or Writing(grads, None, None, 1.0, 0.0)
    given = writing and Given(
        overflow is not None, isinstance(keep, Tensor), isinstance(step, Tensor), keys is not None
    )
    launch.launch(
        launch.finish().finish, bucket.programs, grads, params,
        grads if keys is None else keys, numbers if overflow is None else overflow, table, scales,
        numbers, bucket.blocks, bucket.walks, bucket.programs, num_iters % 2, keep, step,
        **finish_constants(bucket.kind, origin, given, device),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def sweep_constants(
    kind: Kind, phase: int, tol: bool, started: bool, device: torch.device
) -> dict[str, object]:
    """Return what an iteration is compiled for: the first, the second of a turned one, or later."""
    origins = [(GIVEN, BARE), (BARE, SCALED)] if kind.turned else [(BARE, BARE)]
    u_from, v_from = (*origins, (SCALED, SCALED))[phase]
    panel, threads = kind.panel, kind.threads
    bare = BARE in (u_from, v_from)
    if bare:
        panel, threads = halved(panel, threads)  # it needs more registers
    lean = not bare and not tol and kind.dtype.itemsize == 2
    return {
        "DTYPE": launch.primitives().DTYPES[kind.dtype],
        **panel._asdict(),
        "U_FROM": u_from,
        "V_FROM": v_from,
        "TURNED": kind.turned,
        "STARTED": started and bare,
        "TOL": tol,
        "CHUNK": min(panel.A, 4 * threads),
        "VECTOR": kind.vector,
        **panel_options(device, threads, wide=kind.vector > 1, bare=bare, lean=lean),
    }


@lru_cache(maxsize=1024)
def finish_constants(
    kind: Kind, origin: int, given: "Given | None", device: torch.device
) -> dict[str, object]:
    """Return what the last launch is compiled for; without `Given` nothing is written."""
    dtypes = launch.primitives().DTYPES
    write = given is not None
    overflow, keep, step, rounding = given or Given()
    return {
        "DTYPE": dtypes[kind.param_dtype],
        "GRAD_DTYPE": dtypes[kind.dtype],
        **kind.panel._asdict(),
        "U_FROM": origin,
        "WRITE": write,
        "OVERFLOW": overflow,
        "KEEP_IS_STORED": keep,
        "STEP_IS_STORED": step,
        "ROUND": rounding and kind.param_dtype == torch.bfloat16,
        "VECTOR": kind.param_vector,
        **panel_options(device, kind.threads, wide=kind.param_vector > 1),
    }


class Given(NamedTuple):
    """What an update reads from the device."""

    overflow: bool = False
    keep: bool = False
    step: bool = False
    rounding: bool = False


def panel_options(
    device: torch.device, threads: int, *, wide: bool, bare: bool = False, lean: bool = False
) -> dict[str, object]:
    """Return the compiler's options for a launch on ``device``."""
    if device.type == "cpu":
        return {}
    target = "hip" if torch.version.hip else "cuda"
    warp = getattr(torch.cuda.get_device_properties(device), "warp_size", 32)
    return options_of(target, warp, threads, wide=wide, bare=bare, lean=lean)


def options_of(
    target: str, warp: int, threads: int, *, wide: bool, bare: bool, lean: bool
) -> dict[str, object]:
    """Return the compiler's options, such that no kernel runs out of registers.

    Args:
        target: ``"cuda"`` or ``"hip"``.
        warp: Threads that run together.
        threads: Those that hold a panel.
        wide: Whether loads are of 16 bytes; narrow ones need more registers for their addresses.
        bare: Whether it is an iteration that finds scales from the bare gradient.
        lean: Whether 128 registers are enough: an iteration as most are, on entries of 2 bytes.
    """
    if target == "hip" and bare:
        threads *= 2 if wide else 4  # so that scalar registers hold the masks of all loads
    options: dict[str, object] = {"num_warps": threads // warp, "enable_fp_fusion": True}
    if target == "cuda":
        # Two programs of 256 threads, or three of 128, hide each other's waits. Without a limit
        # the compiler would rather spill than take more than 128 registers.
        most = 255
        if lean:
            most = 128 if threads > FEW_THREADS else 168
        options["maxnreg"] = min(most, REGISTERS // threads)
    return options


def owners_of(owners: Sequence[range]) -> tuple[int, ...]:
    """Return the owner of each gradient."""
    return tuple(i for i, own in enumerate(owners) for _ in own)
