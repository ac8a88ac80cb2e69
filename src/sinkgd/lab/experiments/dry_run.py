"""A dry run of a study: build every arm's model without weights, and do not train it.

The model is built on the meta device and runs there forward and backward on one row; then the
optimizer is built. Only the sizes of a model in ``model.weights`` are read, not its weights. Each
arm also takes one real step with a nano model instead of its own model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from sinkgd.lab.data import Manifest, shards_at
from sinkgd.lab.data.documents import expanded
from sinkgd.lab.experiments.study import StudyPlan, Task
from sinkgd.lab.models import (
    GPT2Config,
    LensConfig,
    LlamaConfig,
    ModelSizes,
    add_adapters,
    draw_adapters,
    model_of,
    preset_config,
)
from sinkgd.lab.plan import METHODS, Architecture, Grid, Work
from sinkgd.lab.plan.peak_memory import rank_memory
from sinkgd.lab.report.console import TextTable
from sinkgd.lab.report.quantities import ABSENT, count, size
from sinkgd.lab.train.config import DataConfig, Precision, RunConfig
from sinkgd.lab.train.machine import weight_dtype
from sinkgd.lab.train.recipes import build_optimizer
from sinkgd.lab.train.starting_weights import sizes_in
from sinkgd.lab.train.training_step import loss_of

# Recipes that have another name in `sinkgd plan`.
_METHOD_OF = {"adamw-one-lr": "adamw", "sinkgd-finetune": "sinkgd"}
_NANO: Mapping[type[ModelSizes], str] = {
    LlamaConfig: "llama-nano",
    GPT2Config: "gpt2-nano",
    LensConfig: "lens-nano",
}
_SMALL = {"vocab_size": 64, "max_sequence_length": 8}  # sizes of the model for the real step


@dataclass(frozen=True)
class DryArm:
    """The sizes of an arm."""

    name: str
    runs: int  # number of runs, for tuning and for seeds
    parameters: int  # number of trained parameters
    groups: int  # number of parameter groups of the optimizer
    tokens: int  # tokens of one run
    memory_bytes: int | None  # at the peak of a step; None if `sinkgd plan` cannot estimate it


def dry_run(plan: StudyPlan) -> list[DryArm]:
    """Build every arm of a study.

    Raises:
        ConfigError: If an option is impossible, or the folder ``model.weights`` holds no model.
        ModelError: If there is no such model.
    """
    arms = []
    for arm, task in zip(plan.arms, plan.first_tasks(), strict=True):
        arms.append(_dry_arm(plan, task, plan.runs_of(arm)))
    return arms


def _dry_arm(plan: StudyPlan, task: Task, runs: int) -> DryArm:
    config = plan.config(task)
    training = config.training
    sizes = _sizes(config)
    model = _run_on_meta(
        sizes, training.sequence_length, training.precision, config.model.lora_rank
    )
    optimizer = build_optimizer(model, config.optimizer)
    _take_a_small_step(config, sizes)
    return DryArm(
        name=task.arm.name,
        runs=runs,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        groups=len(optimizer.param_groups),
        tokens=training.steps * config.tokens_per_step,
        memory_bytes=_planned_peak(config, sizes),
    )


def _sizes(config: RunConfig) -> ModelSizes:
    """Return the sizes of an arm's model, from its preset or from the folder ``model.weights``."""
    model, length = config.model, config.training.sequence_length
    if model.preset is None:
        assert model.weights is not None, "resolve gives a preset to models without weights"
        return sizes_in(expanded(model.weights), length)
    vocab_size = model.vocab_size or _vocab_size(config.data)
    return preset_config(model.preset, vocab_size=vocab_size, max_sequence_length=length)


def _vocab_size(data: DataConfig) -> int | None:
    """Return the vocabulary of a text; None if the text is to be shards that are not there yet."""
    if (shards := shards_at(data.corpus)) is not None:
        return Manifest.read(shards).vocab_size
    return data.vocab_size


@lru_cache(maxsize=8)
def _run_on_meta(
    sizes: ModelSizes, sequence_length: int, precision: Precision, lora_rank: int
) -> nn.Module:
    """Build a model without weights and run it forward and backward on one row."""
    with torch.device("meta"):
        model = model_of(sizes)
        tokens = torch.zeros(1, sequence_length, dtype=torch.int64, device="meta")
        if lora_rank:
            add_adapters(model, lora_rank)
    model.to(weight_dtype(precision))
    loss_of(model, tokens, tokens, None).backward()  # type: ignore[no-untyped-call]
    return model


def _take_a_small_step(config: RunConfig, sizes: ModelSizes) -> None:
    """Take one real step of the arm's optimizer on a nano model of the same family."""
    small = preset_config(_NANO[type(sizes)], **_SMALL)
    if isinstance(small, LlamaConfig) and isinstance(sizes, LlamaConfig):
        small = replace(small, tied_head=sizes.tied_head)
    model = model_of(small)
    if config.model.lora_rank:
        add_adapters(model, config.model.lora_rank)
        draw_adapters(model, seed=0)
    optimizer = build_optimizer(model, config.optimizer)
    tokens = torch.arange(8, dtype=torch.int64, device="cpu").unsqueeze(0)
    loss_of(model, tokens, tokens, None).backward()  # type: ignore[no-untyped-call]
    if config.optimizer.cross_fit:
        optimizer.hold_out()  # type: ignore[attr-defined]
        loss_of(model, tokens, tokens, None).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _planned_peak(config: RunConfig, sizes: ModelSizes) -> int | None:
    name = _METHOD_OF.get(config.optimizer.recipe, config.optimizer.recipe)
    if config.optimizer.operator_norm is not None:
        name = "sinkgd-pinned"
    elif name == "sinkgd" and config.optimizer.deflated_rank == 0:
        name = "sinkgd-paper"
    elif name == "sinkgd-paper" and config.optimizer.momentum:
        name = "sinkgd-momentum"
    if name not in METHODS or not isinstance(sizes, LlamaConfig) or config.model.lora_rank:
        return None
    training = config.training
    micro = training.micro_batch_size or training.batch_size
    work = Work(
        architecture=Architecture.of_config(config.model.preset or "model.weights", sizes),
        batch_size=micro,
        micro_batches=training.batch_size // micro,
        sequence_length=training.sequence_length,
        precision=training.precision,
        release=training.release_gradients,
        recompute=training.recompute_activations,
        loss_chunk_tokens=training.loss_chunk_tokens,
    )
    return rank_memory(work, Grid(), METHODS[name]).peak


def dry_run_table(plan: StudyPlan) -> TextTable:
    """Make the table of a dry run."""
    arms = dry_run(plan)
    total = sum(arm.runs * arm.tokens for arm in arms)
    tuning = f", tuning with seed {plan.tuning_seed}" if plan.tune else ""
    unknown = (
        f" A dash ({ABSENT}) in the column memory means that it has no estimate for the arm."
        if any(arm.memory_bytes is None for arm in arms)
        else ""
    )
    return TextTable(
        title=f"{plan.study}, {plan.scale} scale: {plan.runs_in_words}",
        note=f"{count(total)} tokens in {plan.runs} runs; seeds "
        f"{', '.join(map(str, plan.seeds))}{tuning}. Memory: the peak of a step on one device, "
        f"as `sinkgd plan` estimates it.{unknown}",
        columns=("arm", "runs", "parameters", "groups", "tokens per run", "memory"),
        rows=tuple(
            (
                arm.name,
                str(arm.runs),
                count(arm.parameters),
                str(arm.groups),
                count(arm.tokens),
                ABSENT if arm.memory_bytes is None else size(arm.memory_bytes),
            )
            for arm in arms
        ),
    )
