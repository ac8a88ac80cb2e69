"""Descent along a gradient normalized by several norms: the algorithms ``mngd`` and ``swan``.

References:
    Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training,
    Algorithm 2. https://arxiv.org/abs/2502.06742
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkgd.kernels.eager import descend_
from sinkgd.multi_normalize import check_num_iters, multi_normalize
from sinkgd.norms import Norm, RowNorm, SpectralNorm
from sinkgd.optim.algorithms.contract import Context, Group, Slot, are_finite, decay, descent
from sinkgd.optim.algorithms.layout import check_layout, matrices
from sinkgd.optim.algorithms.rounding import ROUNDING_OPTIONS, check_rounding, draw_keys


@dataclass(frozen=True)
class MultiNormalized:
    """Project on each norm in turn; needs about two matrices of scratch, one parameter at a time.

    Args:
        options: The group options, with their defaults.
        norms: Gives the norms of a group.
    """

    options: Mapping[str, Any]
    norms: Callable[[Group], Sequence[Norm]]

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse what is no matrix, and norms that are none."""
        check_num_iters(group["num_iters"])
        norms = self.norms(group)
        if not norms:
            raise ValueError("norms must name at least one norm, got none; e.g. [RowNorm()]")
        for norm in norms:
            if not isinstance(norm, Norm):
                raise TypeError(f"a norm needs a method project(x); {norm!r} has none")
        check_layout(name, param, layout=group["layout"], split=group["split"])
        check_rounding(name, param, group)

    def read(self, slots: Sequence[Slot], group: Group, context: Context) -> "_Step":
        """Check the gradients; each is normalized when it is written, so one at a time."""
        return _Step(slots, group, self.norms(group), context)


class _Step:
    def __init__(
        self, slots: Sequence[Slot], group: Group, norms: Sequence[Norm], context: Context
    ) -> None:
        self.slots, self.group, self.norms, self.context = slots, group, norms, context
        self.finite = are_finite([slot.grad for slot in slots])

    def write(self, allowed: Tensor | None) -> None:
        layout, split = self.group["layout"], self.group["split"]
        keys = draw_keys(self.slots, self.group)
        for i, slot in enumerate(self.slots):
            entries = 0  # places of the random bits are counted over all parts of a parameter
            for param, grad in matrices(slot.param, slot.grad, layout=layout, split=split):
                descend_(
                    param,
                    self._update(grad),
                    keep=decay(self.group),
                    step=descent(self.group),
                    allowed=None if allowed is None else allowed[i],
                    key=None if keys is None else keys[i] + entries,
                )
                entries += param.numel()

    def _update(self, grad: Tensor) -> Tensor:
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        if self.context.loss_scale is not None:
            wide = wide / self.context.loss_scale  # a norm of the user's may depend on the scale
        return multi_normalize(wide, self.norms, self.group["num_iters"])


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
