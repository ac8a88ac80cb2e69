"""Descent along a gradient normalized by several norms: the algorithms ``mngd`` and ``swan``.

References:
    Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training,
    Algorithm 2. https://arxiv.org/abs/2502.06742
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkgd.exchange import Computation, Steps, computation
from sinkgd.kernels.eager import descend_
from sinkgd.multi_normalize import check_num_iters, take_turns
from sinkgd.norms import Norm, RowNorm, SpectralNorm, check_norms
from sinkgd.optim.algorithms.batches import Piece, batches, stacked
from sinkgd.optim.algorithms.contract import (
    Context,
    Group,
    Slot,
    allowed,
    are_finite,
    check_whole,
    decay,
    descent,
    in_pieces,
    local,
    on_mesh,
    step_by,
)
from sinkgd.optim.algorithms.layout import check_layout
from sinkgd.optim.algorithms.rounding import ROUNDING_OPTIONS, check_rounding, draw_keys
from sinkgd.optim.algorithms.scalings import are_scalings, step_in_pieces


@dataclass(frozen=True)
class MultiNormalized:
    """Project on each norm in turn, all matrices of one shape together, as far as `batches` allows.

    Args:
        options: The group options, with their defaults.
        norms: Gives the norms of a group.
    """

    options: Mapping[str, Any]
    norms: Callable[[Group], Sequence[Norm]]

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse what is no matrix, and norms that are none."""
        check_num_iters(group["num_iters"])
        if "newton_schulz_steps" in self.options:
            check_num_iters(group["newton_schulz_steps"], "newton_schulz_steps")
        norms = self.norms(group)
        check_norms(norms)
        check_layout(name, param, layout=group["layout"], split=group["split"])
        if on_mesh(param) and are_scalings(norms):
            from sinkgd.optim.algorithms.pieces import check_pieces  # noqa: PLC0415 - see parts_of

            check_pieces(name, param, group)
        else:
            check_whole(name, param, "these norms need")
        check_rounding(name, param, group)

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """There is none."""

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Computation[Tensor]:
        """Step along matrices in pieces, and along those that lie whole on this device."""

        def take(are_in_pieces: bool, own: list[Slot]) -> "Computation[Tensor]":
            if are_in_pieces:
                return step_in_pieces(own, self.norms(group), group, context)
            return self._step_whole(own, group, context)

        return step_by(lambda slot: in_pieces(slot.param), slots, take)

    @computation
    def _step_whole(self, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
        """Look through the gradients; then normalize and write batch by batch."""
        finite: Tensor = yield are_finite(slots)
        flags, keys = allowed(finite, context), draw_keys(slots, group)
        here = [slot._replace(param=local(slot.param), grad=local(slot.grad)) for slot in slots]
        for batch in batches(here, layout=group["layout"], split=group["split"]):
            self._descend(batch, group, context, flags, keys)  # which lets go of its scratch
        return finite

    def _descend(
        self,
        batch: Sequence[Piece],
        group: Group,
        context: Context,
        flags: Tensor | None,
        keys: Sequence[Tensor] | None,
    ) -> None:
        updates = self._updates([piece.grad for piece in batch], group, context)
        parts = torch.split(updates, [len(piece.grad) for piece in batch])
        for piece, update in zip(batch, parts, strict=True):
            descend_(
                piece.param,
                update,
                keep=decay(group),
                step=descent(group),
                allowed=None if flags is None else flags[piece.slot],
                key=None if keys is None else keys[piece.slot] + piece.first_entry,
            )

    def _updates(self, grads: Sequence[Tensor], group: Group, context: Context) -> Tensor:
        stack, own = stacked(grads)
        if context.loss_scale is not None:
            # A norm of the user's may depend on the scale.
            stack = torch.div(stack, context.loss_scale, out=stack if own else None)
        update = take_turns(stack, self.norms(group), group["num_iters"], own=own)
        if not own and _share_memory(update, stack):  # `descend_` writes to it
            return update.clone()
        return update


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


MNGD = MultiNormalized(
    options={"norms": (), "num_iters": 5, "layout": "auto", "split": 1, **ROUNDING_OPTIONS},
    norms=lambda group: tuple(group["norms"]),
)

SWAN = MultiNormalized(
    options={
        "newton_schulz_steps": 5,
        "num_iters": 1,
        "layout": "auto",
        "split": 1,
        **ROUNDING_OPTIONS,
    },
    norms=lambda group: (RowNorm(), SpectralNorm(group["newton_schulz_steps"])),
)
