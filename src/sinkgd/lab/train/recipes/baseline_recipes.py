"""Recipes of the optimizers that SinkGD is compared with: torch's, and published methods.

Most published methods come from pytorch-optimizer. The laboratory has its own APOLLO and RACS,
because those of that package deviate from the papers. If the code of a published method (that of
pytorch-optimizer 4.1.0, or ours) differs from the paper or from its authors' code, the recipe says
so.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sinkgd.lab.train.config import ConfigError
from sinkgd.lab.train.recipes.chained_optimizer import (
    ChainedOptimizer,
    WithProjections,
    WithStepCount,
    from_pytorch_optimizer,
)
from sinkgd.lab.train.recipes.per_matrix import Apollo, Racs
from sinkgd.lab.train.recipes.recipe import (
    PYTORCH_OPTIMIZER,
    Groups,
    Options,
    Recipe,
    at_one_or_two_rates,
    betas,
    split_by_role,
    trained,
)


def _adam(model: nn.Module, o: Options) -> Optimizer:
    return torch.optim.Adam(trained(model), lr=o["lr"], betas=betas(o), fused=True)


def _adamw(model: nn.Module, o: Options) -> Optimizer:
    matrices, rest = split_by_role(model, o)
    return torch.optim.AdamW([*matrices, *rest], betas=betas(o), fused=True)


def _adamw_one_lr(model: nn.Module, o: Options) -> Optimizer:
    return torch.optim.AdamW(
        trained(model),
        lr=o["lr"],
        betas=betas(o),
        weight_decay=o["weight_decay"],
        fused=True,
    )


def _sgd(model: nn.Module, o: Options) -> Optimizer:
    return torch.optim.SGD(
        trained(model),
        lr=o["lr"],
        momentum=o.get("momentum", 0.0),
        weight_decay=o["weight_decay"],
        foreach=True,  # fused SGD of torch 2.13 does not update bfloat16 weights on a CPU
    )


def _muon(model: nn.Module, o: Options) -> Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"optimizer.recipe is 'muon', which needs torch 2.9; this is {torch.__version__}. "
            "Upgrade it: pip install --upgrade torch"
        )
    matrices, rest = split_by_role(model, o)
    muon = torch.optim.Muon(
        matrices,
        momentum=o["momentum"],
        nesterov=True,
        ns_steps=int(o["newton_schulz_steps"]),
        adjust_lr_fn="match_rms_adamw",
    )
    return ChainedOptimizer([muon, torch.optim.AdamW(rest, betas=betas(o), fused=True)])


_ADAM_095: dict[str, float] = {"beta1": 0.9, "beta2": 0.95}
_ADAM: dict[str, float] = {"beta1": 0.9, "beta2": 0.999}

FROM_TORCH = (
    Recipe(
        "adam",
        "Adam with one learning rate for all parameters: the benchmark's baseline",
        "Zhao et al. 2024 (GaLore): 1e-3 was the best rate of their grid for models up to 350M; "
        "torch's betas",
        {"lr": 1e-3, **_ADAM, "clip_norm": 0.0},
        _adam,
        can_shard=True,
    ),
    Recipe(
        "adamw",
        "AdamW with clipping and a separate rate for embeddings and head: the fair baseline",
        "clipping at 1, as is common; rates: benchmarks/learning_rates",
        {"lr": 0.08, "matrix_lr": 3e-3, "weight_decay": 0.0, **_ADAM_095, "clip_norm": 1.0},
        _adamw,
        can_shard=True,
    ),
    Recipe(
        "adamw-one-lr",
        "AdamW with one learning rate for all parameters and no clipping: the papers' baseline",
        "Zhao et al. 2024 (GaLore), no clipping, no decay; rate: benchmarks/learning_rates",
        {"lr": 3e-3, "weight_decay": 0.0, **_ADAM, "clip_norm": 0.0},
        _adamw_one_lr,
        can_shard=True,
    ),
    Recipe(
        "sgd",
        "plain SGD with clipping: the least memory",
        "a round value, not tuned",
        {"lr": 0.5, "weight_decay": 0.0, "clip_norm": 1.0},
        _sgd,
        can_shard=True,
    ),
    Recipe(
        "sgd-momentum",
        "SGD with momentum and clipping",
        "momentum 0.9, as is common; the rate is sgd's times 1 - 0.9, because momentum makes steps "
        "up to 1 / (1 - 0.9) times as long; not tuned",
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "clip_norm": 1.0},
        _sgd,
        can_shard=True,
    ),
    Recipe(
        "muon",
        "hidden matrices by Muon with Nesterov momentum, the rest by AdamW",
        "Jordan et al. 2024; updates are scaled by 0.2·√max(m, n), to match the RMS of Adam's, as "
        "in Liu et al. 2025; rates: the best of a few unrecorded trials",
        {
            "lr": 0.02,
            "matrix_lr": 0.01,
            "weight_decay": 0.0,
            **_ADAM_095,
            "momentum": 0.95,
            "newton_schulz_steps": 5,
            "clip_norm": 0.0,
        },
        _muon,
    ),
)


_FOREACH = False  # pytorch-optimizer's foreach holds the updates of the whole model at once
_EPS = 1e-6  # Adam's ε, as in the code of GaLore, Fira and APOLLO


def with_rank(groups: Groups, rank: int) -> Groups:
    """Split groups of matrices by the rank of their projection.

    Args:
        groups: Groups of (name, matrix) pairs.
        rank: Rank for all matrices. 0 means a quarter of a matrix's shorter side, as in GaLore's
            benchmark.
    """
    divided: dict[tuple[int, int], dict[str, Any]] = {}
    for i, group in enumerate(groups):
        for name, matrix in group["params"]:
            own = rank or max(1, min(matrix.shape) // 4)
            part = divided.setdefault((i, own), {**group, "params": [], "rank": own})
            part["params"].append((name, matrix))
    return list(divided.values())


def _projected(kind: str, model: nn.Module, o: Options) -> Optimizer:
    matrices, rest = split_by_role(model, o)
    projection = {
        "update_proj_gap": int(o["projection_every_steps"]),
        "scale": o["projection_scale"],
        "projection_type": "std",
    }
    groups = [{**group, **projection} for group in with_rank(matrices, int(o["rank"]))]
    return WithProjections(
        from_pytorch_optimizer(kind)([*groups, *rest], betas=betas(o), eps=_EPS, foreach=_FOREACH)
    )


def _galore(model: nn.Module, o: Options) -> Optimizer:
    return _projected("GaLore", model, o)


def _fira(model: nn.Module, o: Options) -> Optimizer:
    return _projected("Fira", model, o)


def _apollo(model: nn.Module, o: Options) -> Optimizer:
    return _apollo_with(model, o, int(o["rank"]), per_channel=True)


def _apollo_mini(model: nn.Module, o: Options) -> Optimizer:
    return _apollo_with(model, o, 1, per_channel=False)


def _apollo_with(model: nn.Module, o: Options, rank: int, *, per_channel: bool) -> Optimizer:
    matrices, rest = split_by_role(model, o)
    apollo = Apollo(
        with_rank(matrices, rank),
        o["lr"],
        rank=1,  # not used: each group sets its own rank
        per_channel=per_channel,
        scale=o["projection_scale"],
        projection_every_steps=int(o["projection_every_steps"]),
        betas=betas(o),
        eps=_EPS,
    )
    return ChainedOptimizer([apollo, torch.optim.AdamW(rest, betas=betas(o), eps=_EPS, fused=True)])


def _racs(model: nn.Module, o: Options) -> Optimizer:
    matrices, rest = split_by_role(model, o)
    adamw = torch.optim.AdamW(rest, betas=betas(o), fused=True)
    return ChainedOptimizer([Racs(matrices, o["matrix_lr"]), adamw])


def _stable_spam(model: nn.Module, o: Options) -> Optimizer:
    return WithStepCount(
        from_pytorch_optimizer("StableSPAM")(
            at_one_or_two_rates(model, o),
            betas=betas(o),
            update_proj_gap=int(o["reset_every_steps"]),
            foreach=_FOREACH,
        )
    )


def _adafactor(model: nn.Module, o: Options) -> Optimizer:
    return from_pytorch_optimizer("AdaFactor")(
        at_one_or_two_rates(model, o),
        betas=(None, o["beta2"]),
        relative_step=False,
        scale_parameter=False,
        foreach=_FOREACH,
    )


def _lion(model: nn.Module, o: Options) -> Optimizer:
    return from_pytorch_optimizer("Lion")(
        at_one_or_two_rates(model, o),
        betas=betas(o),
        foreach=_FOREACH,
    )


def _soap(model: nn.Module, o: Options) -> Optimizer:
    """Give matrices a basis for each side, and embedding and head one for their shorter side."""
    matrices, rest = split_by_role(model, o)
    vectors: Groups = []
    embeddings: dict[tuple[int, int], dict[str, Any]] = {}
    for i, group in enumerate(rest):
        found: list[tuple[str, Tensor]] = [(n, p) for n, p in group["params"] if p.ndim < 2]
        if found:
            vectors.append({**group, "params": found})
        for name, param in group["params"]:
            if param.ndim >= 2:
                side = min(param.shape)
                options = {**group, "params": [], "max_precondition_dim": side}
                embeddings.setdefault((i, side), options)["params"].append((name, param))
    return from_pytorch_optimizer("SOAP")(
        [*matrices, *embeddings.values(), *vectors],
        betas=betas(o),
        precondition_frequency=int(o["projection_every_steps"]),
    )


# Settings in scripts/benchmark_c4 of GaLore, pre_training_c4/scripts of Fira and
# scripts/pretrain_c4 of APOLLO: learning rate 0.01 for all parameters, no decay, no clipping, and a
# new projection every 200 steps.
_BENCHMARK: dict[str, float] = {
    "lr": 0.01,
    "matrix_lr": 0.01,
    "weight_decay": 0.0,
    **_ADAM,
    "projection_every_steps": 200,
    "clip_norm": 0.0,
}

FROM_PAPERS = (
    Recipe(
        "galore",
        "hidden matrices by Adam on gradients projected to their first singular vectors, the rest "
        "by AdamW",
        "Zhao et al. 2024, scripts/benchmark_c4: scale 0.25, rank a quarter of the hidden size. "
        "pytorch-optimizer renews projections one step earlier than the authors' code",
        {**_BENCHMARK, "rank": 0, "projection_scale": 0.25},
        _galore,
        package=PYTORCH_OPTIMIZER,
    ),
    Recipe(
        "fira",
        "GaLore plus the part of the gradient that GaLore leaves out, scaled by column, with a "
        "limit on the growth of that part",
        "Chen et al. 2024, pre_training_c4/scripts: scale 0.25, rank a quarter of the hidden size. "
        "As in the authors' code, the scale also multiplies the projection that is subtracted from "
        "the gradient. pytorch-optimizer renews projections one step earlier than that code",
        {**_BENCHMARK, "rank": 0, "projection_scale": 0.25},
        _fira,
        package=PYTORCH_OPTIMIZER,
    ),
    Recipe(
        "apollo",
        "hidden matrices by their gradients, with each channel scaled as Adam would scale it in a "
        "random projection of the gradient; the rest by AdamW",
        "Zhu et al. 2024, scripts/pretrain_c4: scale 1, rank a quarter of the hidden size. The "
        "laboratory has its own code, because pytorch-optimizer scales only the projected "
        "gradient, which gives steps of low rank",
        {**_BENCHMARK, "rank": 0, "projection_scale": 1.0},
        _apollo,
    ),
    Recipe(
        "apollo-mini",
        "APOLLO of rank 1 with one scale for each matrix",
        "Zhu et al. 2024, scripts/pretrain_c4: rank 1; updates are multiplied by √128. The "
        "laboratory has its own code, as for apollo",
        {**_BENCHMARK, "projection_scale": 128.0},
        _apollo_mini,
    ),
    Recipe(
        "racs",
        "hidden matrices by gradients divided by running scales of rows and columns, the rest by "
        "AdamW",
        "Gong et al. 2025: beta 0.9, growth 1.01; the rates that the same authors use for SinkGD: "
        "0.02, and 0.05 times that for matrices. The laboratory has its own code, because "
        "pytorch-optimizer divides by averages over rows and columns, not by the scales to which "
        "RACS's iteration converges, and takes larger steps as gradients shrink",
        {"lr": 0.02, "matrix_lr": 0.001, "weight_decay": 0.0, **_ADAM, "clip_norm": 0.0},
        _racs,
    ),
    Recipe(
        "stable-spam",
        "all parameters by Adam on clipped and normalized gradients, with the moments reset "
        "periodically",
        "Huang et al. 2025, settings from the call in their README: gamma1 0.7, gamma2 0.9, theta "
        "0.999, resets every 1000 steps; but without the decay of beta1 and gamma1 over the "
        "run. pytorch-optimizer resets before a step; the authors' code steps once more with the "
        "old moments",
        {
            "lr": 1e-3,
            "matrix_lr": None,
            "weight_decay": 0.0,
            **_ADAM,
            "reset_every_steps": 1000,
            "clip_norm": 0.0,
        },
        _stable_spam,
        package=PYTORCH_OPTIMIZER,
    ),
    Recipe(
        "adafactor",
        "all parameters by gradients divided by the root of Adam's second moment, which is "
        "estimated from row and column means; without momentum",
        "Shazeer & Stern 2018, as in Zhao et al. 2024 (GaLore): no relative step, no scaling by "
        "the weights, clipping at RMS 1; the rate of adam. pytorch-optimizer caps the decay of the "
        "second moment, here at 0.999",
        {"lr": 1e-3, "matrix_lr": None, "weight_decay": 0.0, "beta2": 0.999, "clip_norm": 0.0},
        _adafactor,
        package=PYTORCH_OPTIMIZER,
    ),
    Recipe(
        "lion",
        "all parameters by the sign of a momentum",
        "Chen et al. 2023: betas of the paper; a tenth of the rate of adamw-one-lr, as the paper "
        "advises; not tuned",
        {
            "lr": 3e-4,
            "matrix_lr": None,
            "weight_decay": 0.0,
            "beta1": 0.9,
            "beta2": 0.99,
            "clip_norm": 0.0,
        },
        _lion,
        package=PYTORCH_OPTIMIZER,
    ),
    Recipe(
        "soap",
        "all parameters by Adam in the eigenbasis of Shampoo: embedding and head on their "
        "shorter side, vectors without a basis; the first step changes no weight",
        "Vyas et al. 2024, the authors' defaults: lr 3e-3, betas 0.95, decay 0.01, a new basis "
        "every 10 steps",
        {
            "lr": 3e-3,
            "matrix_lr": None,
            "weight_decay": 0.01,
            "beta1": 0.95,
            "beta2": 0.95,
            "projection_every_steps": 10,
            "clip_norm": 0.0,
        },
        _soap,
        package=PYTORCH_OPTIMIZER,
    ),
)
