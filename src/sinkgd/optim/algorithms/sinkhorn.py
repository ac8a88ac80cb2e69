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
from sinkgd.multi_normalize import check_num_iters, check_tol
from sinkgd.optim.algorithms.contract import Context, Group, Slot, decay, descent
from sinkgd.optim.algorithms.layout import check_layout, matrices
from sinkgd.optim.algorithms.rounding import ROUNDING_OPTIONS, check_rounding, draw_keys
from sinkgd.optim.algorithms.warm_start import keep_starts, starts_of


class Sinkhorn:
    """Matrices by SR-Sinkhorn. No state, unless ``warm_start``; the scratch of the backend."""

    options = MappingProxyType(
        {
            "sinkhorn_iterations": 5,
            "backend": "auto",
            "layout": "auto",
            "split": 1,
            "tol": None,
            "warm_start": False,
            **ROUNDING_OPTIONS,
        }
    )

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse what is no matrix, options out of range, and a backend unknown or absent."""
        check_num_iters(group["sinkhorn_iterations"])
        check_tol(group["tol"])
        kernels.select(group["backend"], param.device)
        check_layout(name, param, layout=group["layout"], split=group["split"])
        check_rounding(name, param, group)

    def read(self, slots: Sequence[Slot], group: Group, context: Context) -> "_SinkhornStep":
        """Compute the scales; they depend on the gradients alone, and where iterations begin."""
        return _SinkhornStep(slots, group, context)


class _SinkhornStep:
    def __init__(self, slots: Sequence[Slot], group: Group, context: Context) -> None:
        self.slots, self.group, self.context = slots, group, context
        self.backend = kernels.select(group["backend"], slots[0].param.device)
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.parts: list[range] = []  # of every slot, which of these are its matrices
        layout, split = group["layout"], group["split"]
        for slot in slots:
            first = len(self.params)
            for param, grad in matrices(slot.param, slot.grad, layout=layout, split=split):
                self.params.append(param)
                self.grads.append(grad)
            self.parts.append(range(first, len(self.params)))
        self.scales = self.backend.scales(
            self.grads, group["sinkhorn_iterations"], tol=group["tol"], starts=self._starts()
        )
        self.finite = self._finite()

    def _starts(self) -> Sequence[Tensor | None] | None:
        if not self.group["warm_start"]:
            return None
        starts: list[Tensor | None] = []
        for slot, parts in zip(self.slots, self.parts, strict=True):
            starts += starts_of(self.context.states[slot.param], [self.grads[i] for i in parts])
        return starts

    def _finite(self) -> Tensor:
        # A non-finite entry makes every column scale of its matrix non-finite: one tells all.
        if self.grads[0].is_cpu and not torch.compiler.is_compiling():
            # Nearly always all are finite, and that is soon seen.
            flat = [col.view(-1) for _, col in self.scales]
            if bool(torch.cat(flat).isfinite().all()):
                return torch.ones(len(self.slots), dtype=torch.bool)
        heads = [col[..., 0].flatten() for _, col in self.scales]
        flags = torch.cat(heads).isfinite()
        if len(flags) == len(self.slots):
            return flags
        sizes = [sum(len(heads[i]) for i in parts) for parts in self.parts]
        return torch.stack([own.all() for own in torch.split(flags, sizes)])

    def write(self, allowed: Tensor | None) -> None:
        flags = None if allowed is None else allowed.unbind()
        self.backend.update_(
            self.params,
            self.grads,
            self.scales,
            keep=decay(self.group),
            step=descent(self.group),
            allowed=None if flags is None else self._of_matrices(flags),
            keys=self._keys(),
        )
        if self.group["warm_start"]:
            for i, (slot, parts) in enumerate(zip(self.slots, self.parts, strict=True)):
                flag = None if flags is None else flags[i]
                state = self.context.states[slot.param]
                keep_starts(state, [self.scales[part] for part in parts], flag)

    def _of_matrices(self, of_slots: Sequence[Tensor]) -> list[Tensor]:
        return [one for one, parts in zip(of_slots, self.parts, strict=True) for _ in parts]

    def _keys(self) -> Sequence[Tensor] | None:
        of_slots = draw_keys(self.slots, self.group)
        if of_slots is None:
            return None
        keys = []
        for key, parts in zip(of_slots, self.parts, strict=True):
            entries = 0  # places of the random bits are counted over all parts of a parameter
            for part in parts:
                keys.append(key + entries if entries else key)
                entries += self.params[part].numel()
        return keys
