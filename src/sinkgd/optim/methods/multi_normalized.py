"""Descent along a gradient normalized by several norms: the methods ``mngd`` and ``swan``.

Whole matrices of one shape are stacked, since many small products cost more than a large one.

Sharded matrices need row, column, Frobenius or sign norms: the first three give an update of the
form r G c, and the sign norm replaces G by sign(G). Ranks then exchange sums along rows and
columns, and never a matrix. In each iteration, a process group gets at most one message for each
norm, or two for a Frobenius norm if the group shards rows of some matrices and columns of others.

Letters, everywhere in this file:
    m, n: rows and columns of a whole matrix; ...: leading batch dimensions
    b: the number of matrices in one tensor, such as experts
    r2, c2: the squares of the scales of this rank's rows ``(..., m, 1)`` and columns, float64
    S: the squares of the gradient

References:
    Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training,
    Algorithm 2. https://arxiv.org/abs/2502.06742
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkgd import kernels
from sinkgd.distributed.all_reduce import sum_over_columns, sum_over_rows
from sinkgd.distributed.shards import (
    ParamMatrix,
    check_shards,
    check_unsharded,
    is_dtensor,
    is_sharded,
    local,
    param_matrices,
)
from sinkgd.exchange import Computation, Steps, computation
from sinkgd.kernels.backend import take_steps
from sinkgd.kernels.equilibrate import scales_of
from sinkgd.matrix_views import Split, check_layout, matrices_of
from sinkgd.multi_normalize import take_turns
from sinkgd.newton_schulz import is_transposed, matrix_buffer
from sinkgd.norms import (
    ColumnNorm,
    FrobeniusNorm,
    Norm,
    RowNorm,
    SignNorm,
    SpectralNorm,
    checked_norms,
)
from sinkgd.number_check import check_num_iters
from sinkgd.optim.apply import (
    ROUNDING_OPTIONS,
    UpdateWriter,
    check_rounding,
    decay_factor,
    draw_matrix_keys,
    step_factor,
)
from sinkgd.optim.method import Context, Group, Method, Slot, are_finite, step_by_kind
from sinkgd.optim.transforms.momentum import Momentum

# Bytes that a batch may use. A matrix that uses more is a batch by itself.
# On a CPU a batch saves calls and has to stay in cache. On one core of an Intel Xeon (2 MiB of L2)
# a step of llama-60m was fastest with 4 to 16 MiB, and 10 to 90 % slower with 64 and 256.
CPU_BATCH_BYTES = 8 << 20
# Not measured: a GPU needs a few hundred tiles of 128 x 128, so about twenty matrices of 512 x 512.
BATCH_BYTES = 64 << 20

# Memory that a batch uses for each of its matrices, as a number of matrices: one in the stack that
# becomes the result, and two of scratch, the most that one of our norms needs.
MATRICES_IN_USE = 3

# Norms that shards can be projected on.
_SCALING_NORMS = (RowNorm, ColumnNorm, FrobeniusNorm, SignNorm)


class MultiNormalized(Method):
    """Project on each norm in turn.

    Args:
        options: The group options of the method, with their defaults. The options of layout,
            rounding and momentum are added.
        norms: Returns the norms of a group.
    """

    least_dims = 2

    def __init__(
        self, options: Mapping[str, Any], norms: Callable[[Group], Sequence[Norm]]
    ) -> None:
        own = {**options, "layout": "auto", "split": 1}
        self._momentum = Momentum()
        self.options = MappingProxyType({**own, **ROUNDING_OPTIONS, **self._momentum.options})
        self.needs = MappingProxyType(self._momentum.needs())
        self._norms = norms

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range, vectors, and shards if a norm needs whole matrices."""
        self._momentum.check(name, param, group)
        check_num_iters(group["num_iters"])
        if "newton_schulz_steps" in self.options:
            check_num_iters(group["newton_schulz_steps"], "newton_schulz_steps")
        norms = self._norms(group)
        checked_norms(norms)
        check_layout(name, param, layout=group["layout"], split=group["split"])
        if is_dtensor(param) and _scale_rows_and_columns(norms):
            check_shards(name, param, layout=group["layout"], split=group["split"])
        else:
            check_unsharded(name, param, "these norms need")
        check_rounding(name, param, group)

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Create the state of momentum; there is no other state."""
        if group["momentum"]:
            self._momentum.init_state(param, group, state)

    def needs_scratch(self, group: Group) -> bool:
        """Whether Nesterov's directions are kept in addition to the gradients."""
        return bool(group["momentum"] and group["nesterov"])

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Computation[Tensor]:
        """Step along the normalized gradients, with momentum if the group has it."""
        if group["momentum"]:
            return self._momentum.around(self._step, slots, group, context)
        return self._step(slots, group, context)

    def _step(self, slots: Sequence[Slot], group: Group, context: Context) -> Computation[Tensor]:
        """Update sharded matrices, and whole ones."""
        kinds = [is_sharded(slot.param) for slot in slots]
        if len(set(kinds)) > 1:
            return step_by_kind(kinds, slots, lambda own: self._step(own, group, context))
        if kinds[0]:
            return _step_shards(slots, self._norms(group), group, context)
        return self._step_whole(slots, group, context)

    @computation
    def _step_whole(self, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
        """Check the gradients; then normalize and write batch by batch."""
        finite: Tensor = yield are_finite(slots)
        writer = UpdateWriter(slots, finite, group, context)
        here = [slot._replace(param=local(slot.param), grad=local(slot.grad)) for slot in slots]
        for batch in batches(here, layout=group["layout"], split=group["split"]):
            self._update_(batch, group, context, writer)  # a function, so that scratch is freed
        return finite

    def _update_(
        self, batch: Sequence["BatchItem"], group: Group, context: Context, writer: UpdateWriter
    ) -> None:
        updates = self._updates([item.grad for item in batch], group, context)
        parts = torch.split(updates, [len(item.grad) for item in batch])
        for item, update in zip(batch, parts, strict=True):
            writer.write_(item.slot, item.param, update, item.first_entry)

    def _updates(self, grads: Sequence[Tensor], group: Group, context: Context) -> Tensor:
        stack, own = stacked(grads)
        if context.loss_scale is not None:
            # A user's own norm may depend on the scale.
            stack = torch.div(stack, context.loss_scale, out=stack if own else None)
        update = take_turns(stack, self._norms(group), group["num_iters"], own=own)
        if not own and _share_memory(update, stack):  # the writer overwrites the update
            return update.clone()
        return update


def swan_norms(group: Group) -> Sequence[Norm]:
    """Return the norms of SWAN: rows of equal length, then equal singular values."""
    return RowNorm(), SpectralNorm(group["newton_schulz_steps"])


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class BatchItem(NamedTuple):
    """Matrices of one parameter that are part of a batch."""

    slot: int
    first_entry: int  # the index of their first entry among those of the parameter
    param: Tensor  # (b, m, n), a view
    grad: Tensor  # (b, m, n)


def batches(slots: Sequence[Slot], *, layout: str, split: Split) -> Iterator[list[BatchItem]]:
    """Yield batches of matrices; those of a batch have one shape, dtype and memory order.

    Args:
        slots: The parameters, on one device.
        layout: How the parameters are viewed as matrices.
        split: How the rows of the parameters are cut.
    """
    waiting: dict[tuple[object, ...], list[BatchItem]] = {}
    for item in _items(slots, layout, split):
        grad = item.grad
        kind = (grad.shape[1:], grad.dtype, is_transposed(grad))
        batch = waiting.setdefault(kind, [])
        if batch and _count(batch) + len(grad) > _capacity(grad):
            yield batch
            batch = waiting[kind] = []
        batch.append(item)
    yield from waiting.values()


def stacked(grads: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Stack gradients ``(b, m, n)`` of one kind, in float32 or wider.

    Returns:
        The stack, and whether it is a copy.
    """
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    if len(grads) == 1 and grads[0].dtype == dtype:
        return grads[0], False
    shape = (sum(len(grad) for grad in grads), *grads[0].shape[1:])
    stack = matrix_buffer(grads[0][:1].expand(shape), dtype)
    if is_transposed(stack):
        torch.cat([grad.mT for grad in grads], out=stack.mT)
    else:
        torch.cat(list(grads), out=stack)
    return stack, True


def _items(slots: Sequence[Slot], layout: str, split: Split) -> Iterator[BatchItem]:
    for i, slot in enumerate(slots):
        first_entry = 0
        for whole, whole_grad in matrices_of(slot.param, slot.grad, layout=layout, split=split):
            for param, grad in _fitting(whole, whole_grad):
                yield BatchItem(i, first_entry, param, grad)
                first_entry += param.numel()


def _fitting(param: Tensor, grad: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Cut ``(..., m, n)``, in row-major order, into ``(b, m, n)`` that fit into a batch."""
    if param.ndim == 2:
        return [(param.unsqueeze(0), grad.unsqueeze(0))]
    if param.ndim == 3:
        size = _capacity(grad)
        return zip(torch.split(param, size), torch.split(grad, size), strict=True)
    return (part for pair in zip(param, grad, strict=True) for part in _fitting(*pair))


def _count(batch: Sequence[BatchItem]) -> int:
    return sum(len(item.grad) for item in batch)


def _capacity(grad: Tensor) -> int:
    """Return how many matrices like those of ``grad`` fit into a batch."""
    itemsize = torch.promote_types(grad.dtype, torch.float32).itemsize
    limit = CPU_BATCH_BYTES if grad.device.type == "cpu" else BATCH_BYTES
    return max(1, limit // (MATRICES_IN_USE * itemsize * grad[0].numel()))


def _scale_rows_and_columns(norms: Sequence[Norm]) -> bool:
    """Whether shards can be projected on all norms; subclasses of built-in norms do not count."""
    return all(type(norm) in _SCALING_NORMS for norm in norms)


@computation
def _step_shards(
    slots: Sequence[Slot], norms: Sequence[Norm], group: Group, context: Context
) -> Steps[Tensor]:
    """Check the gradients of sharded parameters; then scale and write all of them together."""
    backend = kernels.select("auto", slots[0].param.device)
    finite: Tensor = yield are_finite(slots)
    matrices, ranges = param_matrices(slots, layout=group["layout"], split=group["split"])
    shards = _Shards(matrices, backend)
    for _ in range(group["num_iters"]):
        for norm in norms:
            yield shards.project(norm)
    ready = kernels.Matrices(
        params=[matrix.param for matrix in matrices],
        grads=shards.grads,
        ranges=ranges,
        keys=draw_matrix_keys(slots, matrices, ranges, group),
    )
    take_steps(
        backend,
        ready,
        finite,
        shards.scales(),
        keep=decay_factor(group),
        step=step_factor(group),
        overflow=context.overflow,
    )
    return finite


class _Shards:
    """Shards of matrices, and the scales that projections have given them."""

    def __init__(self, matrices: Sequence[ParamMatrix], backend: kernels.Backend) -> None:
        self.matrices, self.backend = matrices, backend
        self._set_grads([matrix.grad for matrix in matrices])

    def _set_grads(self, grads: Sequence[Tensor]) -> None:
        self.grads = grads
        self._sums = self.backend.sums(grads)
        self.r2 = [_ones(*grad.shape[:-1], 1, like=grad) for grad in grads]
        self.c2 = [_ones(*grad.shape[:-2], 1, grad.shape[-1], like=grad) for grad in grads]

    @computation
    def project(self, norm: Norm) -> Steps[None]:
        """Project on one of `_SCALING_NORMS`. Zero rows and columns stay zero."""
        shapes = [matrix.shape for matrix in self.matrices]
        if isinstance(norm, SignNorm):
            self._set_grads([grad.sign() for grad in self.grads])
        elif isinstance(norm, RowNorm):
            sums = yield sum_over_columns(self._row_sums(), self.matrices)
            self.r2 = [_quotient(n, own) for (_, n), own in zip(shapes, sums, strict=True)]
        elif isinstance(norm, ColumnNorm):
            weights = torch.cat([r2.flatten() for r2 in self.r2])
            sums = yield sum_over_rows(_split(self._sums.of_cols(weights), self.c2), self.matrices)
            self.c2 = [_quotient(m, own) for (m, _), own in zip(shapes, sums, strict=True)]
        else:
            assert isinstance(norm, FrobeniusNorm), f"{norm} has no projection of shards"
            own = [r2 * s for r2, s in zip(self.r2, self._row_sums(), strict=True)]
            totals = yield sum_over_columns([x.sum(-2, keepdim=True) for x in own], self.matrices)
            totals = yield sum_over_rows(totals, self.matrices)
            self.r2 = [
                r2 * _quotient(m * n, total)
                for r2, (m, n), total in zip(self.r2, shapes, totals, strict=True)
            ]

    def scales(self) -> list[kernels.Scales]:
        """Return r and c of each matrix, in float32 or the gradient's wider type."""
        return [
            scales_of(r2.sqrt(), c2.sqrt(), torch.promote_types(grad.dtype, torch.float32))
            for r2, c2, grad in zip(self.r2, self.c2, self.grads, strict=True)
        ]

    def _row_sums(self) -> list[Tensor]:
        """Return S c² of this rank's shards."""
        weights = torch.cat([c2.flatten() for c2 in self.c2])
        return _split(self._sums.of_rows(weights), self.r2)


def _ones(*shape: int, like: Tensor) -> Tensor:
    return torch.ones(shape, dtype=torch.float64, device=like.device)


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [prod(x.shape) for x in like])
    return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]


def _quotient(length: int, sums: Tensor) -> Tensor:
    return torch.where(sums == 0, sums, length / sums)
