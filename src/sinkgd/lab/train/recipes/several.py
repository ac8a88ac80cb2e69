"""Several optimizers as one: what schedules, checkpoints and meters see is one of torch's."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer


class Several(Optimizer):
    """Steps with several optimizers, one after the other.

    Its groups are theirs, the very same dicts, in their order, and all share one ``state``.

    Args:
        parts: Optimizers of parameters that do not overlap.

    Raises:
        ValueError: If a parameter is in two of them.

    Examples:
        >>> import torch
        >>> matrix, bias = torch.nn.Linear(2, 2).parameters()
        >>> both = Several([torch.optim.Muon([matrix]), torch.optim.AdamW([bias], lr=0.1)])
        >>> [group["lr"] for group in both.param_groups]
        [0.001, 0.1]
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts: tuple[Optimizer, ...] = ()
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], defaults={})
        self.parts = tuple(parts)
        self.param_groups = groups
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Let every part step.

        Args:
            closure: Computes the loss again and returns it; called once, first.

        Returns:
            What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, and hand it on to the parts."""
        super().load_state_dict(state_dict)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a group after construction: no part would step with it.

        Raises:
            TypeError: After construction.
        """
        if self.parts:
            raise TypeError("Several takes no further groups; add it to one of the parts first")
        super().add_param_group(param_group)

    def _share(self) -> None:
        """Give each part its groups, and all of them one state."""
        state: defaultdict[torch.Tensor, Any] = defaultdict(dict, self.state)
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups = self.param_groups[first:last]
            part.state = state
            first = last
        self.state = state
