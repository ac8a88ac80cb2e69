"""Check a configuration, and decide the open values that follow from others.

Checks that need the ranks, the text or the weights come later, in `sinkgd.lab.train.setup`.
"""

from dataclasses import replace

from sinkgd.lab.models import preset_config
from sinkgd.lab.train.config import ConfigError, OptimizerConfig, RunConfig, TrainingConfig
from sinkgd.lab.train.machine import check_threads
from sinkgd.lab.train.recipes import RECIPES, find_recipe, resolve_optimizer


def resolve(config: RunConfig) -> RunConfig:
    """Check the values and fill in those that follow from others.

    Open options of the optimizer take the recipe's defaults. Values that depend on the machine
    (device, threads, mesh) or on the text (vocabulary) stay open; the first record of the run holds
    the values that were used. A model with ``model.weights`` and without a preset has the sizes of
    these weights, which are not read here. With neither, the preset is llama-nano.

    Raises:
        ConfigError: If a value is invalid, or the recipe needs a package that is not installed; the
            message gives the field, the value and the remedy.
        ModelError: If there is no such preset.
    """
    training = config.training
    model = config.model
    if model.preset is None and model.weights is None:
        model = replace(model, preset="llama-nano")
    if model.preset is not None:
        preset_config(model.preset)
    check_threads(training.threads)
    _at_least_one(
        {
            "model.vocab_size": config.model.vocab_size,
            "data.vocab_size": config.data.vocab_size,
            "data.shift_at_step": config.data.shift_at_step,
            "training.steps": training.steps,
            "training.batch_size": training.batch_size,
            "training.micro_batch_size": training.micro_batch_size,
            "training.sequence_length": training.sequence_length,
            "training.loss_chunk_tokens": training.loss_chunk_tokens,
            "mesh.dp_replicate": config.mesh.dp_replicate,
            "mesh.dp_shard": config.mesh.dp_shard,
            "mesh.tp": config.mesh.tp,
            "evaluation.every_steps": config.evaluation.every_steps,
            "evaluation.tokens": config.evaluation.tokens,
            "evaluation.batch_size": config.evaluation.batch_size,
            "checkpoint.every_steps": config.checkpoint.every_steps,
            "checkpoint.keep": config.checkpoint.keep,
            "logging.print_every_steps": config.logging.print_every_steps,
        }
    )
    _check_adapters(config)
    _check_schedule(training)
    if training.seed < 0:
        raise ConfigError(f"training.seed is {training.seed}; give a whole number from 0 up")
    optimizer = resolve_optimizer(config.optimizer)
    if training.release_gradients:
        _check_release(optimizer)
    check_shares(training, parts=1)
    check_micro_batches(config, parts=1)
    return replace(config, model=model, optimizer=optimizer)


def check_shares(training: TrainingConfig, parts: int) -> None:
    """Refuse a batch that ``parts`` does not divide, or micro-batches that do not divide a part.

    Raises:
        ConfigError: If a division leaves a remainder; the message gives the possible sizes.
    """
    whole, micro = training.batch_size, training.micro_batch_size
    if whole % parts:
        raise ConfigError(
            f"training.batch_size is {whole}, which cannot be divided into {parts} equal parts "
            f"(mesh.dp_replicate × mesh.dp_shard); use a multiple of {parts}"
        )
    part = whole // parts
    if micro is not None and part % min(micro, part):
        of = f"training.batch_size {whole}" if parts == 1 else f"a rank's {part} sequences"
        divisors = ", ".join(str(d) for d in range(1, part + 1) if part % d == 0)
        raise ConfigError(
            f"training.micro_batch_size is {micro}, which does not divide {of}; "
            f"use one of {divisors}"
        )


def check_ranks(optimizer: OptimizerConfig, ranks: int) -> None:
    """Refuse several ranks if the recipe cannot shard weights.

    Raises:
        ConfigError: If ``ranks`` is above 1 and the recipe cannot shard weights; the message gives
            the recipes that can.
    """
    if ranks > 1 and not find_recipe(optimizer.recipe).can_shard:
        able = ", ".join(name for name, recipe in RECIPES.items() if recipe.can_shard)
        raise ConfigError(
            f"optimizer.recipe is {optimizer.recipe!r}, which needs every weight in one piece, but "
            f"{ranks} ranks would divide it; start one process, or use one of {able}"
        )


def check_micro_batches(config: RunConfig, parts: int) -> None:
    """Refuse ``optimizer.cross_fit`` with a single micro-batch on each of ``parts`` ranks.

    Raises:
        ConfigError: If a rank's part of the batch is a single micro-batch.
    """
    part, micro = config.training.batch_size // parts, config.training.micro_batch_size
    if not config.optimizer.cross_fit or (micro is not None and micro < part):
        return
    said = "optimizer.cross_fit is true, which takes the scales from one half of the micro-batches"
    if part == 1:
        raise ConfigError(
            f"{said}, but a rank has a single sequence; use a training.batch_size of at least "
            f"{2 * parts}"
        )
    raise ConfigError(
        f"{said}, but training.micro_batch_size is {micro}, and a rank has {part} sequences; use "
        f"at most {part // 2}"
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
            "gradient before the norm of all is known; set clip_norm to 0 or release_gradients to "
            "false"
        )


def _at_least_one(values: dict[str, int | None]) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")


def _check_adapters(config: RunConfig) -> None:
    rank = config.model.lora_rank
    if rank < 0:
        raise ConfigError(f"model.lora_rank is {rank}; it must be at least 0")
    if rank and config.model.weights is None:
        raise ConfigError(
            f"model.lora_rank is {rank}, but model.weights is not given: adapters cannot train a "
            "model whose own weights are random. Give the folder of a finished run, or of a "
            "Hugging Face checkpoint"
        )
    if rank and config.mesh.tp > 1:
        raise ConfigError(
            f"model.lora_rank is {rank}, but mesh.tp is {config.mesh.tp}, and tp cannot shard "
            "adapters; use mesh.tp 1 and mesh.dp_shard"
        )
    if config.optimizer.adapters is not None and not rank:
        raise ConfigError(
            f"optimizer.adapters is {config.optimizer.adapters!r}, but the model has no adapters; "
            "give model.lora_rank, too"
        )


def _check_schedule(training: TrainingConfig) -> None:
    if not 0 <= training.warmup_fraction < 1:
        raise ConfigError(
            f"training.warmup_fraction is {training.warmup_fraction}; it must be at least 0 and "
            "less than 1, because the cosine needs steps, too"
        )
    if not 0 <= training.final_lr_fraction <= 1:
        raise ConfigError(
            f"training.final_lr_fraction is {training.final_lr_fraction}; it must be from 0 to 1"
        )
