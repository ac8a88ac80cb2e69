"""Hugging Face ``Trainer``: one factory, which routes the model's parameters and builds SinkGD."""

from typing import Any

from torch import nn

from sinkgd.optim.partition import param_groups
from sinkgd.optim.sinkgd import SinkGD

# The arguments that go to param_groups; all others are SinkGD's.
_ROUTING = (
    "lr",
    "matrix_lr_scale",
    "deflated_rank",
    "weight_decay",
    "betas",
    "overrides",
    "base_width",
)


class SinkGDFactory:
    """Builds `SinkGD` for a model, as ``Trainer(optimizer_cls_and_kwargs=...)`` asks for it.

    The trainer calls ``SinkGDFactory()(model, **kwargs)`` once the model stands where it will be
    trained, and its learning rate scheduler scales every group. ``TrainingArguments.learning_rate``
    and ``weight_decay`` are not used: pass ``lr`` and ``weight_decay`` here.

    Examples:
        >>> from torch import nn
        >>> from sinkgd.integrations.transformers import SinkGDFactory
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = SinkGDFactory()(model, lr=0.02, sinkhorn_iterations=3)
        >>> for group in optimizer.param_groups:
        ...     print(group["algorithm"], group["lr"])
        sinkgd 0.001
        adamw 0.02

        With the trainer::

            trainer = Trainer(
                model,
                args,
                train_dataset=dataset,
                optimizer_cls_and_kwargs=(SinkGDFactory, {"lr": 0.02, "matrix_lr_scale": 0.05}),
            )
    """

    def __call__(self, model: nn.Module, **kwargs: Any) -> SinkGD:
        """Return the optimizer.

        Args:
            model: The model to train.
            **kwargs: ``lr``, ``matrix_lr_scale``, ``deflated_rank``, ``weight_decay``, ``betas``,
                ``overrides`` and ``base_width`` of `param_groups`; all others are of `SinkGD`.

        Raises:
            TypeError: If an argument belongs to neither.
            ValueError: As `param_groups` and `SinkGD` do.
        """
        routing = {name: kwargs.pop(name) for name in _ROUTING if name in kwargs}
        return SinkGD(param_groups(model, **routing), **kwargs)
