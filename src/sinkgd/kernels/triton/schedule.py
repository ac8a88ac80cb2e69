"""The schedule of a descent: matrices in buckets, and the table that tells the kernels where.

A bucket is what one launch works on: matrices of one type and one shape of panel, so few that their
gradients stay in the cache from the first launch to the update. It takes all its iterations and its
update before the next one begins. A larger matrix is alone in one. The matrices of one owner are
written together, so they share a bucket, or the update waits until all scales are found.

A schedule depends on shapes, strides, types and alignment alone, so steps share it.

Letters: those of `sinkgd.kernels.triton.fields`.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.kernels.triton.fields import Block, State
from sinkgd.kernels.triton.panels import FAN_IN, Panel, panel_of, threads_of, walks
from sinkgd.kernels.triton.places import Source, TableRows, padded, places_of_scales, vector_of

STATE = len(State._fields)


class Kind(NamedTuple):
    """What kernels are compiled for."""

    dtype: torch.dtype  # of the gradient
    param_dtype: torch.dtype
    panel: Panel
    threads: int
    turned: bool
    vector: int  # entries in 16 bytes where loads of the gradient are that wide, else 1
    param_vector: int  # the same of the narrower type, where those of the parameter are as well


class Bucket(NamedTuple):
    """What one launch works on; places are rows of 8 bytes in the table."""

    kind: Kind
    blocks: int  # where its blocks begin
    walks: int  # where its programs begin
    programs: int
    waits: bool  # whether its update waits for the scales of other buckets


class Schedule(NamedTuple):
    """Buckets, and the sizes of what they share."""

    buckets: tuple[Bucket, ...]
    table: Tensor  # int64, on the host
    rows: tuple[int, ...]  # of each tensor, where its row scales begin among all scales
    cols: tuple[int, ...]
    scales: int  # entries of all of them
    partial: int  # entries of the partial sums of one bucket
    numbers: int  # int32: states, flags and counters
    bad: tuple[int, int]  # where the owners' flags begin and end among them


class _Found(NamedTuple):
    """A matrix to put into a bucket."""

    kind: Kind
    owner: int
    size: int  # bytes
    block: Block


@lru_cache(maxsize=64)
def schedule_of(
    grads: tuple[Source, ...],
    params: tuple[Source, ...],
    shapes: tuple[torch.Size, ...],
    owners: tuple[int, ...],
    room: int,
) -> Schedule:
    """Schedule a descent, in buckets of ``room`` bytes of gradients.

    Args:
        grads: Gradients whose rows in memory a panel holds.
        params: The parameters that lie beside them, or the gradients once more.
        shapes: Of the gradients.
        owners: The owner of each gradient, from 0 in order.
        room: Bytes of gradients in a bucket.
    """
    rows, cols, entries = places_of_scales(shapes)
    number = sum(len(source.layout.offsets) for source in grads)
    bad = number * STATE
    end = bad + (owners[-1] + 1 if owners else 0)
    found: list[_Found] = []
    for tensor, (grad, param, shape) in enumerate(zip(grads, params, shapes, strict=True)):
        P, Q, ld, turned, offsets = grad.layout
        u, v = (cols[tensor], rows[tensor]) if turned else (rows[tensor], cols[tensor])
        places = (1, shape[-1]) if turned else (shape[-1], 1)
        for i, (at, to) in enumerate(zip(offsets, param.layout.offsets, strict=True)):
            widths = 16 // grad.dtype.itemsize, 16 // min(grad.dtype.itemsize, param.dtype.itemsize)
            alone, both = (
                vector_of(widths[0], (grad, at)),
                vector_of(widths[1], (grad, at), (param, to)),
            )
            panel = panel_of(P, Q)
            kind = Kind(grad.dtype, param.dtype, panel, threads_of(panel, Q), turned, alone, both)
            owner = owners[tensor]
            block = Block(
                tensor, at, P, Q, ld, u + i * P, v + i * Q, i * shape[-1],
                len(found) * STATE, bad + owner, to, param.layout.ld, i * P * Q, *places,
            )  # fmt: skip
            found.append(_Found(kind, owner, P * Q * grad.dtype.itemsize, block))
    table = TableRows()
    filled = fill(found, room)
    homes: dict[int, set[int]] = {}
    for i, some in enumerate(filled):
        for one in some:
            homes.setdefault(one.owner, set()).add(i)
    buckets, partial = [], 0
    for some in filled:
        blocks, programs, parts = [], [], 0
        for i, one in enumerate(some):
            P, Q = one.block.P, one.block.Q
            programs.append(walks(i, P, one.kind.panel))
            count = len(programs[-1])
            blocks.append(one.block._replace(parts=parts, counters=end, programs=count))
            parts += padded(count * padded(Q)) + padded(-(-count * padded(Q) // 4))
            end += _groups(count)
        partial = max(partial, parts)
        here = table.size
        table.add(torch.tensor(blocks, dtype=torch.int64, device="cpu"))
        there = table.add(*programs)
        waits = any(len(homes[one.owner]) > 1 for one in some)
        buckets.append(Bucket(some[0].kind, here, there.begin, there.rows, waits))
    return Schedule(
        tuple(buckets), table.joined(), rows, cols, entries, partial, end,
        (bad, bad + (owners[-1] + 1 if owners else 0)),
    )  # fmt: skip


def fill(found: Iterable[_Found], room: int) -> list[list[_Found]]:
    """Put matrices of one kind together, and those of one owner as far as they fit, in order."""
    units: dict[tuple[Kind, int], list[_Found]] = {}
    for one in found:
        units.setdefault((one.kind, one.owner), []).append(one)
    buckets: list[list[_Found]] = []
    open_: dict[Kind, tuple[list[_Found], int]] = {}
    for (kind, _), unit in units.items():
        whole = sum(one.size for one in unit) <= room
        for some in [unit] if whole else [[one] for one in unit]:
            size = sum(one.size for one in some)
            bucket, full = open_.get(kind, ([], 0))
            if not bucket or full + size > room:
                bucket, full = [], 0
                buckets.append(bucket)
            bucket.extend(some)
            open_[kind] = bucket, full + size
    return buckets


def _groups(programs: int) -> int:
    """Return how many groups of `FAN_IN` arrive, on all levels."""
    groups = 0
    while True:
        programs = -(-programs // FAN_IN)
        groups += programs
        if programs == 1:
            return groups
