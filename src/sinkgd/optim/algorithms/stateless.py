"""No state for any parameter: matrices by SR-Sinkhorn, vectors and scalars by their own l2 norm."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkgd.optim.algorithms.contract import Algorithm, Context, Group, Slot, Step
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

    def read(self, slots: Sequence[Slot], group: Group, context: Context) -> "_JointStep":
        """Read matrices and vectors, each by its own rule."""
        parts: list[tuple[list[int], Step]] = []
        algorithms: tuple[tuple[Algorithm, bool], ...]
        algorithms = ((self._matrices, True), (self._vectors, False))
        for algorithm, takes_matrices in algorithms:
            places = [i for i, slot in enumerate(slots) if (slot.param.ndim >= 2) == takes_matrices]
            if places:
                parts.append((places, algorithm.read([slots[i] for i in places], group, context)))
        return _JointStep(parts)


class _JointStep:
    """Two steps over one list of slots, each with the places of its own."""

    def __init__(self, parts: Sequence[tuple[list[int], Step]]) -> None:
        self.parts = parts
        places = [place for own, _ in parts for place in own]
        flags = torch.cat([step.finite for _, step in parts]).unbind()
        by_place = dict(zip(places, flags, strict=True))
        self.finite = torch.stack([by_place[place] for place in range(len(places))])

    def write(self, allowed: Tensor | None) -> None:
        for places, step in self.parts:
            step.write(None if allowed is None else torch.stack([allowed[i] for i in places]))
