"""NeMo Automodel: a configuration of the optimizer for recipes."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from sinkgd.integrations import missing
from sinkgd.integrations.transformers import SinkGDFactory

try:
    from nemo_automodel.components.optim.optimizer import OptimizerConfig
except ImportError as error:
    raise missing(__name__, "nemo-automodel", error) from error


@dataclass
class SinkGDConfig(OptimizerConfig):
    """Builds the optimizer of `SinkGDFactory` for each part of a model.

    NeMo's scheduler writes the rate and the weight decay of every group. It takes both from the
    first group, and keeps the ratio of every other group's values to the first's. The first group
    is that of the matrices, or AdamW's if only adapters are trained.

    Attributes:
        options: Arguments of `SinkGDFactory` besides the model, such as ``adamw_lr``.

    Examples:
        In the YAML file of a recipe::

            optimizer:
              _target_: sinkgd.integrations.nemo_automodel.SinkGDConfig
              options:
                adamw_lr: 2.0e-5
    """

    # Megatron-FSDP flattens parameters, which then have neither rows nor columns.
    supports_megatron_fsdp_sharding: ClassVar[bool] = False

    options: dict[str, Any] = field(default_factory=dict)

    def build(
        self, model: nn.Module, *, device_mesh: Any = None, is_peft: bool = False
    ) -> list[Optimizer]:
        """Return one optimizer for each of ``model.parts``, or one for a model without parts.

        Args:
            model: The model, or an object with ``parts`` of it, as pipeline parallelism makes.
            device_mesh: Not used: parameters know their own mesh.
            is_peft: Not used: the optimizer gets only the parameters that are trained.

        Raises:
            ValueError: If ``param_group_overrides`` is set, or the scheduler would change a weight
                decay to zero.
        """
        del device_mesh, is_peft
        if self.param_group_overrides:
            raise ValueError(
                f"param_group_overrides={self.param_group_overrides!r} has no effect in "
                "SinkGDConfig; leave it out, and set rates of parts by options.overrides"
            )
        parts = getattr(model, "parts", [model])
        optimizers = [SinkGDFactory()(part, **self.options) for part in parts]
        for optimizer in optimizers:
            decays = [group["weight_decay"] for group in optimizer.param_groups]
            if not decays[0] and any(decays):
                raise ValueError(
                    f"the first group has weight_decay={decays[0]!r}, and NeMo's scheduler takes "
                    "the decay of all groups from it; give a decay to the first group, or to none"
                )
        return [*optimizers]
