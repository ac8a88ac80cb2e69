"""Descent along the tempered gradient, matrices, vectors and scalars by one rule. No state."""

from collections.abc import Callable, MutableMapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkgd.exchange import Steps, computation
from sinkgd.kernels.eager import descend_
from sinkgd.optim.algorithms.contract import (
    Context,
    Group,
    Slot,
    allowed,
    are_finite,
    decay,
    descent,
    local,
    on_mesh,
)
from sinkgd.optim.algorithms.layout import check_layout
from sinkgd.optim.algorithms.parts import Part, parts_of
from sinkgd.optim.algorithms.rounding import ROUNDING_OPTIONS, check_rounding, draw_keys
from sinkgd.tempered import EPS, NUM_ITERS, TAU, check_tempering, temper

if TYPE_CHECKING:
    from sinkgd.sharded import Spread


class Tempered:
    """`temper` of each gradient, which keeps its size: a loss scale is divided out first."""

    options = MappingProxyType[str, object](
        {
            "tau": TAU,
            "n_iter": NUM_ITERS,
            "eps": EPS,
            "layout": "auto",
            "split": 1,
            **ROUNDING_OPTIONS,
        }
    )

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range, and pieces that cannot be handled."""
        check_tempering(group["tau"], group["n_iter"], group["eps"], "n_iter")
        check_rounding(name, param, group)
        if param.ndim < 2:
            return
        check_layout(name, param, layout=group["layout"], split=group["split"])
        if on_mesh(param):
            from sinkgd.optim.algorithms.pieces import check_pieces  # noqa: PLC0415 - see parts_of

            check_pieces(name, param, group)

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """There is none."""

    @computation
    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
        """Look through the gradients; then temper and write, those on a mesh side by side."""
        finite: Tensor = yield are_finite(slots)
        flags, keys = allowed(finite, context), draw_keys(slots, group)

        def write_(i: int, part: Part, update: Tensor) -> None:
            descend_(
                part.param,
                update,
                keep=decay(group),
                step=descent(group),
                allowed=None if flags is None else flags[i],
                key=None if keys is None else keys[i] + part.first_entry,
            )

        in_pieces: list[tuple[int, Part]] = []
        for i, slot in enumerate(slots):
            for part in _parts(slot, group):
                if on_mesh(slot.param):
                    in_pieces.append((i, part))
                else:
                    wide = _unscaled(part.grad, context)
                    write_(i, part, temper(wide, group["tau"], group["n_iter"], eps=group["eps"]))
        if in_pieces:
            yield _step_in_pieces(slots, in_pieces, group, context, write_)
        return finite


@computation
def _step_in_pieces(
    slots: Sequence[Slot],
    parts: Sequence[tuple[int, Part]],
    group: Group,
    context: Context,
    write_: Callable[[int, Part, Tensor], None],
) -> Steps[None]:
    """Temper pieces of matrices and vectors together with the ranks that hold the others.

    A float32 copy of each piece is held until the last sum is known.
    """
    from sinkgd import sharded  # noqa: PLC0415 - it imports torch.distributed

    def spread_of(slot: Slot, part: Part) -> "Spread":
        if part.place is not None:
            return sharded.spread_of(part.place)
        assert on_mesh(slot.grad), "its parameter is"
        return sharded.Spread(all=sharded.groups_of(slot.grad))

    @computation
    def step(i: int, part: Part, spread: "Spread") -> "Steps[None]":
        wide = _unscaled(part.grad, context)
        update = yield sharded.temper_piece(
            wide, spread, group["tau"], group["n_iter"], eps=group["eps"]
        )
        write_(i, part, update)

    yield [step(i, part, spread_of(slots[i], part)) for i, part in parts]


def _parts(slot: Slot, group: Group) -> list[Part]:
    if slot.param.ndim < 2:
        return [Part(local(slot.param), local(slot.grad), 0)]
    return parts_of([slot], layout=group["layout"], split=group["split"]).parts


def _unscaled(grad: Tensor, context: Context) -> Tensor:
    """Return a gradient in float32 or wider, without the scale of the loss."""
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    return wide if context.loss_scale is None else wide / context.loss_scale
