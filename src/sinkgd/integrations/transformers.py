"""Hugging Face ``Trainer`` and axolotl: a factory that routes the parameters and builds SinkGD."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from sinkgd.optim.arguments import unknown_name
from sinkgd.optim.param_groups import param_groups
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
_SINKGD = tuple(
    name for name in inspect.signature(SinkGD).parameters if name not in ("params", *_ROUTING)
)
# Arguments whose value is a word.
_WORDS = {"backend", "nonfinite", "rounding"}

_TAKEN = {"lr": "learning_rate", "weight_decay": "weight_decay"}
_NOT_TAKEN = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}


class SinkGDFactory:
    """Builds `SinkGD` for a model, as ``Trainer(optimizer_cls_and_kwargs=...)`` asks for it.

    The trainer calls ``SinkGDFactory()(model, **kwargs)`` once the model stands where it will be
    trained, and its learning rate scheduler scales every group. The trainer does not hand over its
    ``TrainingArguments``. Their ``learning_rate`` and ``weight_decay`` are used only where they are
    passed as ``training_args``, as axolotl does; otherwise pass ``lr`` and ``weight_decay`` here.

    Examples:
        >>> from torch import nn
        >>> from sinkgd.integrations.transformers import SinkGDFactory
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = SinkGDFactory()(model, lr=0.02, sinkhorn_iterations=3)
        >>> for group in optimizer.param_groups:
        ...     print(group["algorithm"], group["lr"])
        sinkgd 0.0005
        adamw 0.02

        With the trainer::

            trainer = Trainer(
                model,
                args,
                train_dataset=dataset,
                optimizer_cls_and_kwargs=(SinkGDFactory, {"lr": 0.02, "matrix_lr_scale": 0.05}),
            )

        With the trainer's own ``learning_rate`` and ``weight_decay``::

            optimizer_cls_and_kwargs=(SinkGDFactory, {"training_args": args})
    """

    def __call__(self, model: nn.Module, training_args: Any = None, **kwargs: Any) -> SinkGD:
        """Return the optimizer.

        Args:
            model: The model to train.
            training_args: ``TrainingArguments``, or what has its attributes. Its ``learning_rate``
                and ``weight_decay`` are taken where ``kwargs`` have no ``lr`` or ``weight_decay``;
                where both are given, ``kwargs`` decide. An Adam option of its own (``adam_beta1``,
                ``adam_beta2``, ``adam_epsilon``) that differs from its default is refused unless
                ``kwargs`` have ``betas`` or ``eps``. Its other fields are not read.
            **kwargs: ``lr``, ``matrix_lr_scale``, ``deflated_rank``, ``weight_decay``, ``betas``,
                ``overrides`` and ``base_width`` of `param_groups`; ``eps`` of AdamW's groups; all
                others are of `SinkGD`. None of the first group means its default. Values may be
                strings, as ``optim_args`` has them: "0.02", "none", "true", "(0.9, 0.95)".

        Raises:
            TypeError: If there is no such argument, or ``model`` is no model.
            ValueError: If a string is no value of its argument, an Adam option of ``training_args``
                would have no effect, or `param_groups` or `SinkGD` refuses a value.
        """
        _check_names(kwargs)
        options = {name: _parsed(name, value) for name, value in kwargs.items()}
        for name in _ROUTING:
            if options.get(name, ...) is None:
                del options[name]
        if training_args is not None:
            options = _from_training_args(training_args, options)
        routing = {name: options.pop(name) for name in _ROUTING if name in options}
        groups = param_groups(model, **routing)
        if "eps" in options:
            _set_eps(groups, options.pop("eps"))
        return SinkGD(groups, **options)


def _check_names(kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that do not exist.

    Raises:
        TypeError: With the nearest one that does.
    """
    if "optim_args" in kwargs:
        # Values may be tuples, whose commas do not end them.
        pairs = dict(re.findall(r"(\w+)\s*=\s*(\([^)]*\)|[^,\s]+)", str(kwargs["optim_args"])))
        raise TypeError(
            "SinkGDFactory has no argument 'optim_args'; give each argument by its own name: "
            f"optimizer_cls_and_kwargs=(SinkGDFactory, {pairs or {'lr': 0.02}})"
        )
    known = ("eps", *_ROUTING, *_SINKGD)
    for name in kwargs:
        if name not in known:
            raise TypeError(unknown_name("SinkGDFactory", name, known, {}))


def _parsed(name: str, value: Any) -> Any:
    """Return the value that a string stands for."""
    if not isinstance(value, str):
        return value
    word = value.strip()
    constants = {"none": None, "null": None, "true": True, "false": False}
    if word.lower() in constants:
        return constants[word.lower()]
    if name in _WORDS:
        return word
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        raise ValueError(f"{name} must be a number, a tuple or a constant, got {value!r}") from None


def _from_training_args(training_args: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what the training arguments have, and refuse what they cannot set."""
    defaults = (
        {field.name: field.default for field in dataclasses.fields(training_args)}
        if dataclasses.is_dataclass(training_args)
        else {}
    )
    for field, option in _NOT_TAKEN.items():
        value = getattr(training_args, field, None)
        if option not in options and field in defaults and value != defaults[field]:
            raise ValueError(
                f"training_args.{field}={value!r} has no effect on SinkGD's groups of AdamW; give "
                f"{option} to SinkGDFactory instead"
            )
    taken = {
        option: getattr(training_args, field)
        for option, field in _TAKEN.items()
        if hasattr(training_args, field)
    }
    return {**taken, **options}


def _set_eps(groups: list[dict[str, Any]], eps: float) -> None:
    """Give ``eps`` to the groups of AdamW.

    Raises:
        ValueError: If there is none.
    """
    found = [group for group in groups if group["algorithm"] == "adamw"]
    if not found:
        raise ValueError(f"eps={eps!r} has no effect: no group runs 'adamw'. Leave it out")
    for group in found:
        group.setdefault("eps", eps)
