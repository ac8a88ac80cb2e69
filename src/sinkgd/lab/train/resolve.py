"""The one boundary where a configuration is checked and its open values are decided."""

from dataclasses import replace

from sinkgd.lab.train.config import ConfigError, OptimizerConfig, RunConfig, TrainingConfig
from sinkgd.lab.train.recipes import RECIPES, find_recipe, resolve_optimizer


def resolve(config: RunConfig) -> RunConfig:
    """Check every value and fill in what follows from others.

    The optimizer's options become the recipe's, the micro-batch the whole batch. What depends on
    the machine (device, threads) or on the text (vocabulary) stays open: the run's environment
    records it.

    Raises:
        ConfigError: If a value cannot be; the message names the field, the value and the remedy.
    """
    training = config.training
    _at_least_one(
        {
            "model.vocab_size": config.model.vocab_size,
            "data.vocab_size": config.data.vocab_size,
            "training.steps": training.steps,
            "training.batch_size": training.batch_size,
            "training.micro_batch_size": training.micro_batch_size,
            "training.sequence_length": training.sequence_length,
            "training.loss_chunk_tokens": training.loss_chunk_tokens,
            "training.threads": training.threads,
            "evaluation.every_steps": config.evaluation.every_steps,
            "evaluation.tokens": config.evaluation.tokens,
            "checkpoint.every_steps": config.checkpoint.every_steps,
            "checkpoint.keep": config.checkpoint.keep,
            "logging.print_every_steps": config.logging.print_every_steps,
        }
    )
    _check_schedule(training)
    if training.seed < 0:
        raise ConfigError(f"training.seed is {training.seed}; give a whole number from 0 up")
    optimizer = resolve_optimizer(config.optimizer)
    if training.release_gradients:
        _check_release(optimizer)
    return replace(
        config,
        optimizer=optimizer,
        training=replace(training, micro_batch_size=_micro_batch_size(training)),
    )


def _check_release(optimizer: OptimizerConfig) -> None:
    if not find_recipe(optimizer.recipe).can_release:
        able = ", ".join(name for name, recipe in RECIPES.items() if recipe.can_release)
        raise ConfigError(
            f"training.release_gradients needs an optimizer that can take one gradient at a time; "
            f"recipe {optimizer.recipe!r} cannot. Those that can: {able}"
        )
    if optimizer.clip_norm:
        raise ConfigError(
            f"optimizer.clip_norm is {optimizer.clip_norm}, but training.release_gradients frees a "
            "gradient before the norm of all is known; set one of them to 0"
        )


def _at_least_one(values: dict[str, int | None]) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")


def _check_schedule(training: TrainingConfig) -> None:
    if not 0 <= training.warmup_fraction < 1:
        raise ConfigError(
            f"training.warmup_fraction is {training.warmup_fraction}; it must be at least 0 and "
            "less than 1, for the cosine needs steps too"
        )
    if not 0 <= training.final_lr_fraction <= 1:
        raise ConfigError(
            f"training.final_lr_fraction is {training.final_lr_fraction}; it must be from 0 to 1"
        )


def _micro_batch_size(training: TrainingConfig) -> int:
    whole = training.batch_size
    size = whole if training.micro_batch_size is None else training.micro_batch_size
    if whole % size:
        divisors = ", ".join(str(d) for d in range(1, whole + 1) if whole % d == 0)
        raise ConfigError(
            f"training.micro_batch_size is {size}, which does not divide training.batch_size "
            f"{whole}; use one of {divisors}"
        )
    return size
