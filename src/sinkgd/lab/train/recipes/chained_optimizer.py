"""Several optimizers that step as one, and wrappers for optimizers of pytorch-optimizer.

Schedulers, checkpoints and meters see a single optimizer. A resumed run needs data that some
optimizers of pytorch-optimizer do not keep as tensors or numbers in the state or the groups: they
keep projections inside objects, or a step count as an attribute. Between steps the wrappers here
move such data into the state or the groups, so that checkpoints hold all of it.
"""

import importlib
from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sinkgd.lab.options import how_to_install
from sinkgd.lab.train.config import ConfigError
from sinkgd.lab.train.recipes.recipe import PYTORCH_OPTIMIZER


class ChainedOptimizer(Optimizer):
    """Steps with several optimizers, one after the other.

    Its groups are the groups of these optimizers, the same dicts in order. It shares one ``state``
    with all of them.

    Args:
        parts: Optimizers with disjoint parameters.

    Raises:
        ValueError: If a parameter is in two of these optimizers.

    Examples:
        >>> import torch
        >>> matrix, bias = torch.nn.Linear(2, 2).parameters()
        >>> both = ChainedOptimizer([torch.optim.Muon([matrix]), torch.optim.AdamW([bias], lr=0.1)])
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
        """Step with every optimizer.

        Args:
            closure: Computes the loss again and returns it; called once, before the steps.

        Returns:
            The result of ``closure``, or None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of ``state_dict``, and share it with the optimizers."""
        super().load_state_dict(state_dict)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a group after construction, because no optimizer would step with it.

        Raises:
            TypeError: If this is called after construction.
        """
        if self.parts:
            raise TypeError(
                "ChainedOptimizer takes no groups after construction; add the group to one of its "
                "optimizers before you chain them"
            )
        super().add_param_group(param_group)

    def _share(self) -> None:
        """Give each optimizer its groups, and all of them one state."""
        state: defaultdict[torch.Tensor, Any] = defaultdict(dict, self.state)
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups = self.param_groups[first:last]
            part.state = state
            first = last
        self.state = state


def from_pytorch_optimizer(name: str) -> Callable[..., Optimizer]:
    """Return a class of pytorch-optimizer.

    Raises:
        ConfigError: If pytorch-optimizer is not installed.
    """
    try:
        module = importlib.import_module(PYTORCH_OPTIMIZER)
    except ImportError as error:
        raise ConfigError(
            f"{name} is from pytorch-optimizer, which cannot be imported ({error}); "
            f"{how_to_install('experiments')}"
        ) from error
    found: Callable[..., Optimizer] = getattr(module, name)
    return found


class WithProjections(ChainedOptimizer):
    """A GaLore or Fira that keeps its projections as tensors in the state.

    So checkpoints need not pickle objects, and measurements of memory count the projections.

    Args:
        part: The optimizer; gradients of groups with a ``rank`` are projected.
    """

    def __init__(self, part: Optimizer) -> None:
        super().__init__([part])

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step with the projectors restored from the state."""
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


class WithStepCount(ChainedOptimizer):
    """A StableSPAM whose step count is kept in its groups.

    Args:
        part: The optimizer.
    """

    def __init__(self, part: Optimizer) -> None:
        super().__init__([part])
        for group in self.param_groups:
            group["total_step"] = 0

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step with the count restored from the groups."""
        (part,) = self.parts
        part.total_step = self.param_groups[0]["total_step"]  # type: ignore[attr-defined]
        loss = super().step(closure)
        for group in self.param_groups:
            group["total_step"] = part.total_step  # type: ignore[attr-defined]
        return loss
