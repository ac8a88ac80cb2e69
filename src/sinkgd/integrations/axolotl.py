"""axolotl: a plugin that trains with this package's SinkGD.

``optimizer: sinkgd`` without the plugin selects axolotl's own implementation, which shares no code
with this package.
"""

from typing import Any

from torch import nn

from sinkgd.integrations import missing
from sinkgd.integrations.transformers import SinkGDFactory
from sinkgd.optim.sinkgd import SinkGD

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel
except ImportError as error:
    raise missing(__name__, "axolotl", error) from error

# Options with rates for parts of a model. Only axolotl's own parameter groups use them.
_RATES = ("embedding_lr", "embedding_lr_scale", "loraplus_lr_ratio", "lr_groups")


class SinkGDArguments(BaseModel):
    """What the plugin adds to axolotl's configuration.

    Attributes:
        sinkgd: Arguments of `SinkGDFactory` besides the model. axolotl's ``learning_rate``,
            ``weight_decay`` and Adam options are read as settings for AdamW, unless these arguments
            set the same options.
    """

    sinkgd: dict[str, Any] | None = None


class SinkGDPlugin(BasePlugin):
    """Gives axolotl's trainer the optimizer of `SinkGDFactory`.

    Examples:
        In the configuration::

            plugins:
              - sinkgd.integrations.axolotl.SinkGDPlugin
            learning_rate: 2e-5
            sinkgd:
              deflated_rank: 0
    """

    def get_input_args(self) -> str:
        """Return where axolotl finds the arguments of the plugin."""
        return f"{__name__}.{SinkGDArguments.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Choose the optimizer that a trainer will build when it begins to train.

        Args:
            cfg: axolotl's configuration.
            trainer: The trainer.

        Raises:
            ValueError: If the configuration chooses another custom optimizer, or sets
                ``optim_args`` or a rate for a part of the model.
        """
        if trainer.optimizer_cls_and_kwargs is not None:
            raise ValueError(
                f"optimizer: {cfg.optimizer} chooses an optimizer of axolotl, and SinkGDPlugin "
                "another; leave out the line 'optimizer:' to train with the plugin's"
            )
        for name in _RATES:
            if (value := getattr(trainer.args, name, None)) is not None:
                raise ValueError(
                    f"{name}: {value} has no effect with SinkGDPlugin; leave it out, and set rates "
                    "of parts by 'overrides' below 'sinkgd:'"
                )
        training_args = trainer.args
        if (given := getattr(training_args, "optim_args", None)) is not None:
            raise ValueError(
                f"optim_args: {given} has no effect with SinkGDPlugin; leave it out, and set "
                "options below 'sinkgd:'"
            )

        def build(model: nn.Module, *_: Any, **options: Any) -> SinkGD:
            # axolotl, unlike transformers, also passes its training arguments.
            return SinkGDFactory()(model, training_args, **options)

        trainer.optimizer_cls_and_kwargs = (lambda: build), dict(cfg.sinkgd or {})
