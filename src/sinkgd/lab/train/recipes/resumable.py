"""Optimizers of pytorch-optimizer whose whole state is tensors, so that checkpoints have it.

Some of them keep what a run needs to go on where no checkpoint looks: projections inside objects,
a count of steps beside the groups. Here it is moved to the state and to the groups between steps.
"""

import importlib
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sinkgd.lab.train.config import ConfigError
from sinkgd.lab.train.recipes.contract import PYTORCH_OPTIMIZER
from sinkgd.lab.train.recipes.several import Several


def published(name: str) -> Callable[..., Optimizer]:
    """Return a class of pytorch-optimizer.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        module = importlib.import_module(PYTORCH_OPTIMIZER)
    except ImportError as error:
        raise ConfigError(
            f"{name} is from pytorch-optimizer, which cannot be imported ({error}); "
            "install it with: pip install 'sinkgd[experiments]'"
        ) from error
    found: Callable[..., Optimizer] = getattr(module, name)
    return found


class Projected(Several):
    """A GaLore or a Fira whose projections are tensors of the state, and count as such.

    Args:
        part: The optimizer; groups with a ``rank`` are projected.
    """

    def __init__(self, part: Optimizer) -> None:
        super().__init__([part])

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Let the optimizer step with its projectors in place."""
        for group, state in self._projected():
            if "projection" in state:
                state["projector"] = self._projector(group, state.pop("projection"))
        loss = super().step(closure)
        for _, state in self._projected():
            if "projector" in state:
                state["projection"] = state.pop("projector").ortho_matrix
        return loss

    def _projected(self) -> Iterator[tuple[dict[str, Any], MutableMapping[str, Any]]]:
        for group in self.param_groups:
            for param in group["params"]:
                if "rank" in group and param in self.state:
                    yield group, self.state[param]

    def _projector(self, group: dict[str, Any], projection: Tensor) -> Any:
        module = importlib.import_module(type(self.parts[0]).__module__)
        projector = module.GaLoreProjector(
            rank=group["rank"],
            update_proj_gap=group["update_proj_gap"],
            scale=group["scale"],
            projection_type=group["projection_type"],
        )
        projector.ortho_matrix = projection
        return projector


class Counted(Several):
    """A StableSPAM whose count of steps is in its groups.

    Args:
        part: The optimizer.
    """

    def __init__(self, part: Optimizer) -> None:
        super().__init__([part])
        for group in self.param_groups:
            group["total_step"] = 0

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Let the optimizer step with its count in place."""
        (part,) = self.parts
        part.total_step = self.param_groups[0]["total_step"]  # type: ignore[attr-defined]
        loss = super().step(closure)
        for group in self.param_groups:
            group["total_step"] = part.total_step  # type: ignore[attr-defined]
        return loss
