"""Adam that cuts spikes and begins its moments anew: the algorithm ``spam``.

References:
    Huang et al., SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training.
    https://arxiv.org/abs/2501.06842
"""

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor

from sinkgd.exchange import Steps, computation
from sinkgd.optim.algorithms.adamw import descend_by_adamw_
from sinkgd.optim.algorithms.contract import Context, Group, Slot, allowed, are_finite, local
from sinkgd.optim.algorithms.resets import (
    begin,
    check_resets,
    cut_spikes,
    options_of,
    reset_,
    warmed,
)


class Spam:
    """One parameter after the other: the gradient of one alone is ever copied.

    A non-finite gradient holds back its own parameter.
    """

    options = options_of(theta=5000.0, reset_interval=500, warmup_steps=150)

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range; every shape will do, and every piece."""
        del name
        check_resets(param, group)

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Make both moments, zero."""
        begin(state, param, group)

    @computation
    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
        """Look through the gradients; then cut the spikes of each and update as torch does."""
        finite: Tensor = yield are_finite(slots)
        flags = allowed(finite, context)
        for i, slot in enumerate(slots):
            state = context.states[slot.param]
            begin(state, slot.param, group)
            reset_(state, group)
            grad = local(slot.grad)
            if context.loss_scale is not None:
                grad = grad / context.loss_scale
            descend_by_adamw_(
                [local(slot.param)],
                [cut_spikes(grad, state, group)],
                [state],
                group,
                lr=warmed(state, group),
                held_back=None if flags is None else ~flags[i],
            )
        return finite
