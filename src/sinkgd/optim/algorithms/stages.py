"""A step of SR-Sinkhorn with options, stage by stage; without any, a backend takes it at once.

    gradient → [without tiny rows] → [turned] → [from a half step] → scales → [deflated] → [pinned]
    → update

Momentum is around it: before the first stage, or after the last.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from sinkgd import kernels
from sinkgd.exchange import Computation, Steps, computation, immediate
from sinkgd.kernels.backend import by_owner, finite_of, take_steps
from sinkgd.optim.algorithms.contract import (
    Context,
    Group,
    Slot,
    allowed,
    decay,
    descent,
    known_flags,
    on_mesh,
)
from sinkgd.optim.algorithms.deflated import (
    DEFLATION_OPTIONS,
    Deflating,
    check_deflation,
    deflate_parts,
    deflation_runs,
    with_scales_alone,
)
from sinkgd.optim.algorithms.few_at_a_time import SCRATCH_BYTES, cut, in_turn
from sinkgd.optim.algorithms.half_steps import (
    HALF_STEP_OPTIONS,
    check_half_steps,
    has_half_step_more,
    starts_after_half_step,
)
from sinkgd.optim.algorithms.operator_norm import (
    OPERATOR_NORM_OPTIONS,
    check_operator_norm,
    keep_vectors,
    pin,
    vectors_of,
)
from sinkgd.optim.algorithms.parts import Part, parts_of
from sinkgd.optim.algorithms.rounding import keys_of_parts
from sinkgd.optim.algorithms.tiny_rows import (
    TINY_ROW_OPTIONS,
    check_tiny_rows,
    without_tiny_rows,
)
from sinkgd.optim.algorithms.warm_start import keep_starts_of_slots, starts_of_slots

Known = TypeVar("Known", bound=kernels.Scales | kernels.Lowered)

STAGE_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {**HALF_STEP_OPTIONS, **TINY_ROW_OPTIONS, **DEFLATION_OPTIONS, **OPERATOR_NORM_OPTIONS}
)


def check_stages(group: Group) -> None:
    """Refuse options out of range."""
    check_half_steps(group)
    check_tiny_rows(group)
    check_deflation(group)
    check_operator_norm(group)


def asks_for_stages(group: Group) -> bool:
    """Whether an option needs more than what a backend does at once."""
    return (
        group["last"] == "row"
        or has_half_step_more(group)
        or group["tiny_rows"] == "mask"
        or group["deflated_rank"] > 0
        or group["operator_norm"] is not None
    )


def cuts_runs(slots: Sequence[Slot], group: Group) -> bool:
    """Whether parameters share scales and messages, and are cut into runs by what vectors need."""
    if on_mesh(slots[0].param):
        return True
    packs = kernels.select(group["backend"], slots[0].param.device).packs_vectors
    return packs and group["operator_norm"] is None  # what is pinned is copied


@computation
def step_in_stages(slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
    """Step along parameters of which all or none lie on a mesh."""
    backend = kernels.select(group["backend"], slots[0].param.device)
    parts, owners = parts_of(slots, layout=group["layout"], split=group["split"])
    if group["tiny_rows"] == "mask":
        in_place = all(slot.is_scratch for slot in slots)
        threshold = group["tiny_row_threshold"]
        parts = yield without_tiny_rows(parts, threshold, backend, in_place=in_place)
    is_turned = group["last"] == "row"
    seen = [part.turned() for part in parts] if is_turned else parts
    keys = keys_of_parts(slots, parts, owners, group)
    matrices = kernels.Matrices([x.param for x in seen], [x.grad for x in seen], owners, keys=keys)
    if has_half_step_more(group):
        starts = yield starts_after_half_step(seen, backend)
        matrices = matrices._replace(starts=starts)
    elif group["warm_start"]:
        matrices = matrices._replace(
            starts=starts_of_slots(slots, matrices.grads, owners, group, context)
        )
    found: kernels.Descent = yield _solve(matrices, seen, backend, group)
    if (known := known_flags(slots)) is not None:
        found = found._replace(finite=found.finite & known)
    if group["warm_start"]:
        keep_starts_of_slots(slots, owners, found, group, context)
    # From here on scales are seen as matrices are.
    scales = [own.mT for own in found.scales] if is_turned else list(found.scales)
    solved = _Solved(slots, parts, owners, scales, found.finite, keys)
    runs = [slice(len(slots))]
    if group["deflated_rank"] and cuts_runs(slots, group):
        runs = deflation_runs(slots, owners, group, context)
    taken: Tensor = yield in_turn(
        runs, lambda run: _update(solved.run(run), backend, group, context)
    )
    return taken


class _Solved(NamedTuple, Generic[Known]):
    """Parameters whose scales are known: what is left to do can be done for some after others."""

    slots: Sequence[Slot]
    parts: Sequence[Part]
    owners: Sequence[range]
    scales: Sequence[Known]  # one a part
    finite: Tensor  # (slots,) bool
    keys: Sequence[Tensor] | None  # one a part

    def run(self, run: slice) -> "_Solved[Known]":
        """Return a run of the parameters."""
        owners = self.owners[run]
        first, end = owners[0].start, owners[-1].stop
        return _Solved(
            self.slots[run],
            self.parts[first:end],
            [range(own.start - first, own.stop - first) for own in owners],
            self.scales[first:end],
            self.finite[run],
            None if self.keys is None else self.keys[first:end],
        )


@computation
def _update(
    solved: _Solved[kernels.Scales], backend: kernels.Backend, group: Group, context: Context
) -> Steps[Tensor]:
    """Take the stages after the scales, and say of which parameters all was finite."""
    slots, parts, owners, scales, finite, keys = solved
    lowered: Sequence[kernels.Scales | kernels.Lowered] = scales
    if group["deflated_rank"]:
        deflating = Deflating(slots, owners, parts, scales)
        lowered, flags = yield deflate_parts(deflating, backend, group)
        finite = finite & by_owner(flags, owners)
    if group["operator_norm"] is not None:
        parts, scales = with_scales_alone(parts, lowered)
        known = kernels.Descent(finite, scales)
        found = yield _pinned(slots, parts, owners, known, group, context)
        finite, lowered = found.finite, found.scales
    ready = _Solved(slots, parts, owners, lowered, finite, keys)
    runs = [slice(len(slots))]
    if any(isinstance(own, kernels.Lowered) and own.factor is None for own in lowered):
        # A run may be longer than this; a backend may copy what is deflated.
        sizes = [4 * sum(parts[i].grad.numel() for i in own) for own in owners]
        runs = cut(sizes, SCRATCH_BYTES)
    for run in runs:
        _write(ready.run(run), backend, group, context)
    return finite


def _write(
    known: "_Solved[kernels.Scales | kernels.Lowered]",
    backend: kernels.Backend,
    group: Group,
    context: Context,
) -> None:
    parts, scales = known.parts, known.scales
    if group["last"] == "row":
        parts, scales = [part.turned() for part in parts], [own.mT for own in scales]
    params, grads = [part.param for part in parts], [part.grad for part in parts]
    take_steps(
        backend,
        kernels.Matrices(params, grads, known.owners, keys=known.keys),
        known.finite,
        scales,
        keep=decay(group),
        step=descent(group),
        overflow=context.overflow,
    )


def _solve(
    matrices: kernels.Matrices, parts: Sequence[Part], backend: kernels.Backend, group: Group
) -> Computation[kernels.Descent]:
    num_iters, tol = group["sinkhorn_iterations"], group["tol"]
    places = [part.place for part in parts if part.place is not None]
    if places:
        from sinkgd import sharded  # noqa: PLC0415 - it imports torch.distributed

        return sharded.OnMesh(backend, places).solve(matrices, num_iters, tol=tol)
    scales = backend.scales(matrices.grads, num_iters, tol=tol, starts=matrices.starts)
    return immediate(kernels.Descent(finite_of(scales, matrices.owners), scales))


@computation
def _pinned(
    slots: Sequence[Slot],
    parts: Sequence[Part],
    owners: Sequence[range],
    found: kernels.Descent,
    group: Group,
    context: Context,
) -> Steps[kernels.Descent]:
    """Bring the updates to the operator norm that is asked for, and keep the vectors of it."""
    layout = group["layout"]
    vectors: list[Tensor] = []
    for slot, own in zip(slots, owners, strict=True):
        vectors += vectors_of(context.states[slot.param], slot.param, layout, len(own))
    pinned = yield pin(parts, found.scales, vectors, group)
    finite = found.finite & by_owner(pinned.finite, owners)
    flags = allowed(finite, context)
    for i, (slot, own) in enumerate(zip(slots, owners, strict=True)):
        new = [pinned.vectors[k] for k in own]
        flag = None if flags is None else flags[i]
        keep_vectors(context.states[slot.param], slot.param, layout, new, flag)
    return kernels.Descent(finite, pinned.scales)
