"""Everything that a run needs to resume exactly where it stopped.

The state of an optimizer is keyed by parameter names, as in distributed checkpoints. If an
optimizer has no state, torch's helpers create it by a step with zero gradients of all parameters.
For a stateless optimizer they do so at every save, and need as much memory as the weights take. So
the helpers are not used for a `GroupedOptimizer`, which creates its state directly.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from sinkgd.distributed.shards import local
from sinkgd.lab.models import LanguageModel
from sinkgd.lab.results import Memory
from sinkgd.lab.train.machine import peak_bytes
from sinkgd.optim.grouped import GroupedOptimizer
from sinkgd.optim.saved_state import without_placeholders


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the state, created if absent; its tensors are the optimizer's own, not copies."""
    if not isinstance(optimizer, GroupedOptimizer):
        return dict(get_optimizer_state_dict(model, optimizer))
    optimizer.init_state()
    names = _names(model, optimizer)
    content = optimizer.state_dict()
    return {
        "state": {names[i]: state for i, state in without_placeholders(content["state"]).items()},
        # The names of groups are left out: they follow from the routing, and checkpoints of earlier
        # versions lack them.
        "param_groups": [
            {
                **{key: value for key, value in group.items() if key != "name"},
                "params": [names[i] for i in group["params"]],
            }
            for group in content["param_groups"]
        ],
    }


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, content: dict[str, Any]) -> None:
    """Load what `optimizer_state` returned."""
    if not isinstance(optimizer, GroupedOptimizer):
        # A parameter without state is not an error: SGD has none.
        lenient = StateDictOptions(strict=False)
        set_optimizer_state_dict(model, optimizer, content, options=lenient)
        return
    indices = {name: i for i, name in enumerate(_names(model, optimizer))}
    optimizer.load_state_dict(
        {
            "state": {indices[name]: state for name, state in content["state"].items()},
            "param_groups": [
                {**group, "params": [indices[name] for name in group["params"]]}
                for group in content["param_groups"]
            ],
        }
    )


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Return the names of the optimizer's parameters, in order."""
    names = {param: name for name, param in model.named_parameters()}
    return [names[param] for group in optimizer.param_groups for param in group["params"]]


@dataclass
class TrainingState:
    """The model, the optimizer and the progress of a run.

    If weights are sharded, it holds this rank's shards.
    """

    model: LanguageModel
    optimizer: Optimizer
    step: int = 0  # steps taken
    seconds: float = 0.0  # time of training, without evaluations and checkpoints
    wall_seconds: float = 0.0  # time of the run with start-up and evaluations, up to `clock`
    memory: Memory = field(default_factory=lambda: Memory(0, 0, 0, 0))  # maximum of each part
    clock: float = field(default_factory=time.perf_counter)  # time up to which wall_seconds counts

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    def update_totals(self, device: torch.device) -> None:
        """Update ``wall_seconds`` and ``memory`` to the present."""
        now = time.perf_counter()
        self.wall_seconds += now - self.clock
        self.clock = now
        held = measure_memory(self.model, self.optimizer, device)
        self.memory = Memory.largest([self.memory, held])

    def as_dict(self) -> dict[str, Any]:
        """Return the state; its tensors are the model's and the optimizer's own, not copies."""
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": optimizer_state(self.model, self.optimizer),
            "progress": {
                "step": self.step,
                "seconds": self.seconds,
                "wall_seconds": self.wall_seconds,
                "memory": asdict(self.memory),
            },
            "random": _random_state(self.device),
        }

    def load_dict(self, content: dict[str, Any]) -> None:
        """Load what `as_dict` returned."""
        set_model_state_dict(self.model, content["model"])
        load_optimizer_state(self.model, self.optimizer, content["optimizer"])
        progress = content["progress"]
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.wall_seconds = progress["wall_seconds"]
        self.memory = Memory(**progress["memory"])
        _set_random_state(content["random"])


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the random number generators that a run on ``device`` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def measure_memory(model: nn.Module, optimizer: Optimizer, device: torch.device) -> Memory:
    """Count this rank's bytes of weights, gradients and state, and read its peak of memory."""
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return Memory(
        _bytes(parameters),
        _bytes(gradients),
        _bytes(state_tensors(optimizer)),
        peak_bytes(device),
    )


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """List the tensors in an optimizer's state, including those in lists."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    found: list[Tensor] = []
    while values:
        value = values.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list):
            values.extend(value)
    return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)
