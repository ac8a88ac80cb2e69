"""The launches of a call: two an iteration and one more for the scales, one for the update.

Their number does not depend on how many matrices a bucket has. Nothing waits for the device.
"""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkgd.kernels.eager import no_movement
from sinkgd.kernels.triton.plan import Bucket, Plan
from sinkgd.kernels.triton.tiles import THREADS


class Scratch(NamedTuple):
    """What the launches of a call write."""

    scales: tuple[Tensor, Tensor]  # of iterations in turn, float32; the first is returned
    sums: Tensor  # partial sums of one bucket, float32
    alive: Tensor  # rows and columns of each matrix whose scale is not zero, int32
    moved: Tensor | None  # whether a row of each matrix moved, int32, a vector an iteration

    def of(self, iteration: int, num_iters: int) -> Tensor:
        """Return where the scales of an iteration go; those of the last are returned."""
        return self.scales[(num_iters - iteration) % 2]

    def flags(self, iteration: int, num_iters: int) -> Tensor:
        """Return whether rows moved in an iteration."""
        if self.moved is None:
            return self.alive  # not read
        return self.moved[min(max(iteration, 0), num_iters)]


def new_scratch(plan: Plan, num_iters: int, tol: float | None, device: torch.device) -> Scratch:
    """Make room for the scales of ``plan``."""
    scales = torch.empty(2, plan.scales, dtype=torch.float32, device=device)
    sums = torch.empty(plan.sums, dtype=torch.float32, device=device)
    alive = torch.zeros(2 * plan.matrices, dtype=torch.int32, device=device)
    moved = None
    if tol is not None:
        width = -(-plan.matrices // 4) * 4  # pointers to vectors are multiples of 16 bytes
        moved = torch.zeros(num_iters + 1, width, dtype=torch.int32, device=device)
        moved[:2] = 1  # the first iteration has nothing to be compared with
    return Scratch((scales[0], scales[1]), sums, alive, moved)


def find_scales(
    bucket: Bucket,
    scratch: Scratch,
    table: Tensor,
    addresses: tuple[Tensor, Tensor],
    num_iters: int,
    tol: float | None,
) -> None:
    """Run ``num_iters`` iterations on a bucket.

    Args:
        bucket: Matrices of one kind.
        scratch: Where scales and sums go.
        table: The plan's, on the device.
        addresses: Of the gradients, and of their first column scales or 0.
        num_iters: Iterations, at least 1.
        tol: A matrix whose row scales move by no more than this is left.
    """
    kernels = loops()
    bounds = no_movement(0.0 if tol is None else tol)
    origins = (kernels.START, kernels.LENGTHS, kernels.LENGTHS)
    common = {
        "DTYPE": primitives().DTYPES[bucket.kind.dtypes[0]],
        "BM": bucket.kind.tile.BM,
        "BN": bucket.kind.tile.BN,
        "TOL": scratch.moved is not None,
        "VECTOR": bucket.kind.vector,
    }
    for half in range(2 * num_iters + 1):
        done, of_cols = divmod(half, 2)
        old, new = (scratch.of(done + of_cols - i, num_iters) for i in (1, 0))
        in_memory = bool(of_cols) == bucket.kind.turned  # rows in memory are summed
        programs = bucket.for_rows if in_memory else bucket.for_cols
        launch(
            kernels.half_iteration,
            programs.rows,
            *addresses,
            table[bucket.matrices.begin :],
            table[programs.begin :],
            *(old, new, scratch.scales[0], scratch.sums, scratch.alive),
            *(scratch.flags(i, num_iters) for i in (done - 1, done, done + 1)),
            *(done, *bounds),
            AXIS=int(in_memory),
            ROWS=not of_cols,
            FROM=origins[half] if half < len(origins) else kernels.SQUARES,
            SUMS=half < 2 * num_iters,
            **common,
            **compile_options(table.device, wide=bucket.kind.vector > 1, first=half < 2),
        )


def update_parameters(
    bucket: Bucket,
    table: Tensor,
    addresses: Tensor,
    factors: tuple[float | Tensor, float | Tensor],
    *,
    rounding: bool,
) -> None:
    """Set the parameters of a bucket to ``keep * param + step * row * grad * col``.

    Args:
        bucket: Matrices of one kind.
        table: The plan's, on the device.
        addresses: Rows of `Addresses`, one a parameter.
        factors: ``keep`` and ``step``; tensors on the device are read there.
        rounding: Whether bfloat16 is rounded by the keys among the addresses.
    """
    dtypes = primitives().DTYPES
    dtype, grad_dtype = bucket.kind.dtypes
    launch(
        step().update,
        bucket.for_rows.rows,
        addresses,
        table[bucket.matrices.begin :],
        table[bucket.for_rows.begin :],
        *factors,
        DTYPE=dtypes[dtype],
        GRAD_DTYPE=dtypes[grad_dtype],
        KEEP_IS_STORED=isinstance(factors[0], Tensor),
        STEP_IS_STORED=isinstance(factors[1], Tensor),
        BM=bucket.kind.tile.BM,
        BN=bucket.kind.tile.BN,
        ROUND=rounding and dtype == torch.bfloat16,
        VECTOR=bucket.kind.vector,
        K=bucket.kind.width,
        DENSE=bucket.kind.is_dense,
        TF32=multiplies_tf32(table.device),
        **compile_options(table.device, wide=bucket.kind.vector > 1, product=bucket.kind.width > 0),
    )


def launch(kernel: Any, programs: int, *arguments: object, **constants: object) -> Any:
    """Start ``programs`` programs of ``kernel`` by triton's dispatcher; return what is compiled."""
    return kernel[(programs,)](*arguments, **constants)


@cache
def compile_options(
    device: torch.device, *, wide: bool, first: bool = False, product: bool = False
) -> dict[str, object]:
    """Return the compiler's options for a launch on ``device``."""
    if device.type == "cpu":
        return {}
    warp = getattr(torch.cuda.get_device_properties(device), "warp_size", 32)
    target = "hip" if torch.version.hip else "cuda"
    return options_of(target, warp, wide=wide, first=first, product=product)


def multiplies_tf32(device: torch.device) -> bool:
    """Whether products of float32 matrices have to be made of three with 11 bits each."""
    return not (device.type == "cuda" and torch.version.hip)


def options_of(
    target: str, warp: int, *, wide: bool, first: bool, product: bool = False
) -> dict[str, object]:
    """Return the compiler's options, such that no kernel runs out of registers.

    Args:
        target: ``"cuda"`` or ``"hip"``.
        warp: Threads that run together.
        wide: Whether loads are of 16 bytes; narrow ones need more registers for their addresses.
        first: Whether it is the first iteration, which finds powers of two beside the sums.
        product: Whether it is an update that subtracts a product of matrices.
    """
    threads = THREADS // 2 if product else THREADS
    if target == "hip" and not wide:
        threads *= 4 if first else 2  # so that scalar registers hold the masks of all loads
    options: dict[str, object] = {"num_warps": threads // warp, "enable_fp_fusion": True}
    if target == "cuda" and wide and not first:
        # Three programs of an update that has a product hide each other's waits, else two.
        options["maxnreg"] = (
            168 if product else 128
        )  # half of a processor's: two programs hide each other's waits
    return options


@cache
def primitives() -> ModuleType:
    """Return what kernels share; it needs triton, which takes a while to import."""
    return import_module("sinkgd.kernels.triton.primitives")


@cache
def loops() -> ModuleType:
    """Return the kernel of the scales in halves of an iteration."""
    return import_module("sinkgd.kernels.triton.loops")


@cache
def step() -> ModuleType:
    """Return the kernel of the update."""
    return import_module("sinkgd.kernels.triton.step")


@cache
def sweep() -> ModuleType:
    """Return the kernel of an iteration on whole rows."""
    return import_module("sinkgd.kernels.triton.sweep")


@cache
def finish() -> ModuleType:
    """Return the kernel of a descent's last launch."""
    return import_module("sinkgd.kernels.triton.finish")


@cache
def weighted() -> ModuleType:
    """Return the kernel of the sums of pieces."""
    return import_module("sinkgd.kernels.triton.weighted")


@cache
def skinny_matmul() -> ModuleType:
    """Return the kernels of products with a few vectors."""
    return import_module("sinkgd.kernels.triton.skinny_matmul")
