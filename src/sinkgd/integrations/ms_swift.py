"""ms-swift: importing this module adds the optimizer "sinkgd" to ms-swift's table of optimizers.

``--external_plugins`` takes a Python file. Pass one with the single line
``import sinkgd.integrations.ms_swift``, and choose ``--optimizer sinkgd``.
"""

from typing import Any

from torch import nn

from sinkgd.integrations import missing
from sinkgd.integrations.transformers import SinkGDFactory, read_optim_args
from sinkgd.optim.sinkgd import SinkGD

try:
    from swift.optimizers import OptimizerCallback, optimizers_map
except ImportError as error:
    raise missing(__name__, "ms-swift", error) from error


class SinkGDCallback(OptimizerCallback):
    """Builds the optimizer of `SinkGDFactory` for a trainer of ms-swift.

    The trainer's ``learning_rate``, ``weight_decay`` and Adam options are read as settings for
    AdamW, unless ``optim_args`` sets the same options. ``optim_args`` may also set options that
    the trainer does not have, as in ``"deflated_rank=0,momentum=0.5"``.
    """

    def create_optimizer(self, model: nn.Module | None = None) -> SinkGD:
        """Return the optimizer.

        Args:
            model: The model; the trainer's own by default.
        """
        options: dict[str, Any] = {**read_optim_args(self.args.optim_args)}
        model = self.trainer.model if model is None else model
        return SinkGDFactory()(model, self.args, **options)


optimizers_map["sinkgd"] = SinkGDCallback
