"""Recipes of torch's optimizers."""

import torch
from torch import nn
from torch.optim import Optimizer

from sinkgd.lab.train.config import ConfigError
from sinkgd.lab.train.recipes.contract import Options, Recipe, betas, routed
from sinkgd.lab.train.recipes.several import Several


def _adam(model: nn.Module, o: Options) -> Optimizer:
    return torch.optim.Adam(model.named_parameters(), lr=o["lr"], betas=betas(o), fused=True)


def _adamw(model: nn.Module, o: Options) -> Optimizer:
    matrices, rest = routed(model, o)
    return torch.optim.AdamW([*matrices, *rest], betas=betas(o), fused=True)


def _adamw_one_lr(model: nn.Module, o: Options) -> Optimizer:
    return torch.optim.AdamW(
        model.named_parameters(),
        lr=o["lr"],
        betas=betas(o),
        weight_decay=o["weight_decay"],
        fused=True,
    )


def _sgd(model: nn.Module, o: Options) -> Optimizer:
    return torch.optim.SGD(
        model.named_parameters(),
        lr=o["lr"],
        momentum=o.get("momentum", 0.0),
        weight_decay=o["weight_decay"],
        foreach=True,  # torch 2.13's fused SGD leaves bfloat16 weights on a CPU as they are
    )


def _muon(model: nn.Module, o: Options) -> Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"optimizer.recipe is 'muon', which needs torch 2.9; this is {torch.__version__}. "
            "Upgrade it: pip install --upgrade torch"
        )
    matrices, rest = routed(model, o)
    muon = torch.optim.Muon(
        matrices,
        momentum=o["momentum"],
        nesterov=True,
        ns_steps=int(o["newton_schulz_steps"]),
        adjust_lr_fn="match_rms_adamw",
    )
    return Several([muon, torch.optim.AdamW(rest, betas=betas(o), fused=True)])


_ADAM: dict[str, float] = {"beta1": 0.9, "beta2": 0.95}
_PAPERS_ADAM: dict[str, float] = {"beta1": 0.9, "beta2": 0.999}

FROM_TORCH = (
    Recipe(
        "adam",
        "Adam with one learning rate for all: the benchmark's own",
        "Zhao et al. 2024 (GaLore): 1e-3 was best of its grid up to 350M; torch's betas",
        {"lr": 1e-3, **_PAPERS_ADAM, "clip_norm": 0.0},
        _adam,
        can_shard=True,
    ),
    Recipe(
        "adamw",
        "AdamW with clipping and a learning rate for each role: the fair baseline",
        "clipping at 1, as is common; rates: benchmarks/learning_rates",
        {"lr": 0.08, "matrix_lr": 3e-3, "weight_decay": 0.0, **_ADAM, "clip_norm": 1.0},
        _adamw,
        can_shard=True,
    ),
    Recipe(
        "adamw-one-lr",
        "AdamW with one learning rate for all and no clipping: the papers' baseline",
        "Zhao et al. 2024 (GaLore), no clipping, no decay; rate: benchmarks/learning_rates",
        {"lr": 3e-3, "weight_decay": 0.0, **_PAPERS_ADAM, "clip_norm": 0.0},
        _adamw_one_lr,
        can_shard=True,
    ),
    Recipe(
        "sgd",
        "plain SGD with clipping: the floor in memory",
        "a round value, not tuned",
        {"lr": 0.5, "weight_decay": 0.0, "clip_norm": 1.0},
        _sgd,
        can_shard=True,
    ),
    Recipe(
        "sgd-momentum",
        "SGD with momentum and clipping",
        "momentum 0.9, as is common; sgd's rate times 1 - 0.9, the same sum of steps; not tuned",
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "clip_norm": 1.0},
        _sgd,
        can_shard=True,
    ),
    Recipe(
        "muon",
        "block matrices by Muon with Nesterov momentum, the rest by AdamW",
        "Jordan et al. 2024; scaled as Liu et al. 2025 (0.2·√max(m, n), Adam's RMS); rates: the "
        "best of a few unrecorded trials",
        {
            "lr": 0.02,
            "matrix_lr": 0.01,
            "weight_decay": 0.0,
            **_ADAM,
            "momentum": 0.95,
            "newton_schulz_steps": 5,
            "clip_norm": 0.0,
        },
        _muon,
    ),
)
