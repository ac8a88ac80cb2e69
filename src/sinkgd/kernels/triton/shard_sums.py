"""Sums of the squares of gradients that are sharded, on a GPU: a launch for each kind of matrix.

`EagerSums` sums the gradients that the kernel does not read: those in float64, those with neither
dense rows nor dense columns, and empty ones.

Letters: as in `sinkgd.kernels.triton.tables`.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.kernels.eager import EagerSums
from sinkgd.kernels.layout import layout_of
from sinkgd.kernels.triton import launch
from sinkgd.kernels.triton.launch import GpuTarget, kernels
from sinkgd.kernels.triton.support import DTYPES
from sinkgd.kernels.triton.tables import DeviceTables, Operand, ShardMatrix, vector_width

THREADS = 128
# Rows and columns of a tile; a thread has 16 sums. Tiles that sum rows are long, so that loads are
# long, too. Tiles that sum columns are as wide as 128 bytes of bfloat16, so that shards of few
# columns have enough programs.
ROW_TILE, COL_TILE = (8, 256), (32, 64)


class Kind(NamedTuple):
    """What the matrices of one launch have in common."""

    dtype: torch.dtype
    transposed: bool
    vector: int  # entries in 16 bytes if loads are that wide, else 1


class _Launch(NamedTuple):
    kind: Kind
    matrices: Tensor  # rows of `ShardMatrix`, on the host
    row_programs: Tensor  # programs that sum rows in memory, on the host
    col_programs: Tensor


class TritonSums:
    """Sums by kernels that read each gradient once per call, or by `EagerSums`.

    Args:
        grads: ``(..., m, n)``, on one device.
        tables: Copies of tables on devices.
    """

    def __init__(self, grads: Sequence[Tensor], tables: DeviceTables) -> None:
        self._device = grads[0].device
        self._rows = [prod(grad.shape[:-1]) for grad in grads]
        self._cols = [prod(grad.shape[:-2]) * grad.shape[-1] for grad in grads]
        operands = tuple(_operand_of(grad) for grad in grads)
        self._others = {i: EagerSums([grad]) for i, grad in enumerate(grads) if operands[i] is None}
        self._grads = grads  # their memory is read later
        self._launches = _plan(operands, tuple(self._rows), tuple(self._cols))
        with launch.on(self._device):
            self._addresses = tables.addresses(tuple(x.data_ptr() for x in grads), self._device)
        self._tables = tables

    def of_rows(self, weights: Tensor) -> Tensor:
        """Return G² c² of each gradient."""
        return self._sums(weights, (self._cols, self._rows), EagerSums.of_rows, rows=True)

    def of_cols(self, weights: Tensor) -> Tensor:
        """Return (G²)ᵀ r² of each gradient."""
        return self._sums(weights, (self._rows, self._cols), EagerSums.of_cols, rows=False)

    def _sums(
        self,
        weights: Tensor,
        lengths: tuple[list[int], list[int]],
        of: Callable[[EagerSums, Tensor], Tensor],
        *,
        rows: bool,
    ) -> Tensor:
        read, written = lengths
        sums = torch.empty(sum(written), dtype=torch.float64, device=self._device)
        with launch.on(self._device):
            for one in self._launches:
                self._launch(one, weights, sums, of_rows=rows != one.kind.transposed)
        if self._others:
            own_sums, own_weights = torch.split(sums, written), torch.split(weights, read)
            for i, other in self._others.items():
                own_sums[i].copy_(of(other, own_weights[i]))
        return sums

    def _launch(self, one: _Launch, weights: Tensor, sums: Tensor, *, of_rows: bool) -> None:
        programs = one.row_programs if of_rows else one.col_programs
        launch.launch(
            kernels("square_sums").weighted_square_sums,
            len(programs),
            self._addresses,
            self._tables.table(one.matrices, self._device),
            self._tables.table(programs, self._device),
            weights,
            sums,
            **constants_of(one.kind, of_rows=of_rows),
            **options_of(launch.target_of(self._device)),
        )


def constants_of(kind: Kind, *, of_rows: bool) -> dict[str, object]:
    """Return the compile-time constants of the kernel."""
    BM, BN = ROW_TILE if of_rows else COL_TILE
    dtype = kernels("primitives").DTYPES[kind.dtype]
    return {"DTYPE": dtype, "BM": BM, "BN": BN, "OF_ROWS": of_rows, "VECTOR": kind.vector}


def options_of(target: GpuTarget | None) -> dict[str, object]:
    """Return the compiler's options."""
    if target is None:
        return {}
    return {"num_warps": THREADS // target.warp, "enable_fp_fusion": True}


def _operand_of(grad: Tensor) -> Operand | None:
    """Return how the kernel reads a gradient, or None if it cannot read it."""
    layout = layout_of(grad.shape, grad.stride())
    if grad.numel() == 0 or layout is None or grad.dtype not in DTYPES:
        return None
    return Operand(grad.dtype, layout, grad.data_ptr() % 16 == 0)


@lru_cache(maxsize=64)
def _plan(
    grads: tuple[Operand | None, ...], rows: tuple[int, ...], cols: tuple[int, ...]
) -> list[_Launch]:
    """List the launches of a call, one for each `Kind`."""
    found: dict[Kind, list[ShardMatrix]] = {}
    row_offset = col_offset = 0
    for i, grad in enumerate(grads):
        if grad is not None:
            P, Q, ld, transposed, offsets = grad.layout
            of_rows, of_cols = row_offset, col_offset
            if transposed:
                of_rows, of_cols = of_cols, of_rows
            for number, offset in enumerate(offsets):
                vector = vector_width(16 // grad.dtype.itemsize, (grad, offset))
                sums = of_rows + number * P, of_cols + number * Q
                kind = Kind(grad.dtype, transposed, vector)
                found.setdefault(kind, []).append(ShardMatrix(i, offset, ld, P, Q, *sums))
        row_offset += rows[i]
        col_offset += cols[i]
    return [
        _Launch(
            kind,
            torch.tensor(matrices, dtype=torch.int64, device="cpu"),
            _programs([-(-matrix.P // ROW_TILE[0]) for matrix in matrices]),
            _programs([-(-matrix.Q // COL_TILE[1]) for matrix in matrices]),
        )
        for kind, matrices in found.items()
    ]


def _programs(blocks: Sequence[int]) -> Tensor:
    """Return a row for each program: its matrix, and which of the matrix's blocks it sums."""
    counts = torch.tensor(blocks, dtype=torch.int64, device="cpu")
    matrix = torch.arange(len(blocks), dtype=torch.int64, device="cpu").repeat_interleave(counts)
    number = torch.arange(len(matrix), dtype=torch.int64, device="cpu")
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.stack([matrix, number - first], dim=1)
