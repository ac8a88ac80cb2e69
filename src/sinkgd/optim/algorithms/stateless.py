"""No state for any parameter: matrices by SR-Sinkhorn, vectors and scalars by their own l2 norm."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkgd.optim.algorithms.contract import Algorithm, Context, Group, Slot
from sinkgd.optim.algorithms.normalize import Normalize
from sinkgd.optim.algorithms.sinkhorn import Sinkhorn


class Stateless:
    """`Sinkhorn` where a parameter has two dimensions or more, `Normalize` elsewhere."""

    options = Sinkhorn.options

    def __init__(self) -> None:
        self._matrices: Algorithm = Sinkhorn()
        self._vectors: Algorithm = Normalize()

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Check a matrix as `Sinkhorn` does, a vector as `Normalize` does."""
        rule = self._matrices if param.ndim >= 2 else self._vectors
        rule.check(name, param, group)

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Tensor:
        """Update matrices and vectors, each by its own rule."""
        are_matrices = [slot.param.ndim >= 2 for slot in slots]
        if all(are_matrices):
            return self._matrices.step(slots, group, context)
        flags: dict[int, Tensor] = {}
        for kind, rule in ((True, self._matrices), (False, self._vectors)):
            places = [i for i, is_matrix in enumerate(are_matrices) if is_matrix == kind]
            if places:
                own = rule.step([slots[i] for i in places], group, context)
                flags.update(zip(places, own.unbind(), strict=True))
        return torch.stack([flags[i] for i in range(len(slots))])
