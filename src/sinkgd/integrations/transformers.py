"""A factory of SinkGD for the trainers of Hugging Face Transformers and TRL.

It groups the parameters of a model and builds the optimizer. The other integrations, except
megatron-core, use it, too.
"""

import ast
import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from sinkgd.optim.arguments import unknown_name
from sinkgd.optim.param_groups import param_groups
from sinkgd.optim.sinkgd import SinkGD

# The arguments that go to param_groups. The others go to SinkGD, except eps, which goes to AdamW's
# groups.
_ROUTING = (
    "lr",
    "matrix_lr_scale",
    "adamw_lr",
    "deflated_rank",
    "weight_decay",
    "betas",
    "overrides",
    "base_width",
    "state_bits",
)
_SINKGD = tuple(
    name for name in inspect.signature(SinkGD).parameters if name not in ("params", *_ROUTING)
)
# A name and its value in ``optim_args``. A value may be a tuple with commas.
_PAIRS = re.compile(r"(\w+)\s*=\s*(\([^)]*\)|[^,\s]+)")
# The values of ``TrainingArguments.optim`` that leave the choice of optimizer open: the defaults of
# several versions of transformers, and the name that trainers give to SinkGD.
_OPEN = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "sinkgd")
# Arguments whose values are strings.
_WORDS = {"backend", "nonfinite", "rounding"}
# Stands for ``training_args`` that were not passed, since None is refused.
_NOT_PASSED: Any = object()


class SinkGDFactory:
    """Builds `SinkGD` for a model, as ``Trainer(optimizer_cls_and_kwargs=...)`` requires.

    The trainer calls ``SinkGDFactory()(model, **kwargs)`` once the model is on the device on which
    it trains. The trainer's learning rate scheduler then scales the rate of every group. The
    trainer does not pass its ``TrainingArguments``, so there are two ways to set the rates:

    - To fine-tune with settings for AdamW, pass these arguments as ``training_args``, as axolotl
      does. Their ``learning_rate`` is then the ``adamw_lr`` of `param_groups`, and their weight
      decay, betas and epsilon are read as AdamW's.
    - To train a new model, leave ``training_args`` out. The rates are then those of
      ``param_groups(model)``, far above AdamW's, or follow from ``lr`` and ``matrix_lr_scale``.
      ``learning_rate`` has no effect.

    Examples:
        >>> from torch import nn
        >>> from sinkgd.integrations.transformers import SinkGDFactory
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = SinkGDFactory()(model, lr=0.02, sinkhorn_iterations=3)
        >>> for group in optimizer.param_groups:
        ...     print(group["algorithm"], group["lr"])
        sinkgd 0.0005
        adamw 0.02

        To fine-tune with the trainer's own ``learning_rate`` and ``weight_decay``::

            trainer = Trainer(
                model,
                args,
                train_dataset=dataset,
                optimizer_cls_and_kwargs=(SinkGDFactory, {"training_args": args}),
            )

        To train a new model::

            optimizer_cls_and_kwargs=(SinkGDFactory, {"lr": 0.02, "matrix_lr_scale": 0.05})
    """

    def __call__(
        self, model: nn.Module | None = None, training_args: Any = _NOT_PASSED, **kwargs: Any
    ) -> SinkGD:
        """Return the optimizer.

        Args:
            model: The model to train.
            training_args: ``TrainingArguments``, or any object with the same attributes; not None.
                ``learning_rate`` becomes ``adamw_lr``, ``weight_decay`` keeps its name,
                ``adam_beta1`` and ``adam_beta2`` become ``betas``, and ``adam_epsilon`` becomes
                ``eps``. If ``kwargs`` set the same option, they take precedence. ``lr`` and
                ``matrix_lr_scale`` are then refused. ``optim`` may only be ``"sinkgd"`` or a
                default of transformers, such as ``"adamw_torch"``. Other fields are not read.
            **kwargs: ``lr``, ``matrix_lr_scale``, ``adamw_lr``, ``deflated_rank``,
                ``weight_decay``, ``betas``, ``overrides``, ``base_width`` and ``state_bits`` of
                `param_groups`; ``eps`` of AdamW's groups; all others are of `SinkGD`. None for an
                option of `param_groups` means its default. Values may be strings, as ``optim_args``
                has them: "0.02", "none", "true", "(0.9, 0.95)".

        Raises:
            TypeError: If an argument does not exist, ``model`` is absent or not a model, or
                ``training_args`` is None.
            ValueError: If a string cannot be parsed as a value of its argument, `param_groups` or
                `SinkGD` refuses a value, ``eps`` is given and no group runs AdamW, or
                ``training_args`` choose another optimizer, or set the rates that ``kwargs`` set.
        """
        if model is None:  # a trainer that expects a class calls it to get an instance
            raise TypeError(
                "SinkGDFactory() was called without a model. Give the trainer the class, without "
                "parentheses: optimizer_cls_and_kwargs=(SinkGDFactory, {...})"
            )
        _check_names(kwargs)
        options = _given(kwargs)
        if training_args is not _NOT_PASSED:
            _check_training_args(training_args, options)
            options = _from_training_args(training_args, options)
        routing = {name: options.pop(name) for name in _ROUTING if name in options}
        groups = param_groups(model, **routing)
        if "eps" in options:
            _set_eps(groups, options.pop("eps"), must_apply="eps" in kwargs)
        return SinkGD(groups, **options)


def attach(trainer: Any, **options: Any) -> None:
    """Make a trainer of transformers or TRL train with SinkGD. Call it before ``trainer.train()``.

    It serves trainers whose constructors take no ``optimizer_cls_and_kwargs``, such as TRL's for
    DPO, KTO and GRPO. The trainer's ``learning_rate``, ``weight_decay`` and Adam options are read
    as settings for AdamW, unless ``options`` sets the same ones; see `SinkGDFactory`. ``lr`` and
    ``matrix_lr_scale`` are refused, since ``learning_rate`` sets all rates. If the trainer builds
    another optimizer nevertheless, an error is raised when training begins.

    Args:
        trainer: The trainer, which must have neither its optimizer nor a choice of one yet.
        **options: Arguments of `SinkGDFactory` besides the model.

    Raises:
        TypeError: If ``trainer`` is not such a trainer, or an option does not exist.
        ValueError: If the trainer has its optimizer or ``optimizer_cls_and_kwargs`` already, its
            arguments choose or configure another optimizer (``optim``, ``optim_args`` or
            ``optim_target_modules``), or ``options`` set ``lr`` or ``matrix_lr_scale``.

    Examples:
        A trainer of TRL, fine-tuning at the rate of its configuration::

            trainer = DPOTrainer(model, args=DPOConfig(learning_rate=1e-6), ...)
            attach(trainer)
            trainer.train()
    """
    given = {"training_args": getattr(trainer, "args", None), **options}
    own = {name: value for name, value in given.items() if name != "training_args"}
    _check_names(own)
    if not hasattr(trainer, "optimizer_cls_and_kwargs") or not hasattr(trainer, "args"):
        raise TypeError(
            f"trainer must be a Trainer of transformers or TRL, got {type(trainer).__name__}; with "
            "others, build SinkGD(param_groups(model)) yourself"
        )
    if trainer.optimizer is not None:
        raise ValueError(
            f"the trainer has an optimizer already, {type(trainer.optimizer).__name__}; leave out "
            "optimizers=, and call attach before trainer.train()"
        )
    if (chosen := trainer.optimizer_cls_and_kwargs) is not None:
        raise ValueError(
            f"optimizer_cls_and_kwargs={chosen!r} of the trainer chooses another optimizer, or "
            "other options, than attach; leave it out, or do not call attach"
        )
    for name in ("optim_args", "optim_target_modules"):
        if (value := getattr(trainer.args, name, None)) is not None:
            raise ValueError(
                f"{name}={value!r} of the trainer's arguments has no effect with SinkGD; leave it "
                "out, and give options to attach: attach(trainer, deflated_rank=0)"
            )
    _check_training_args(given["training_args"], _given(own))
    trainer.optimizer_cls_and_kwargs = SinkGDFactory, given
    trainer.add_callback(_check_of(trainer))


def _check_of(trainer: Any) -> Any:
    """Return a callback that refuses to train with an optimizer other than SinkGD."""
    from transformers import TrainerCallback

    class OptimizerCheck(TrainerCallback):
        def on_train_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            while hasattr(optimizer, "optimizer"):  # accelerate wraps it
                optimizer = optimizer.optimizer
            if not isinstance(optimizer, SinkGD):
                raise TypeError(
                    f"{type(trainer).__name__} built {type(optimizer).__name__} and not SinkGD: "
                    "its create_optimizer does not use optimizer_cls_and_kwargs. Pass optimizers="
                    "(SinkGD(param_groups(model)), None) to the trainer instead of calling attach"
                )

    return OptimizerCheck()


def _check_training_args(training_args: Any, options: Mapping[str, Any]) -> None:
    """Refuse training arguments that choose another optimizer, or rates that options set, too.

    Raises:
        TypeError: If ``training_args`` is None.
        ValueError: If the arguments choose another optimizer, which would be ignored, or they have
            a ``learning_rate`` and an option sets the same rates.
    """
    if training_args is None:
        raise TypeError(
            "training_args is None; pass the arguments of the trainer, {'training_args': args}, "
            "or leave training_args out to train a new model at the rates of param_groups(model)"
        )
    _check_optim(training_args)
    learning_rate = getattr(training_args, "learning_rate", None)
    for name in ("lr", "matrix_lr_scale"):
        if name in options and learning_rate is not None:
            raise ValueError(
                f"learning_rate={learning_rate!r} of the trainer's arguments is AdamW's rate and "
                f"sets all rates, and {name}={options[name]!r} would set them again. Leave out "
                f"{name}; to change the rates, set learning_rate, or overrides for a part of the "
                "model. To train a new model by lr and matrix_lr_scale, leave out training_args: "
                f"optimizer_cls_and_kwargs=(SinkGDFactory, {{{name!r}: {options[name]!r}}})"
            )


def _check_optim(training_args: Any) -> None:
    """Refuse training arguments that choose another optimizer, which would be ignored."""
    chosen = getattr(training_args, "optim", None)
    name = getattr(chosen, "value", chosen)
    if name is not None and name not in _OPEN:
        raise ValueError(
            f"optim={name!r} of the trainer's arguments chooses another optimizer than SinkGD; "
            "leave it out. To keep the moments of AdamW's groups in 8 bits, pass state_bits=8"
        )


def read_optim_args(text: str | None) -> dict[str, str]:
    """Return the arguments in ``optim_args`` of a trainer: ``"lr=0.02, betas=(0.9, 0.95)"``.

    Args:
        text: Pairs of names and values, separated by commas; None if there are no arguments.

    Raises:
        ValueError: If a part of the text is not such a pair.

    Examples:
        >>> read_optim_args("lr=0.02, betas=(0.9, 0.95)")
        {'lr': '0.02', 'betas': '(0.9, 0.95)'}
    """
    rest = _PAIRS.sub("", text or "").strip(", ")
    if rest:
        raise ValueError(
            f"optim_args must be pairs such as 'lr=0.02,deflated_rank=0', got {text!r}: {rest!r} "
            "is not such a pair"
        )
    return dict(_PAIRS.findall(text or ""))


def _check_names(kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that do not exist.

    Raises:
        TypeError: If an argument does not exist; the message suggests the most similar one that
            does.
    """
    if "optim_args" in kwargs:
        pairs = dict(_PAIRS.findall(str(kwargs["optim_args"])))
        raise TypeError(
            "SinkGDFactory has no argument 'optim_args'; give each argument by its own name: "
            f"optimizer_cls_and_kwargs=(SinkGDFactory, {pairs or {'lr': 0.02}})"
        )
    if "learning_rate" in kwargs:
        raise TypeError(
            "SinkGDFactory has no argument 'learning_rate'. To fine-tune, give AdamW's rate as "
            "adamw_lr, or pass training_args; to train from scratch, give lr"
        )
    known = ("eps", *_ROUTING, *_SINKGD)
    for name in kwargs:
        if name not in known:
            raise TypeError(unknown_name("SinkGDFactory", name, known, {}))


def _given(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of arguments, without options of `param_groups` that are None."""
    options = {name: _parsed(name, value) for name, value in kwargs.items()}
    return {k: v for k, v in options.items() if v is not None or k not in _ROUTING}


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
    """Return the options, plus those that only the training arguments set."""
    taken = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    fields = {name: getattr(training_args, name) for name in taken if hasattr(training_args, name)}
    found: dict[str, Any] = {}
    if "learning_rate" in fields:
        found["adamw_lr"] = fields["learning_rate"]
    if "weight_decay" in fields:
        found["weight_decay"] = fields["weight_decay"]
    if "adam_beta1" in fields and "adam_beta2" in fields:
        found["betas"] = fields["adam_beta1"], fields["adam_beta2"]
    if "adam_epsilon" in fields:
        found["eps"] = fields["adam_epsilon"]
    return {**found, **options}


def _set_eps(groups: list[dict[str, Any]], eps: float, *, must_apply: bool) -> None:
    """Give ``eps`` to the groups of AdamW that have none.

    Raises:
        ValueError: If ``must_apply`` is set and no group runs AdamW.
    """
    found = [group for group in groups if group["algorithm"] in ("adamw", "adamw-8bit")]
    if not found and must_apply:
        raise ValueError(f"eps={eps!r} has no effect: no group runs 'adamw'. Leave it out")
    for group in found:
        group.setdefault("eps", eps)
