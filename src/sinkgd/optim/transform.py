"""The contract of a transform, and the batch of matrices that flows through all of them.

A step of SR-Sinkhorn applies the transforms that a group turns on, in the order of
`sinkgd.optim.transforms.TRANSFORMS`:

    slots → [around] → matrices → [before] → scales → [after] → update

A transform sees whole lists: it reads all gradients at once, and all parameters share its messages.
`Sinkhorn` cuts the lists into chunks if transforms would need too much scratch memory. On a mesh
every chunk sends its own messages. So that few chunks are enough, their size is limited only by
what must stay in memory while messages are sent. A copy of a gradient that is needed only between
two messages does not count: it is created anew each time.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sinkgd.distributed.shards import (
    ParamMatrix,
    is_dtensor,
    largest_shard_shape,
    largest_shard_size,
    param_matrices,
)
from sinkgd.exchange import Computation, Steps, computation, immediate
from sinkgd.kernels import Backend, CorrectedScales, Scales
from sinkgd.kernels.backend import by_owner
from sinkgd.kernels.eager import update_of, without_corrections
from sinkgd.matrix_views import dims_of
from sinkgd.optim.apply import allowed
from sinkgd.optim.method import Context, Group, Need, Slot

Step = Callable[[Sequence[Slot], Group, Context], Computation[Tensor]]  # as `Method.step`

# Scratch memory of a chunk, in addition to weights and gradients. A parameter that needs more is a
# chunk by itself. Not measured.
SCRATCH_BYTES = 64 << 20
# The same on a mesh, where every chunk costs messages. The groups of a step share these bytes.
MESH_SCRATCH_BYTES = 256 << 20
# The same for what is held only after the iterations, such as vectors, with or without a mesh. On a
# mesh, the groups of a step share these bytes.
MESH_VECTOR_BYTES = 128 << 20
# Bytes that each row or column of a shard uses at once for each vector, most of them float64.
# tests/lab/plan/test_communication.py measured 17.4 for deflation.
VECTOR_BYTES = 18


class Batch(NamedTuple):
    """Matrices on their way from gradients to updates, either all of DTensors or none."""

    slots: Sequence[Slot]
    group: Group
    context: Context
    backend: Backend
    matrices: Sequence[ParamMatrix]
    ranges: Sequence[range]  # for each slot, the indices of its matrices
    keys: Sequence[Tensor] | None = None  # for each matrix, its key of stochastic rounding
    starts: Sequence[Tensor | None] | None = None  # for each of `iterated`; see `Backend.scales`
    # Known after the iterations. The update of a matrix is ``row * grad * col``, less a correction.
    scales: Sequence[Scales | CorrectedScales] = ()  # one for each matrix
    finite: Tensor | None = None  # (slots,) bool; equal on all ranks

    @property
    def iterated(self) -> list[ParamMatrix]:
        """The matrices, transposed if needed, because the iterations always end with columns."""
        ends_with_rows = self.group["last"] == "row"
        return [matrix.mT if ends_with_rows else matrix for matrix in self.matrices]

    @property
    def plain_scales(self) -> list[Scales]:
        """The scales, which must not have corrections yet: deflation comes later."""
        plain = [own for own in self.scales if isinstance(own, Scales)]
        assert len(plain) == len(self.matrices), "deflation comes later"
        return plain

    def without_corrections(self) -> tuple[Sequence[ParamMatrix], list[Scales]]:
        """Return matrices and plain scales, for which ``row * grad * col`` are the same updates.

        The gradient of a matrix with a correction is a copy of its update, in float32 or wider.
        """
        plain = [own for own in self.scales if isinstance(own, Scales)]
        if len(plain) == len(self.matrices):
            return self.matrices, plain
        grads, plain = without_corrections([matrix.grad for matrix in self.matrices], self.scales)
        return [x._replace(grad=g) for x, g in zip(self.matrices, grads, strict=True)], plain

    @property
    def weights(self) -> list[Tensor]:
        """The weight of each matrix, even if the step writes an average of updates instead."""
        weights = [x.param if x.weight is None else x.weight for x in self.slots]
        given = [x._replace(param=w, grad=w) for x, w in zip(self.slots, weights, strict=True)]
        layout, split = self.group["layout"], self.group["split"]
        return [x.param for x in param_matrices(given, layout=layout, split=split).matrices]

    def updates(self) -> list[Tensor]:
        """Return a copy of the update of each matrix, in float32 or wider."""
        pairs = zip(self.matrices, self.scales, strict=True)
        return [update_of(matrix.grad, own) for matrix, own in pairs]

    def with_updates(self, updates: Sequence[Tensor]) -> "Batch":
        """Return the batch with other updates, which take the place of the gradients."""
        pairs = [*zip(self.matrices, updates, strict=True)]
        return self._replace(
            matrices=[matrix._replace(grad=update) for matrix, update in pairs],
            scales=[
                Scales(torch.ones_like(own.row), torch.ones_like(own.col)) for own in self.scales
            ],
        )

    def owners(self) -> Iterator[tuple[Slot, MutableMapping[str, Any], range, Tensor | None]]:
        """Yield each slot, its state, the indices of its matrices, and whether the slot may change.

        The last is a flag: a 0-dim bool, or None if it is known to be True. If the flag is False,
        state and parameter stay as they are. As long as ``finite`` is None, all flags are None.
        """
        flags = None if self.finite is None else allowed(self.finite, self.context)
        for i, (slot, own) in enumerate(zip(self.slots, self.ranges, strict=True)):
            yield slot, self.context.states[slot.param], own, None if flags is None else flags[i]

    def only_if(self, flags: Sequence[Tensor]) -> "Batch":
        """Return a batch whose slots change only if all 0-dim flags of their matrices are True."""
        assert self.finite is not None, "the iterations have not run"
        return self._replace(finite=self.finite & by_owner(flags, self.ranges))

    def chunk(self, chunk: slice) -> "Batch":
        """Return the part of this batch for some slots; the batch must not have starts."""
        ranges = self.ranges[chunk]
        first, end = ranges[0].start, ranges[-1].stop
        return self._replace(
            slots=self.slots[chunk],
            matrices=self.matrices[first:end],
            ranges=[range(own.start - first, own.stop - first) for own in ranges],
            keys=None if self.keys is None else self.keys[first:end],
            scales=self.scales[first:end],
            finite=None if self.finite is None else self.finite[chunk],
        )


class Scratch(NamedTuple):
    """What a transform holds for every parameter of a batch, in addition to the gradients."""

    # Whether the transform holds a copy of each gradient or update. The whole step then takes a few
    # parameters at a time, with messages of their own.
    copies: bool = False
    # What the transform holds only after the iterations, so that all parameters share the messages
    # of the iterations: how many vectors with a number for each row and column, and how many
    # float32 copies of updates.
    vectors: int = 0
    late_copies: int = 0


class Transform:
    """An optional change: before or after the scales of SR-Sinkhorn, or around any method's step.

    `before` and `after` return a new batch. They change nothing in place but ``context.states`` and
    gradients that are scratch. A hook that adds up numbers over ranks is a generator decorated by
    `sinkgd.exchange.computation`.
    """

    # The group options of the transform, with the defaults at which it is off.
    options: ClassVar[Mapping[str, object]]
    # The transform is on if the value of this option differs from the default. Its other options
    # have no effect if it is off.
    switch: ClassVar[str]
    # How to turn it on, for errors; only for a transform with several options.
    remedy: ClassVar[str] = ""
    # As `Method.resizable`.
    resizable: ClassVar[Mapping[str, str]] = MappingProxyType({})
    # Whether it also transforms parameters with fewer than two dimensions, by `around`.
    takes_vectors: ClassVar[bool] = False

    def needs(self) -> dict[str, Need]:
        """Return what each option except the switch needs: that the transform is on."""
        need = Need(self.switch, self.options[self.switch], self.remedy)
        return {option: need for option in self.options if option != self.switch}

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Raise if an option is out of range, or ``param``, called ``name``, cannot be handled.

        Called whether the transform is on or off. `Sinkhorn` checks the layout and the shards of a
        matrix before.
        """

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Create the state of a parameter, as it is before the first step."""

    def scratch(self, group: Group, *, packs_vectors: bool, sharded: bool) -> Scratch:  # noqa: ARG002
        """Return what is held for every parameter of a batch.

        Args:
            group: A group that turns the transform on.
            packs_vectors: As `Backend.packs_vectors`.
            sharded: Whether the parameters are DTensors.
        """
        return Scratch()

    def around(
        self, step: Step, slots: Sequence[Slot], group: Group, context: Context
    ) -> Computation[Tensor]:
        """Take a step of any method, as `Method.step` does, with other gradients or parameters."""
        return step(slots, group, context)

    def before(self, batch: Batch) -> Computation[Batch]:
        """Transform the gradients, or the starts of the iterations."""
        return immediate(batch)

    def after(self, batch: Batch) -> Computation[Batch]:
        """Transform the updates: the scales, or gradients and scales."""
        return immediate(batch)


def matrices_of(param: Tensor, group: Group) -> Sequence[ParamMatrix]:
    """Return the matrices of a parameter, with the parameter itself in place of a gradient."""
    slot = Slot("", 0, param.detach(), param.detach())
    return param_matrices([slot], layout=group["layout"], split=group["split"]).matrices


def step_in_chunks(
    step: Step, slots: Sequence[Slot], group: Group, context: Context
) -> Computation[Tensor]:
    """Update parameters chunk by chunk, and return the flags of all.

    Chunks are the same on all ranks of a mesh, whichever shards a rank holds.
    """
    are_on_mesh = any(is_dtensor(slot.param) for slot in slots)
    limit = MESH_SCRATCH_BYTES // context.sharers if are_on_mesh else SCRATCH_BYTES
    chunks = chunk_slices([4 * largest_shard_size(slot.param) for slot in slots], limit)
    return in_sequence(chunks, lambda own: step(slots[own], group, context))


def in_sequence(
    chunks: Sequence[slice], step: Callable[[slice], Computation[Tensor]]
) -> Computation[Tensor]:
    """Take one step after the other, and return the flags of all."""
    return step(chunks[0]) if len(chunks) == 1 else _in_sequence(chunks, step)


@computation
def _in_sequence(
    chunks: Sequence[slice], step: Callable[[slice], Computation[Tensor]]
) -> Steps[Tensor]:
    flags: list[Tensor] = []
    for chunk in chunks:
        found = yield step(chunk)
        flags += [found]
    return torch.cat(flags)


def late_chunks(batch: Batch, scratch: Sequence[Scratch]) -> list[slice]:
    """Cut a batch whose scales are known into chunks, for each of which `Transform.after` runs."""
    if len(batch.slots) == 1:
        return [slice(1)]
    vectors = sum(own.vectors for own in scratch)
    copies = sum(own.late_copies for own in scratch)
    sizes = []
    for slot, own in zip(batch.slots, batch.ranges, strict=True):
        shape = largest_shard_shape(slot.param)
        (row_dim,), col_dims = dims_of(slot.param.ndim, batch.group["layout"])
        rows, cols = shape[row_dim], prod(shape[dim] for dim in col_dims)
        count = prod(shape) // max(1, rows * cols)
        held = count * vector_bytes(rows, len(own) * cols, vectors)
        sizes.append(held + 4 * copies * prod(shape))
    sharers = batch.context.sharers if is_dtensor(batch.slots[0].param) else 1
    return vector_chunks(sizes, sharers=sharers)


def vector_bytes(rows: int, cols: int, vectors: int) -> int:
    """Return the bytes that the vectors of a matrix, or a shard of it, use at once."""
    return VECTOR_BYTES * vectors * (rows + cols)


def vector_chunks(sizes: Sequence[int], *, sharers: int = 1) -> list[slice]:
    """Cut parameters into chunks, given the bytes that the vectors of each use."""
    return chunk_slices(sizes, MESH_VECTOR_BYTES // sharers)


def copy_chunks(sizes: Sequence[int]) -> list[slice]:
    """Cut what is copied between two messages into chunks, given the bytes of each member."""
    return chunk_slices(sizes, SCRATCH_BYTES)


def chunk_slices(sizes: Sequence[int], limit: int) -> list[slice]:
    """Cut a sequence into chunks with a sum of at most ``limit``, or with a single member.

    >>> chunk_slices([3, 4, 9, 1, 1, 5], limit=7)
    [slice(0, 2, None), slice(2, 3, None), slice(3, 6, None)]
    """
    begins, total = [0], 0
    for i, size in enumerate(sizes):
        if total + size > limit and i > begins[-1]:
            begins.append(i)
            total = 0
        total += size
    return [slice(begin, end) for begin, end in zip(begins, [*begins[1:], len(sizes)], strict=True)]
