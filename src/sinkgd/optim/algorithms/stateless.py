"""No state for any parameter: matrices by SR-Sinkhorn, vectors and scalars by their own l2 norm."""

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor

from sinkgd.exchange import Computation
from sinkgd.optim.algorithms.contract import Algorithm, Context, Group, Slot, step_by
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

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Make what `Sinkhorn` keeps of a matrix."""
        if param.ndim >= 2:
            self._matrices.init_state(param, group, state)

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Computation[Tensor]:
        """Update matrices and vectors, each by its own rule."""

        def rule_of(slot: Slot) -> Algorithm:
            return self._matrices if slot.param.ndim >= 2 else self._vectors

        return step_by(rule_of, slots, lambda rule, own: rule.step(own, group, context))
