"""Sums of the squares of gradients that lie in pieces, on a GPU: a launch for each kind of piece.

Gradients that the kernel does not read are left to `EagerSums`: float64, neither rows nor columns
dense, empty.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.kernels.layout import layout_of
from sinkgd.kernels.sums import EagerSums
from sinkgd.kernels.triton import launch
from sinkgd.kernels.triton.places import Source, vector_of
from sinkgd.kernels.triton.tables import Tables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
THREADS = 128
# A thread holds 16 sums. Tiles along rows are long, so that loads are; tiles down columns are as
# wide as 128 bytes of bfloat16, so that there are programs enough for pieces of few columns.
ALONG, DOWN = (8, 256), (32, 64)


class Kind(NamedTuple):
    """What pieces of one launch have in common."""

    dtype: torch.dtype
    turned: bool
    vector: int  # entries in 16 bytes where loads are that wide, else 1


class _Launch(NamedTuple):
    kind: Kind
    pieces: Tensor  # rows of `Piece`, on the host
    along: Tensor  # programs of rows in memory, on the host
    down: Tensor


class TritonSums:
    """Kernels that read each gradient once a call.

    Args:
        grads: ``(..., m, n)``, on one device.
        tables: Which tables are on it.
    """

    def __init__(self, grads: Sequence[Tensor], tables: Tables) -> None:
        self._device = grads[0].device
        self._rows = [prod(grad.shape[:-1]) for grad in grads]
        self._cols = [prod(grad.shape[:-2]) * grad.shape[-1] for grad in grads]
        sources = tuple(_source_of(grad) for grad in grads)
        self._others = {i: EagerSums([grad]) for i, grad in enumerate(grads) if sources[i] is None}
        self._grads = grads  # their memory is read later
        self._launches = _plan(sources, tuple(self._rows), tuple(self._cols))
        self._addresses = tables.addresses(tuple(x.data_ptr() for x in grads), self._device)
        self._tables = tables

    def of_rows(self, weights: Tensor) -> Tensor:
        """Return G² c² of each."""
        return self._sums(weights, (self._cols, self._rows), EagerSums.of_rows, rows=True)

    def of_cols(self, weights: Tensor) -> Tensor:
        """Return (G²)ᵀ r² of each."""
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
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            for own in self._launches:
                self._launch(own, weights, sums, along=rows != own.kind.turned)
        if self._others:
            parts, own_weights = torch.split(sums, written), torch.split(weights, read)
            for i, other in self._others.items():
                parts[i].copy_(of(other, own_weights[i]))
        return sums

    def _launch(self, own: _Launch, weights: Tensor, sums: Tensor, *, along: bool) -> None:
        programs = own.along if along else own.down
        launch.launch(
            launch.weighted().add_up_weighted,
            len(programs),
            self._addresses,
            self._tables.table(own.pieces, self._device),
            self._tables.table(programs, self._device),
            weights,
            sums,
            **constants(own.kind, along=along),
            **_compile_options(self._device),
        )


def constants(kind: Kind, *, along: bool) -> dict[str, object]:
    """Return what the kernel is compiled for."""
    BM, BN = ALONG if along else DOWN
    dtype = launch.primitives().DTYPES[kind.dtype]
    return {"DTYPE": dtype, "BM": BM, "BN": BN, "ALONG": along, "VECTOR": kind.vector}


@cache
def _compile_options(device: torch.device) -> dict[str, object]:
    if device.type == "cpu":
        return {}
    warp = getattr(torch.cuda.get_device_properties(device), "warp_size", 32)
    return {"num_warps": THREADS // warp, "enable_fp_fusion": True}


def _source_of(grad: Tensor) -> Source | None:
    """Return how the kernel reads a gradient, or None where it does not."""
    layout = layout_of(grad.shape, grad.stride())
    if grad.numel() == 0 or layout is None or grad.dtype not in DTYPES:
        return None
    return Source(grad.dtype, layout, grad.data_ptr() % 16 == 0)


@lru_cache(maxsize=64)
def _plan(
    sources: tuple[Source | None, ...], rows: tuple[int, ...], cols: tuple[int, ...]
) -> list[_Launch]:
    """List the launches of a call, by what the kernel is compiled for."""
    found: dict[Kind, list[tuple[int, ...]]] = {}
    row_place = col_place = 0
    for i, source in enumerate(sources):
        if source is not None:
            P, Q, ld, turned, offsets = source.layout
            ends = (col_place, row_place) if turned else (row_place, col_place)
            for number, offset in enumerate(offsets):
                vector = vector_of(16 // source.dtype.itemsize, (source, offset))
                piece = (i, offset, ld, P, Q, ends[0] + number * P, ends[1] + number * Q)
                found.setdefault(Kind(source.dtype, turned, vector), []).append(piece)
        row_place += rows[i]
        col_place += cols[i]
    return [
        _Launch(
            kind,
            torch.tensor(pieces, dtype=torch.int64, device="cpu"),
            _programs([-(-piece[3] // ALONG[0]) for piece in pieces]),
            _programs([-(-piece[4] // DOWN[1]) for piece in pieces]),
        )
        for kind, pieces in found.items()
    ]


def _programs(blocks: Sequence[int]) -> Tensor:
    """Return a row a program: its piece, and which of so many blocks."""
    counts = torch.tensor(blocks, dtype=torch.int64, device="cpu")
    piece = torch.arange(len(blocks), dtype=torch.int64, device="cpu").repeat_interleave(counts)
    number = torch.arange(len(piece), dtype=torch.int64, device="cpu")
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.stack([piece, number - first], dim=1)
