"""Descent along SR-Sinkhorn: the algorithm ``sinkgd``.

References:
    Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training,
    Algorithm 4. https://arxiv.org/abs/2502.06742
"""

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from sinkgd import kernels
from sinkgd.multi_normalize import check_num_iters
from sinkgd.optim.algorithms.contract import Context, Group, Slot, decay, descent
from sinkgd.optim.algorithms.layout import check_layout, matrices


class Sinkhorn:
    """Matrices by SR-Sinkhorn. No state; the scratch of the backend."""

    options = MappingProxyType(
        {"sinkhorn_iterations": 5, "backend": "auto", "layout": "auto", "split": 1}
    )

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse what is no matrix, and a backend that is unknown or absent."""
        check_num_iters(group["sinkhorn_iterations"])
        kernels.select(group["backend"], param.device)
        check_layout(name, param, layout=group["layout"], split=group["split"])

    def read(self, slots: Sequence[Slot], group: Group, context: Context) -> "_SinkhornStep":
        """Compute the scales; they depend on the gradients alone."""
        del context
        return _SinkhornStep(slots, group)


class _SinkhornStep:
    def __init__(self, slots: Sequence[Slot], group: Group) -> None:
        self.group = group
        self.backend = kernels.select(group["backend"], slots[0].param.device)
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.slot_of: list[int] = []  # a split parameter is several matrices
        layout, split = group["layout"], group["split"]
        for i, slot in enumerate(slots):
            for param, grad in matrices(slot.param, slot.grad, layout=layout, split=split):
                self.params.append(param)
                self.grads.append(grad)
                self.slot_of.append(i)
        self.scales = self.backend.scales(self.grads, group["sinkhorn_iterations"])
        self.finite = self._finite(len(slots))

    def _finite(self, num_slots: int) -> list[Tensor]:
        # A non-finite entry makes every column scale of its matrix non-finite.
        flags: list[list[Tensor]] = [[] for _ in range(num_slots)]
        for i, scales in zip(self.slot_of, self.scales, strict=True):
            flags[i].append(scales.col.isfinite().all())
        return [torch.stack(parts).all() if len(parts) > 1 else parts[0] for parts in flags]

    def write(self, allowed: Sequence[Tensor] | None) -> None:
        self.backend.update_(
            self.params,
            self.grads,
            self.scales,
            keep=decay(self.group),
            step=descent(self.group),
            allowed=None if allowed is None else [allowed[i] for i in self.slot_of],
        )
