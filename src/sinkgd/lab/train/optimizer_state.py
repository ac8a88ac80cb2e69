"""The state of an optimizer by the names of its parameters, as distributed checkpoints have it.

torch's own helpers make the state of an optimizer that has none by a step along zero gradients of
all parameters: as much memory as the weights, at every save of one that never has any. They serve
torch's optimizers here; ours say what state they would make.
"""

from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from sinkgd.optim.grouped import GroupedOptimizer
from sinkgd.optim.saved_state import without_placeholders


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the state; its tensors are the optimizer's own. What a first step makes is made."""
    if not isinstance(optimizer, GroupedOptimizer):
        return dict(get_optimizer_state_dict(model, optimizer))
    optimizer.init_state()
    names = _names(model, optimizer)
    content = optimizer.state_dict()
    return {
        "state": {names[i]: state for i, state in without_placeholders(content["state"]).items()},
        "param_groups": [
            {**group, "params": [names[i] for i in group["params"]]}
            for group in content["param_groups"]
        ],
    }


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, content: dict[str, Any]) -> None:
    """Take over what `optimizer_state` returned."""
    if not isinstance(optimizer, GroupedOptimizer):
        # A parameter without state is not missing: SGD has none.
        lenient = StateDictOptions(strict=False)
        set_optimizer_state_dict(model, optimizer, content, options=lenient)
        return
    places = {name: i for i, name in enumerate(_names(model, optimizer))}
    optimizer.load_state_dict(
        {
            "state": {places[name]: state for name, state in content["state"].items()},
            "param_groups": [
                {**group, "params": [places[name] for name in group["params"]]}
                for group in content["param_groups"]
            ],
        }
    )


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Return the model's names of the optimizer's parameters, in their order."""
    names = {param: name for name, param in model.named_parameters()}
    return [names[param] for group in optimizer.param_groups for param in group["params"]]
