"""Descents on gradients whose rows a program holds, prepared once for tensors of one form.

A later step of the same form allocates the scales of all matrices, the partial sums of a bucket and
a few numbers, sends the addresses of all tensors if one has moved, and starts the launches.

The form is all that launches depend on but addresses. It is looked up in every step, for every
tensor, so it is made of what torch has at hand.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from math import prod
from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import Parameter

from sinkgd.kernels.backend import Scales
from sinkgd.kernels.layout import dense_layout
from sinkgd.kernels.triton.descent import (
    Given,
    Iterations,
    Writing,
    new_buffers,
    prepare,
    start,
)
from sinkgd.kernels.triton.launches import Launches
from sinkgd.kernels.triton.places import Source
from sinkgd.kernels.triton.schedule import Schedule, schedule_of
from sinkgd.kernels.triton.tables import Tables

Form = tuple[Hashable, ...]

KEPT = 64  # descents; a model has few, also where its parameters step one by one


class Descending(NamedTuple):
    """The tensors of a descent: lists of one length, or empty."""

    grads: Sequence[Tensor]
    starts: Sequence[Tensor | None] = ()
    params: Sequence[Tensor] = ()
    keys: Sequence[Tensor] = ()
    sizes: tuple[int, ...] = ()  # how many gradients each owner has; without parameters, none


class Factors(NamedTuple):
    """What parameters are updated with; tensors lie on the device of the gradients."""

    keep: float | Tensor = 1.0
    step: float | Tensor = 0.0
    overflow: Tensor | None = None

    def given(self, *, rounding: bool) -> Given:
        """Return which of them, and whether keys, the kernel reads from the device."""
        keep, step = isinstance(self.keep, Tensor), isinstance(self.step, Tensor)
        return Given(self.overflow is not None, keep, step, rounding)


class _Prepared(NamedTuple):
    schedule: Schedule
    launches: Launches
    shapes: tuple[torch.Size, ...]


class WholeRows:
    """Descents, prepared and kept."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._prepared: OrderedDict[Hashable, _Prepared] = OrderedDict()

    def run(
        self,
        tensors: Descending,
        num_iters: int,
        tol: float | None,
        factors: Factors,
        *,
        room: int,
        is_known: bool,
    ) -> "tuple[ScalesOf, Tensor] | None":
        """Find scales, and update parameters where there are some.

        Args:
            tensors: On one device, and such as the kernels take.
            num_iters: Iterations, at least 1.
            tol: A matrix whose row scales move by no more than this is left.
            factors: Of the update.
            room: Bytes of gradients in a bucket.
            is_known: Whether such a descent must have been run before: nothing is checked then.

        Returns:
            The scales, and ``(owners,)`` bool, whether the gradients of each are finite; None where
            ``is_known`` is set and there was no such descent.
        """
        grads, starts, params, keys, sizes = tensors
        filling = [None] * (len(grads) % 2)  # every list of addresses begins at 16 bytes
        lists = [own for own in (grads, starts, params, keys) if own]
        found = form_of([x for own in lists for x in (*own, *filling)])
        if found is None or not grads:
            return None
        form, addresses = found
        device = grads[0].device
        iterations = Iterations(num_iters, tol, bool(starts))
        given = factors.given(rounding=bool(keys)) if params else None
        key = form, sizes, iterations, given, room
        prepared = self._prepared.get(key)
        if prepared is None:
            if is_known:
                return None
            prepared = _prepare(tensors, iterations, given, room)
            self._prepared[key] = prepared
            if len(self._prepared) > KEPT:
                self._prepared.popitem(last=False)
        else:
            self._prepared.move_to_end(key)
        schedule = prepared.schedule
        there = self._tables.addresses(tuple(addresses), device).view(len(lists), -1).unbind()
        table = self._tables.table(schedule.table, device)
        buffers = new_buffers(schedule, there[0], there[1 if starts else 0], table)
        writing = None
        if params:
            _, *others = there[1:] if starts else there
            writing = Writing(
                others[0], others[1] if keys else None, factors.overflow, factors.keep, factors.step
            )
        start(prepared.launches, buffers, writing)
        scales = ScalesOf(buffers.scales, prepared.shapes, schedule.rows, schedule.cols)
        return scales, buffers.numbers[slice(*schedule.bad)] == 0


def form_of(tensors: Sequence[Tensor | None]) -> tuple[Form, list[int]] | None:
    """Return the form of tensors, and their addresses, 0 for None.

    None where some tensor is of a subclass, which may have no address.
    """
    form: list[Hashable] = [torch.is_grad_enabled()]
    addresses = []
    for x in tensors:
        if x is None:
            form.append(None)
            addresses.append(0)
            continue
        if type(x) is not Tensor and type(x) is not Parameter:
            return None
        at = x.data_ptr()
        addresses.append(at)
        form.append((x.shape, x.stride(), x.dtype, x.device, at % 16, x.requires_grad))
    return tuple(form), addresses


def _prepare(
    tensors: Descending, iterations: Iterations, given: Given | None, room: int
) -> _Prepared:
    grads, _, params, _, sizes = tensors
    shapes = tuple(grad.shape for grad in grads)
    sources = tuple(map(source_of, grads))
    beside = tuple(map(source_of, params)) or sources
    owners = tuple(i for i, size in enumerate(sizes or [1] * len(grads)) for _ in range(size))
    schedule = schedule_of(sources, beside, shapes, owners, room)
    return _Prepared(schedule, prepare(schedule, iterations, given, grads[0].device), shapes)


def source_of(x: Tensor) -> Source:
    """Return how kernels read a tensor."""
    return Source(x.dtype, dense_layout(x), x.data_ptr() % 16 == 0)


class ScalesOf(Sequence[Scales]):
    """The scales of many matrices in one tensor; those that are asked for are cut out of it."""

    def __init__(
        self,
        flat: Tensor,
        shapes: Sequence[torch.Size],
        rows: Sequence[int],
        cols: Sequence[int],
    ) -> None:
        """Take where the row scales of each matrix begin, and its column scales."""
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
        return Scales(self._part(row, (*batch, m, 1)), self._part(col, (*batch, 1, n)))

    def __iter__(self) -> Iterator[Scales]:
        """Return views of all: four calls of torch, and two for each batch."""
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

    def _part(self, begin: int, shape: tuple[int, ...]) -> Tensor:
        return self._flat[begin : begin + prod(shape)].view(shape)
