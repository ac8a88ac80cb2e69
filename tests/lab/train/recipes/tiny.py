"""A LLaMA of 6,000 parameters and a batch for it: every recipe in seconds."""

import torch
from torch import nn

from sinkgd.lab.models.llama import Llama, LlamaConfig
from sinkgd.lab.train.config import OptimizerConfig
from sinkgd.lab.train.recipes import RECIPES, build_optimizer, resolve_optimizer

CONFIG = LlamaConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=40,
    num_layers=2,
    num_heads=2,
    max_sequence_length=16,
)
TOKENS = torch.randint(CONFIG.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
# What happens now and then happens within a few steps.
SOON = {"projection_every_steps": 4, "reset_every_steps": 5}
# bfloat16 would round the steps of these recipes' own rates away. TemperedSinkGD's steps are as
# long as the gradient, and a rate for fine-tuning is low.
FASTER = {"tempered": {"lr": 0.5}, "sinkgd-finetune": {"lr": 0.05}}


def tiny_model(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> Llama:
    return Llama(CONFIG, seed=seed).to(dtype)


def built(model: nn.Module, recipe: str, **options: object) -> torch.optim.Optimizer:
    return build_optimizer(model, resolve_optimizer(OptimizerConfig(recipe=recipe, **options)))


def soon(recipe: str) -> dict[str, int]:
    """The options that make rare events of a recipe frequent."""
    return {name: value for name, value in SOON.items() if name in RECIPES[recipe].defaults}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(TOKENS[:, :-1]).flatten(0, 1).float()
        loss = nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
