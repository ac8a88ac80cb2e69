"""All that a run needs to go on as if it had never stopped."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim import Optimizer

from sinkgd.lab.models import LanguageModel
from sinkgd.lab.results import Memory
from sinkgd.lab.train.memory import measure_memory
from sinkgd.lab.train.optimizer_state import load_optimizer_state, optimizer_state


@dataclass
class TrainingState:
    """The model, the optimizer and the progress of a run; of weights in pieces, this rank's."""

    model: LanguageModel
    optimizer: Optimizer
    step: int = 0  # steps taken
    seconds: float = 0.0  # of training
    wall_seconds: float = 0.0  # of everything, up to the checkpoint
    memory: Memory = field(default_factory=lambda: Memory(0, 0, 0, 0))  # the most of each part
    clock: float = field(default_factory=time.perf_counter)  # wall_seconds counts up to here

    def take_stock(self, device: torch.device) -> None:
        """Bring ``wall_seconds`` and ``memory`` up to now."""
        now = time.perf_counter()
        self.wall_seconds += now - self.clock
        self.clock = now
        held = measure_memory(self.model, self.optimizer, device)
        self.memory = Memory.largest([self.memory, held])

    def as_dict(self) -> dict[str, Any]:
        """Return the state; its tensors are the model's and the optimizer's own."""
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": optimizer_state(self.model, self.optimizer),
            "progress": {
                "step": self.step,
                "seconds": self.seconds,
                "wall_seconds": self.wall_seconds,
                "memory": asdict(self.memory),
            },
            "random": _random_state(),
        }

    def load_dict(self, content: dict[str, Any]) -> None:
        """Take over what `as_dict` returned."""
        set_model_state_dict(self.model, content["model"])
        load_optimizer_state(self.model, self.optimizer, content["optimizer"])
        progress = content["progress"]
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.wall_seconds = progress["wall_seconds"]
        self.memory = Memory(**progress["memory"])
        _set_random_state(content["random"])


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
