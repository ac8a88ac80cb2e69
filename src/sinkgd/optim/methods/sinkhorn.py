"""Descent along SR-Sinkhorn: the methods ``sinkgd`` and ``stateless``.

Without options the backend runs the whole step. With options, transforms are applied in this order:

    gradient → [tiny_rows] → [transposed] → [start] → scales → [deflate] → [operator_norm] → update

Momentum comes before the first transform, or after the last.

References:
    Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training,
    Algorithm 4. https://arxiv.org/abs/2502.06742
"""

from collections.abc import Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from sinkgd import kernels
from sinkgd.distributed.scales import solve_sharded
from sinkgd.distributed.shards import ParamMatrix, check_shards, is_dtensor, param_matrices
from sinkgd.exchange import Computation, Steps, computation, immediate
from sinkgd.kernels.backend import (
    by_owner,
    finite_of,
    take_steps,
)
from sinkgd.matrix_views import check_layout
from sinkgd.number_check import check_num_iters, check_tol
from sinkgd.optim.apply import (
    ROUNDING_OPTIONS,
    allowed,
    check_rounding,
    decay_factor,
    draw_matrix_keys,
    step_factor,
)
from sinkgd.optim.chunking import SCRATCH_BYTES, chunk_slices, in_sequence, step_in_chunks
from sinkgd.optim.method import Context, Group, Method, Slot, known_finite, step_by_kind
from sinkgd.optim.transforms.deflate import (
    DEFLATION_OPTIONS,
    Deflating,
    check_deflation,
    deflate_matrices,
    deflation_chunks,
    with_plain_scales,
)
from sinkgd.optim.transforms.momentum import (
    MOMENTUM_OPTIONS,
    check_momentum,
    init_momentum,
    step_with_momentum,
)
from sinkgd.optim.transforms.operator_norm import (
    OPERATOR_NORM_OPTIONS,
    check_operator_norm,
    init_vectors,
    keep_vectors,
    pin,
    vectors_of,
)
from sinkgd.optim.transforms.start import (
    START_OPTIONS,
    check_start_options,
    check_warm_start_shards,
    has_extra_half_step,
    init_warm_start,
    keep_warm_starts,
    starts_after_half_step,
    warm_starts,
)
from sinkgd.optim.transforms.tiny_rows import TINY_ROW_OPTIONS, check_tiny_rows, mask_tiny_rows

Known = TypeVar("Known", bound=kernels.Scales | kernels.CorrectedScales)


class Sinkhorn(Method):
    """SR-Sinkhorn for matrices, with no state, and with only the scratch memory of the backend.

    Options may add to both: ``warm_start`` keeps n float32 per matrix, or m with ``last="row"``;
    ``operator_norm`` keeps n.

    Args:
        vectors: The method of parameters with fewer than two dimensions; None refuses them.
        presets: The defaults of groups of this method, as for `Method`.
    """

    options = MappingProxyType(
        {
            "sinkhorn_iterations": 5,
            "backend": "auto",
            "layout": "auto",
            "split": 1,
            "tol": None,
            "warm_start": False,
            **START_OPTIONS,
            **TINY_ROW_OPTIONS,
            **DEFLATION_OPTIONS,
            **OPERATOR_NORM_OPTIONS,
            **ROUNDING_OPTIONS,
            **MOMENTUM_OPTIONS,
        }
    )

    def __init__(
        self, vectors: Method | None = None, presets: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self._vectors = vectors
        self.presets = MappingProxyType(dict(presets))

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range, an unknown or absent backend, and non-matrix parameters."""
        check_momentum(group)
        if self._vectors is not None and param.ndim < 2:
            self._vectors.check(name, param, group)
            return
        check_num_iters(group["sinkhorn_iterations"], "sinkhorn_iterations")
        check_tol(group["tol"])
        check_start_options(group)
        check_tiny_rows(group)
        check_deflation(group)
        check_operator_norm(group)
        kernels.select(group["backend"], param.device)
        check_layout(name, param, layout=group["layout"], split=group["split"])
        check_rounding(name, param, group)
        check_shards(name, param, layout=group["layout"], split=group["split"])
        check_warm_start_shards(name, param, group)

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Create the state of warm starts, the operator norm and momentum."""
        is_matrix = self._vectors is None or param.ndim >= 2
        if is_matrix and (group["warm_start"] or group["operator_norm"]):
            slot = Slot("", 0, param.detach(), param.detach())
            matrices, _ = param_matrices([slot], layout=group["layout"], split=group["split"])
            if group["warm_start"]:
                ends_with_rows = group["last"] == "row"
                grads = [x.grad.mT if ends_with_rows else x.grad for x in matrices]
                init_warm_start(state, grads, slot.param.device)
            if group["operator_norm"]:
                init_vectors(state, slot.param, group["layout"], len(matrices))
        init_momentum(state, param, group)

    def needs_scratch(self, group: Group) -> bool:
        """Whether directions, vectors or masked gradients are kept in addition to the gradients."""
        return bool(group["deflated_rank"] or group["nesterov"] or group["tiny_rows"] == "mask")

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Computation[Tensor]:
        """Update all parameters at once, with momentum if the group has it."""
        if group["momentum"]:
            return step_with_momentum(self._step, slots, group, context)
        return self._step(slots, group, context)

    def _step(self, slots: Sequence[Slot], group: Group, context: Context) -> Computation[Tensor]:
        """Update vectors, sharded matrices and plain matrices, each kind by its own rule."""
        vectors = self._vectors
        kinds = [(x.param.ndim < 2, is_dtensor(x.param)) for x in slots]
        if len(set(kinds)) > 1:
            return step_by_kind(kinds, slots, lambda own: self._step(own, group, context))
        if vectors is not None and slots[0].param.ndim < 2:
            return vectors.step(slots, group, context)
        needs_transforms = (
            group["last"] == "row"
            or group["first"] == "column"  # an extra half step on the side of the last one
            or group["tiny_rows"] == "mask"
            or group["deflated_rank"] > 0
            or group["operator_norm"] is not None
            or any(slot.finite is not None for slot in slots)
        )
        step = _step_with_transforms if needs_transforms else _step_at_once
        copies = group["tiny_rows"] == "mask" and not all(slot.is_scratch for slot in slots)
        # Deflation may cut chunks itself, after the scales of all are known.
        if copies or (group["deflated_rank"] and not _shares_scales(slots, group)):
            return step_in_chunks(slots, lambda some: step(some, group, context), context)
        return step(slots, group, context)


def _shares_scales(slots: Sequence[Slot], group: Group) -> bool:
    """Whether all parameters share scales and messages, so that only vectors need chunks."""
    if is_dtensor(slots[0].param):
        return True
    packs = kernels.select(group["backend"], slots[0].param.device).packs_vectors
    return packs and group["operator_norm"] is None  # the operator norm reads copies


@computation
def _step_at_once(slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
    """Let the backend update matrices. Either all parameters are DTensors, or none is."""
    matrices, ranges = param_matrices(slots, layout=group["layout"], split=group["split"])
    given = kernels.Matrices(
        params=[matrix.param for matrix in matrices],
        grads=[matrix.grad for matrix in matrices],
        ranges=ranges,
        keys=draw_matrix_keys(slots, matrices, ranges, group),
    )
    keep, step = decay_factor(group), step_factor(group)
    if group["warm_start"]:
        given = given._replace(starts=warm_starts(slots, given.grads, ranges, group, context))
    backend = kernels.select(group["backend"], slots[0].param.device)
    num_iters, tol = group["sinkhorn_iterations"], group["tol"]
    overflow = context.overflow
    shardings = [matrix.sharding for matrix in matrices if matrix.sharding is not None]
    if shardings:
        found = yield solve_sharded(backend, shardings, given, num_iters, tol=tol)
        known = found.finite, found.scales
        take_steps(backend, given, *known, keep=keep, step=step, overflow=overflow)
    else:
        found = backend.descend_(given, num_iters, keep=keep, step=step, tol=tol, overflow=overflow)
    if group["warm_start"]:
        keep_warm_starts(slots, ranges, found, group, context)
    finite: Tensor = found.finite
    return finite


class _Solved(NamedTuple, Generic[Known]):
    """Parameters whose scales are known; the rest of the step may take chunks of them."""

    slots: Sequence[Slot]
    matrices: Sequence[ParamMatrix]
    ranges: Sequence[range]
    scales: Sequence[Known]  # one per matrix
    finite: Tensor  # (slots,) bool
    keys: Sequence[Tensor] | None  # one per matrix

    def chunk(self, chunk: slice) -> "_Solved[Known]":
        """Return some of the parameters."""
        ranges = self.ranges[chunk]
        first, end = ranges[0].start, ranges[-1].stop
        return _Solved(
            self.slots[chunk],
            self.matrices[first:end],
            [range(own.start - first, own.stop - first) for own in ranges],
            self.scales[first:end],
            self.finite[chunk],
            None if self.keys is None else self.keys[first:end],
        )


@computation
def _step_with_transforms(slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
    """Update matrices by one transform after the other.

    Either all parameters are DTensors, or none is.
    """
    backend = kernels.select(group["backend"], slots[0].param.device)
    matrices, ranges = param_matrices(slots, layout=group["layout"], split=group["split"])
    if group["tiny_rows"] == "mask":
        in_place = all(slot.is_scratch for slot in slots)
        threshold = group["tiny_row_threshold"]
        matrices = yield mask_tiny_rows(matrices, threshold, backend, in_place=in_place)
    ends_with_rows = group["last"] == "row"
    seen = [matrix.mT for matrix in matrices] if ends_with_rows else matrices
    keys = draw_matrix_keys(slots, matrices, ranges, group)
    given = kernels.Matrices([x.param for x in seen], [x.grad for x in seen], ranges, keys=keys)
    if has_extra_half_step(group):
        starts = yield starts_after_half_step(seen, backend)
        given = given._replace(starts=starts)
    elif group["warm_start"]:
        given = given._replace(starts=warm_starts(slots, given.grads, ranges, group, context))
    found: kernels.Descent = yield _solve(given, seen, backend, group)
    if (known := known_finite(slots)) is not None:
        found = found._replace(finite=found.finite & known)
    if group["warm_start"]:
        keep_warm_starts(slots, ranges, found, group, context)
    # From here on rows are the out-features again.
    scales = [own.mT for own in found.scales] if ends_with_rows else list(found.scales)
    solved = _Solved(slots, matrices, ranges, scales, found.finite, keys)
    chunks = [slice(len(slots))]
    if group["deflated_rank"] and _shares_scales(slots, group):
        chunks = deflation_chunks(slots, ranges, group, context)
    taken: Tensor = yield in_sequence(
        chunks, lambda chunk: _finish(solved.chunk(chunk), backend, group, context)
    )
    return taken


def _solve(
    given: kernels.Matrices,
    matrices: Sequence[ParamMatrix],
    backend: kernels.Backend,
    group: Group,
) -> Computation[kernels.Descent]:
    """Find the scales of matrices."""
    num_iters, tol = group["sinkhorn_iterations"], group["tol"]
    shardings = [matrix.sharding for matrix in matrices if matrix.sharding is not None]
    if shardings:
        return solve_sharded(backend, shardings, given, num_iters, tol=tol)
    scales = backend.scales(given.grads, num_iters, tol=tol, starts=given.starts)
    return immediate(kernels.Descent(finite_of(scales, given.ranges), scales))


@computation
def _finish(
    solved: _Solved[kernels.Scales], backend: kernels.Backend, group: Group, context: Context
) -> Steps[Tensor]:
    """Apply the transforms after the scales, write, and return which parameters were finite."""
    slots, matrices, ranges, scales, finite, keys = solved
    corrected: Sequence[kernels.Scales | kernels.CorrectedScales] = scales
    if group["deflated_rank"]:
        deflating = Deflating(slots, ranges, matrices, scales)
        corrected, flags = yield deflate_matrices(deflating, backend, group)
        finite = finite & by_owner(flags, ranges)
    if group["operator_norm"] is not None:
        matrices, scales = with_plain_scales(matrices, corrected)
        known = kernels.Descent(finite, scales)
        found = yield _pinned(slots, matrices, ranges, known, group, context)
        finite, corrected = found.finite, found.scales
    ready = _Solved(slots, matrices, ranges, corrected, finite, keys)
    chunks = [slice(len(slots))]
    if any(isinstance(own, kernels.CorrectedScales) and own.factor is None for own in corrected):
        # The backend may copy the gradients, and together these may be larger than the limit.
        sizes = [4 * sum(matrices[i].grad.numel() for i in own) for own in ranges]
        chunks = chunk_slices(sizes, SCRATCH_BYTES)
    for chunk in chunks:
        _write_(ready.chunk(chunk), backend, group, context)
    return finite


@computation
def _pinned(
    slots: Sequence[Slot],
    matrices: Sequence[ParamMatrix],
    ranges: Sequence[range],
    found: kernels.Descent,
    group: Group,
    context: Context,
) -> Steps[kernels.Descent]:
    """Bring the updates to the requested operator norm, and keep its vectors."""
    layout = group["layout"]
    vectors: list[Tensor] = []
    for slot, own in zip(slots, ranges, strict=True):
        vectors += vectors_of(context.states[slot.param], slot.param, layout, len(own))
    pinned = yield pin(matrices, found.scales, vectors, group)
    finite = found.finite & by_owner(pinned.finite, ranges)
    flags = allowed(finite, context)
    for i, (slot, own) in enumerate(zip(slots, ranges, strict=True)):
        new = [pinned.vectors[k] for k in own]
        flag = None if flags is None else flags[i]
        keep_vectors(context.states[slot.param], slot.param, layout, new, flag)
    return kernels.Descent(finite, pinned.scales)


def _write_(
    known: "_Solved[kernels.Scales | kernels.CorrectedScales]",
    backend: kernels.Backend,
    group: Group,
    context: Context,
) -> None:
    """Write the parameters."""
    matrices, scales = known.matrices, known.scales
    if group["last"] == "row":
        matrices, scales = [matrix.mT for matrix in matrices], [own.mT for own in scales]
    params, grads = [matrix.param for matrix in matrices], [matrix.grad for matrix in matrices]
    take_steps(
        backend,
        kernels.Matrices(params, grads, known.ranges, keys=known.keys),
        known.finite,
        scales,
        keep=decay_factor(group),
        step=step_factor(group),
        overflow=context.overflow,
    )
