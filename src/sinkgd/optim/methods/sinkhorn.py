"""Descent along SR-Sinkhorn: the methods ``sinkgd`` and ``stateless``.

If no transform is on, and the iterations end with columns, the backend runs the whole step; on a
mesh, ranks add up vectors in between. Otherwise a step is

    slots → [around] → matrices → [before] → scales → [after] → update

where each bracket is a hook of the transforms that are on, in the order of
`sinkgd.optim.transforms.TRANSFORMS`; `sinkgd.optim.transform` says what each hook does.

References:
    Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training,
    Algorithm 4. https://arxiv.org/abs/2502.06742
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from sinkgd import kernels
from sinkgd.distributed.scales import solve_sharded
from sinkgd.distributed.shards import check_shards, is_dtensor, param_matrices
from sinkgd.exchange import Computation, Steps, computation, immediate
from sinkgd.kernels.backend import finite_of, take_steps
from sinkgd.matrix_views import check_layout
from sinkgd.number_check import check_num_iters, check_tol
from sinkgd.optim.apply import (
    ROUNDING_OPTIONS,
    check_rounding,
    decay_factor,
    draw_matrix_keys,
    step_factor,
)
from sinkgd.optim.method import Context, Group, Method, Slot, known_finite, step_by_kind
from sinkgd.optim.transform import (
    Batch,
    Scratch,
    Step,
    Transform,
    copy_chunks,
    in_sequence,
    late_chunks,
    step_in_chunks,
)
from sinkgd.optim.transforms import TRANSFORMS
from sinkgd.optim.transforms.cross_fit import hold_
from sinkgd.optim.transforms.half_step import SIDES


class Sinkhorn(Method):
    """SR-Sinkhorn for matrices, with no state, and with only the scratch memory of the backend.

    Transforms may add state and scratch memory.

    Args:
        vectors: The method of parameters with fewer than two dimensions; None refuses them.
        presets: The defaults of groups of this method, as for `Method`.
    """

    options = MappingProxyType(
        {
            "sinkhorn_iterations": 5,
            "last": "column",
            "backend": "auto",
            "layout": "auto",
            "split": 1,
            "tol": None,
            **{name: value for own in TRANSFORMS for name, value in own.options.items()},
            **ROUNDING_OPTIONS,
        }
    )
    needs = MappingProxyType({k: need for own in TRANSFORMS for k, need in own.needs().items()})
    resizable = MappingProxyType({k: v for own in TRANSFORMS for k, v in own.resizable.items()})

    def __init__(
        self, vectors: Method | None = None, presets: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self._vectors = vectors
        self.least_dims = 2 if vectors is None else 0
        self.presets = MappingProxyType(dict(presets))

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range, an absent backend, and vectors without a method."""
        is_vector = self._vectors is not None and param.ndim < 2
        if self._vectors is not None and is_vector:
            self._vectors.check(name, param, group)
        else:
            check_num_iters(group["sinkhorn_iterations"], "sinkhorn_iterations")
            check_tol(group["tol"])
            if group["last"] not in SIDES:
                raise ValueError(f"last must be one of {SIDES}, got {group['last']!r}")
            kernels.select(group["backend"], param.device)
            check_layout(name, param, layout=group["layout"], split=group["split"])
            check_rounding(name, param, group)
            check_shards(name, param, layout=group["layout"], split=group["split"])
        for transform in TRANSFORMS:
            if transform.takes_vectors or not is_vector:
                transform.check(name, param, group)

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Create the state of the transforms."""
        is_vector = self._vectors is not None and param.ndim < 2
        for transform in _active(group):
            if transform.takes_vectors or not is_vector:
                transform.init_state(param, group, state)

    def needs_scratch(self, group: Group) -> bool:
        """Whether a transform keeps directions, vectors or copies in addition to the gradients."""
        held = [own.scratch(group, packs_vectors=True, sharded=True) for own in _active(group)]
        return any(any(own) for own in held)

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Computation[Tensor]:
        """Update all parameters together, with what transforms do around the step."""
        step: Step = self._step
        for around in reversed(_hooks("around", _active(group))):
            step = partial(around, step)
        return step(slots, group, context)

    def hold_out(
        self, slots: Sequence[Slot], group: Group, context: Context
    ) -> Computation[Tensor]:
        """Keep the scales of matrices for the next step, as `CrossFit` says."""
        return self._step(slots, group, context, _hold_out)

    def _step(
        self,
        slots: Sequence[Slot],
        group: Group,
        context: Context,
        by_parts: "_StepByParts | None" = None,
    ) -> Computation[Tensor]:
        """Update vectors and matrices, sharded and plain, each of these kinds in its own step.

        ``by_parts`` is what is done with matrices if a transform is on; by default, a step.
        """
        vectors, transforms = self._vectors, _active(group)
        kinds = [(x.param.ndim < 2, is_dtensor(x.param)) for x in slots]
        if len(set(kinds)) > 1:
            return step_by_kind(kinds, slots, lambda own: self._step(own, group, context, by_parts))
        if vectors is not None and slots[0].param.ndim < 2:
            return vectors.step(slots, group, context)
        if not transforms and group["last"] == "column" and slots[0].finite is None:
            return _step_at_once(slots, group, context)
        backend = kernels.select(group["backend"], slots[0].param.device)
        packs, sharded = backend.packs_vectors, kinds[0][1]
        held = [own.scratch(group, packs_vectors=packs, sharded=sharded) for own in transforms]
        step = partial(by_parts or _step_by_parts, _Parts(transforms, held, backend))
        if any(own.copies for own in held):
            return step_in_chunks(step, slots, group, context)
        return step(slots, group, context)


class _Parts(NamedTuple):
    """What a step by parts needs: the transforms that are on, what each holds, and the backend."""

    transforms: Sequence[Transform]
    scratch: Sequence[Scratch]
    backend: kernels.Backend


_StepByParts = Callable[[_Parts, Sequence[Slot], Group, Context], Computation[Tensor]]


def _active(group: Group) -> list[Transform]:
    return [own for own in TRANSFORMS if group[own.switch] != own.options[own.switch]]


def _hooks(name: str, transforms: Sequence[Transform]) -> list[Callable[..., Computation[Any]]]:
    """Return the hook ``name`` of each transform that defines it."""
    default = getattr(Transform, name)
    return [getattr(own, name) for own in transforms if getattr(type(own), name) is not default]


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
    backend = kernels.select(group["backend"], slots[0].param.device)
    num_iters, tol, overflow = group["sinkhorn_iterations"], group["tol"], context.overflow
    shardings = [matrix.sharding for matrix in matrices if matrix.sharding is not None]
    if shardings:
        found = yield solve_sharded(backend, shardings, given, num_iters, tol=tol)
        take_steps(backend, given, *found, keep=keep, step=step, overflow=overflow)
    else:
        found = backend.descend_(given, num_iters, keep=keep, step=step, tol=tol, overflow=overflow)
    finite: Tensor = found.finite
    return finite


@computation
def _step_by_parts(
    parts: _Parts, slots: Sequence[Slot], group: Group, context: Context
) -> Steps[Tensor]:
    """Update matrices, applying the transforms in turn. All parameters are DTensors, or none is."""
    batch = yield _scaled(parts, slots, group, context)
    keys = draw_matrix_keys(slots, batch.matrices, batch.ranges, group)
    batch = batch._replace(keys=keys)
    chunks = late_chunks(batch, parts.scratch)
    taken: Tensor = yield in_sequence(
        chunks, lambda own: _finish(parts.transforms, batch.chunk(own))
    )
    return taken


@computation
def _hold_out(
    parts: _Parts, slots: Sequence[Slot], group: Group, context: Context
) -> Steps[Tensor]:
    batch = yield _scaled(parts, slots, group, context)
    return hold_(batch)


@computation
def _scaled(parts: _Parts, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Batch]:
    """Find the scales of matrices, after what transforms do before."""
    matrices, ranges = param_matrices(slots, layout=group["layout"], split=group["split"])
    batch = Batch(slots, group, context, parts.backend, matrices, ranges)
    for before in _hooks("before", parts.transforms):
        batch = yield before(batch)
    found: kernels.Descent = yield _solve(batch)
    finite, known = found.finite, known_finite(slots)
    return batch._replace(
        starts=None,
        # From here on rows are the out-features again.
        scales=[own.mT if group["last"] == "row" else own for own in found.scales],
        finite=finite if known is None else finite & known,
    )


def _solve(batch: Batch) -> Computation[kernels.Descent]:
    """Find the scales of matrices, as the iterations see them, and which gradients are finite."""
    given = _given(batch)
    num_iters, tol = batch.group["sinkhorn_iterations"], batch.group["tol"]
    shardings = [matrix.sharding for matrix in batch.iterated if matrix.sharding is not None]
    if shardings:
        return solve_sharded(batch.backend, shardings, given, num_iters, tol=tol)
    scales = batch.backend.scales(given.grads, num_iters, tol=tol, starts=given.starts)
    return immediate(kernels.Descent(finite_of(scales, given.ranges), scales))


@computation
def _finish(transforms: Sequence[Transform], batch: Batch) -> Steps[Tensor]:
    """Apply the ``after`` hooks, update the parameters, and return which gradients are finite."""
    for after in _hooks("after", transforms):
        batch = yield after(batch)
    chunks = [slice(len(batch.slots))]
    if any(isinstance(x, kernels.CorrectedScales) and x.factor is None for x in batch.scales):
        # The backend may copy the gradients, and together these may be larger than the limit.
        grads = [matrix.grad for matrix in batch.matrices]
        chunks = copy_chunks([4 * sum(grads[i].numel() for i in own) for own in batch.ranges])
    ends_with_rows, finite = batch.group["last"] == "row", batch.finite
    assert finite is not None, "the iterations have run"
    for chunk in chunks:
        some = batch.chunk(chunk)
        take_steps(
            batch.backend,
            _given(some),
            finite[chunk],
            [own.mT for own in some.scales] if ends_with_rows else some.scales,
            keep=decay_factor(batch.group),
            step=step_factor(batch.group),
            overflow=batch.context.overflow,
        )
    return finite


def _given(batch: Batch) -> kernels.Matrices:
    """Return what a backend takes: the matrices as the iterations see them."""
    seen = batch.iterated
    params, grads = [matrix.param for matrix in seen], [matrix.grad for matrix in seen]
    return kernels.Matrices(params, grads, batch.ranges, batch.starts, batch.keys)
