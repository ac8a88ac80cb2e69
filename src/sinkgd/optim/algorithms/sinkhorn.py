"""Descent along SR-Sinkhorn: the algorithm ``sinkgd``.

References:
    Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training,
    Algorithm 4. https://arxiv.org/abs/2502.06742
"""

from collections.abc import MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from sinkgd import kernels
from sinkgd.exchange import Computation, Steps, computation, immediate
from sinkgd.multi_normalize import check_num_iters, check_tol
from sinkgd.optim.algorithms.contract import (
    Context,
    Group,
    Slot,
    decay,
    descent,
    known_flags,
    on_mesh,
    step_by,
)
from sinkgd.optim.algorithms.few_at_a_time import few_at_a_time
from sinkgd.optim.algorithms.layout import check_layout
from sinkgd.optim.algorithms.operator_norm import init_vectors
from sinkgd.optim.algorithms.parts import Part, parts_of
from sinkgd.optim.algorithms.rounding import ROUNDING_OPTIONS, check_rounding, keys_of_parts
from sinkgd.optim.algorithms.stages import (
    STAGE_OPTIONS,
    asks_for_stages,
    check_stages,
    cuts_runs,
    step_in_stages,
)
from sinkgd.optim.algorithms.warm_start import (
    init_starts,
    keep_starts_of_slots,
    starts_of_slots,
)


class Sinkhorn:
    """Matrices by SR-Sinkhorn. No state, and the scratch of the backend; options may add to both.

    ``warm_start`` keeps n float32 a matrix, m with ``last="row"``; ``operator_norm`` keeps n.
    """

    options = MappingProxyType(
        {
            "sinkhorn_iterations": 5,
            "backend": "auto",
            "layout": "auto",
            "split": 1,
            "tol": None,
            "warm_start": False,
            **STAGE_OPTIONS,
            **ROUNDING_OPTIONS,
        }
    )

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse what is no matrix, options out of range, and a backend unknown or absent."""
        check_num_iters(group["sinkhorn_iterations"], "sinkhorn_iterations")
        check_tol(group["tol"])
        check_stages(group)
        kernels.select(group["backend"], param.device)
        check_layout(name, param, layout=group["layout"], split=group["split"])
        check_rounding(name, param, group)
        if on_mesh(param):
            from sinkgd.optim.algorithms.pieces import check_pieces  # noqa: PLC0415 - see parts_of

            check_pieces(name, param, group)

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Make the start of a warm start, ones, and that of a power iteration."""
        if not (group["warm_start"] or group["operator_norm"]):
            return
        slot = Slot("", 0, param.detach(), param.detach())
        parts, _ = parts_of([slot], layout=group["layout"], split=group["split"])
        if group["warm_start"]:
            is_turned = group["last"] == "row"
            grads = [part.grad.mT if is_turned else part.grad for part in parts]
            init_starts(state, grads, slot.param.device)
        if group["operator_norm"]:
            init_vectors(state, slot.param, group["layout"], len(parts))

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Computation[Tensor]:
        """Descend along all matrices at once. Their updates do not depend on the loss's scale."""
        in_stages = asks_for_stages(group) or known_flags(slots) is not None
        step = step_in_stages if in_stages else _step
        masks = group["tiny_rows"] == "mask" and not all(slot.is_scratch for slot in slots)

        def take(are_on_mesh: bool, own: Sequence[Slot]) -> "Computation[Tensor]":
            # Deflation may cut its runs itself, after the scales of all are known.
            if masks or (group["deflated_rank"] and not are_on_mesh and not cuts_runs(own, group)):
                return few_at_a_time(own, lambda some: step(some, group, context), context)
            return step(own, group, context)

        return step_by(lambda slot: on_mesh(slot.param), slots, take)


@computation
def _step(slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
    """Step along parameters of which all or none lie on a mesh."""
    parts, owners = parts_of(slots, layout=group["layout"], split=group["split"])
    matrices = kernels.Matrices(
        params=[part.param for part in parts],
        grads=[part.grad for part in parts],
        owners=owners,
        keys=keys_of_parts(slots, parts, owners, group),
    )
    if group["warm_start"]:
        matrices = matrices._replace(
            starts=starts_of_slots(slots, matrices.grads, owners, group, context)
        )
    found: kernels.Descent = yield _descend_(matrices, parts, group, context)
    if group["warm_start"]:
        keep_starts_of_slots(slots, owners, found, group, context)
    return found.finite


def _descend_(
    matrices: kernels.Matrices, parts: Sequence[Part], group: Group, context: Context
) -> Computation[kernels.Descent]:
    """Take the step of matrices, by a backend or by ranks together."""
    backend = kernels.select(group["backend"], matrices.params[0].device)
    num_iters = group["sinkhorn_iterations"]
    options = {
        "keep": decay(group),
        "step": descent(group),
        "tol": group["tol"],
        "overflow": context.overflow,
    }
    places = [part.place for part in parts if part.place is not None]
    if not places:
        return immediate(backend.descend_(matrices, num_iters, **options))
    from sinkgd import sharded  # noqa: PLC0415 - it imports torch.distributed

    return sharded.OnMesh(backend, places).descend_(matrices, num_iters, **options)
