"""torchtitan: a container of optimizers that trains every part of a model with SinkGD."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sinkgd.integrations import missing
from sinkgd.integrations.transformers import SinkGDFactory
from sinkgd.optim.sinkgd import SinkGD

try:
    from torchtitan.components.checkpointer.utils import canonical_fqn
    from torchtitan.components.optimizer import OptimizersContainer
except ImportError as error:
    raise missing(__name__, "torchtitan", error) from error


class SinkGDContainer(OptimizersContainer):
    """Builds one `SinkGD` for each part of a model, as ``Trainer.Config.optimizer`` requires.

    `param_groups` routes the parameters: torchtitan's own patterns do not see which parameters are
    embeddings or heads. Checkpoints of torchtitan hold one entry per parameter, by name, so that
    they can be read with another number of devices.

    Args:
        config: The configuration.
        model_parts: The parts of the model on this rank: several with pipeline parallelism.

    Raises:
        ValueError: If the configuration sets ``param_groups`` or
            ``optimizer_factory_kwargs_by_name``, which have no effect here.

    Examples:
        In a function of your configuration registry::

            config = llama3_debugmodel()
            config.optimizer = SinkGDContainer.Config(options={"lr": 0.04})
            return config
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """What torchtitan builds the container from."""

        options: dict[str, Any] = field(default_factory=dict)
        """Arguments of `SinkGDFactory` besides the model, such as ``lr`` or ``adamw_lr``."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        for name in ("param_groups", "optimizer_factory_kwargs_by_name"):
            if value := getattr(config, name):
                raise ValueError(
                    f"{name}={value!r} has no effect in SinkGDContainer.Config, which routes "
                    "parameters by itself; leave it out, and pass "
                    "options={'overrides': {pattern: 'adamw'}} to give some of them to AdamW"
                )
        self.model_parts = model_parts
        self.optimizers = [_build(part, config.options) for part in model_parts]
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        params = [param for group in groups for param in group["params"]]
        self._validate_params(params)
        self._post_init(params)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all parts by names of parameters; no step is taken."""
        self._init_state()
        result: dict[str, Any] = super().state_dict()
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; no step is taken."""
        self._init_state()
        super().load_state_dict(state_dict)

    def _init_state(self) -> None:
        """Make the state that torchtitan expects, so that it takes no step along zero gradients.

        Whenever an optimizer has no state, torchtitan takes such a step: at every save, if all
        parameters go to SinkGD. These gradients would take as much memory as the weights.
        """
        for optimizer in self.optimizers:
            optimizer.init_state()


def _build(part: nn.Module, options: dict[str, Any]) -> SinkGD:
    """Return the optimizer of a part, which names parameters as checkpoints do."""
    optimizer = SinkGDFactory()(part, **options)
    for group in optimizer.param_groups:
        group["param_names"] = [canonical_fqn(name) for name in group["param_names"]]
    return optimizer
