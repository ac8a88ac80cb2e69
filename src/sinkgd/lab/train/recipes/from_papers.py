"""Recipes of published methods: pytorch-optimizer's, and two that it has otherwise than published.

Where it differs from a paper or the authors' code (version 4.1.0), the row says so.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sinkgd.lab.train.recipes.apollo import Apollo
from sinkgd.lab.train.recipes.contract import (
    PYTORCH_OPTIMIZER,
    Groups,
    Options,
    Recipe,
    betas,
    routed,
)
from sinkgd.lab.train.recipes.racs import Racs
from sinkgd.lab.train.recipes.several import Counted, Projected, Several, published

_FOREACH = False  # pytorch-optimizer's batches hold the updates of the whole model at once
_EPS = 1e-6  # Adam's, in the code of GaLore, Fira and APOLLO


def with_rank(groups: Groups, rank: int) -> Groups:
    """Divide groups of matrices by the rank of their projection.

    Args:
        groups: Of (name, matrix) pairs.
        rank: Of all; 0 takes a quarter of a matrix's shorter side, as the benchmark has it.
    """
    divided: dict[tuple[int, int], dict[str, Any]] = {}
    for i, group in enumerate(groups):
        for name, matrix in group["params"]:
            own = rank or max(1, min(matrix.shape) // 4)
            part = divided.setdefault((i, own), {**group, "params": [], "rank": own})
            part["params"].append((name, matrix))
    return list(divided.values())


def _projected(kind: str, model: nn.Module, o: Options) -> Optimizer:
    matrices, rest = routed(model, o)
    projection = {
        "update_proj_gap": int(o["projection_every_steps"]),
        "scale": o["projection_scale"],
        "projection_type": "std",
    }
    groups = [{**group, **projection} for group in with_rank(matrices, int(o["rank"]))]
    return Projected(published(kind)([*groups, *rest], betas=betas(o), eps=_EPS, foreach=_FOREACH))


def _galore(model: nn.Module, o: Options) -> Optimizer:
    return _projected("GaLore", model, o)


def _fira(model: nn.Module, o: Options) -> Optimizer:
    return _projected("Fira", model, o)


def _apollo(model: nn.Module, o: Options) -> Optimizer:
    return _apollo_with(model, o, int(o["rank"]), per_channel=True)


def _apollo_mini(model: nn.Module, o: Options) -> Optimizer:
    return _apollo_with(model, o, 1, per_channel=False)


def _apollo_with(model: nn.Module, o: Options, rank: int, *, per_channel: bool) -> Optimizer:
    matrices, rest = routed(model, o)
    apollo = Apollo(
        with_rank(matrices, rank),
        o["lr"],
        rank=1,  # each group has its own
        per_channel=per_channel,
        scale=o["projection_scale"],
        projection_every_steps=int(o["projection_every_steps"]),
        betas=betas(o),
        eps=_EPS,
    )
    return Several([apollo, torch.optim.AdamW(rest, betas=betas(o), eps=_EPS, fused=True)])


def _racs(model: nn.Module, o: Options) -> Optimizer:
    matrices, rest = routed(model, o)
    adamw = torch.optim.AdamW(rest, betas=betas(o), fused=True)
    return Several([Racs(matrices, o["matrix_lr"]), adamw])


def _stable_spam(model: nn.Module, o: Options) -> Optimizer:
    return Counted(
        published("StableSPAM")(
            model.named_parameters(),
            lr=o["lr"],
            betas=betas(o),
            weight_decay=o["weight_decay"],
            update_proj_gap=int(o["reset_every_steps"]),
            foreach=_FOREACH,
        )
    )


def _adafactor(model: nn.Module, o: Options) -> Optimizer:
    return published("AdaFactor")(
        model.named_parameters(),
        lr=o["lr"],
        betas=(None, o["beta2"]),
        weight_decay=o["weight_decay"],
        relative_step=False,
        scale_parameter=False,
        foreach=_FOREACH,
    )


def _lion(model: nn.Module, o: Options) -> Optimizer:
    return published("Lion")(
        model.named_parameters(),
        lr=o["lr"],
        betas=betas(o),
        weight_decay=o["weight_decay"],
        foreach=_FOREACH,
    )


def _soap(model: nn.Module, o: Options) -> Optimizer:
    """Give matrices a basis for each side, tables (embedding, head) one for their shorter side."""
    matrices, rest = routed(model, o)
    vectors: Groups = []
    tables: dict[tuple[int, int], dict[str, Any]] = {}
    for i, group in enumerate(rest):
        found: list[tuple[str, Tensor]] = [(n, p) for n, p in group["params"] if p.ndim < 2]
        if found:
            vectors.append({**group, "params": found})
        for name, param in group["params"]:
            if param.ndim >= 2:
                side = min(param.shape)
                options = {**group, "params": [], "max_precondition_dim": side}
                tables.setdefault((i, side), options)["params"].append((name, param))
    return published("SOAP")(
        [*matrices, *tables.values(), *vectors],
        betas=betas(o),
        precondition_frequency=int(o["projection_every_steps"]),
    )


_ADAM: dict[str, float] = {"beta1": 0.9, "beta2": 0.999}
# scripts/benchmark_c4 of GaLore, pre_training_c4/scripts of Fira, scripts/pretrain_c4 of APOLLO:
# learning rate 0.01 for all, no decay, no clipping, a new projection every 200 steps.
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
        "block matrices by Adam on projections to their first singular vectors, the rest by AdamW",
        "Zhao et al. 2024, scripts/benchmark_c4: 0.25, rank a quarter of the hidden size. "
        "pytorch-optimizer renews projections one step earlier than the authors' code",
        {**_BENCHMARK, "rank": 0, "projection_scale": 0.25},
        _galore,
        package=PYTORCH_OPTIMIZER,
    ),
    Recipe(
        "fira",
        "GaLore, and what it leaves out, scaled by column, with a limit on its growth",
        "Chen et al. 2024, pre_training_c4/scripts: 0.25, rank a quarter of the hidden size. As in "
        "the authors' code the scale shrinks what is taken out of the gradient, too. "
        "pytorch-optimizer renews projections one step earlier",
        {**_BENCHMARK, "rank": 0, "projection_scale": 0.25},
        _fira,
        package=PYTORCH_OPTIMIZER,
    ),
    Recipe(
        "apollo",
        "block matrices scaled by channel as Adam scales a random projection, the rest by AdamW",
        "Zhu et al. 2024, scripts/pretrain_c4: scale 1, rank a quarter of the hidden size. Written "
        "here: pytorch-optimizer projects the scaled gradient, so that its steps have low rank",
        {**_BENCHMARK, "rank": 0, "projection_scale": 1.0},
        _apollo,
    ),
    Recipe(
        "apollo-mini",
        "APOLLO of rank 1 with one scale for a matrix",
        "Zhu et al. 2024, scripts/pretrain_c4: rank 1, scale 128 under a square root. Written "
        "here, as apollo",
        {**_BENCHMARK, "projection_scale": 128.0},
        _apollo_mini,
    ),
    Recipe(
        "racs",
        "block matrices divided by running scales of rows and columns, the rest by AdamW",
        "Gong et al. 2025: beta 0.9, growth 1.01; lr 0.02 and 0.05 of it on matrices, as the "
        "authors' SinkGD. Written here: pytorch-optimizer takes means of rows and columns instead "
        "of the fixed point, so that its steps grow as gradients shrink",
        {"lr": 0.02, "matrix_lr": 0.001, "weight_decay": 0.0, **_ADAM, "clip_norm": 0.0},
        _racs,
    ),
    Recipe(
        "stable-spam",
        "all by Adam on clipped and normalized gradients, its moments reset now and then",
        "Huang et al. 2025, the call in their README: 0.7, 0.9, 0.999, resets every 1000 steps; "
        "without its decay of the moments over the run. pytorch-optimizer resets before a step, "
        "the authors' code steps once more with the old moments",
        {"lr": 1e-3, "weight_decay": 0.0, **_ADAM, "reset_every_steps": 1000, "clip_norm": 0.0},
        _stable_spam,
        package=PYTORCH_OPTIMIZER,
    ),
    Recipe(
        "adafactor",
        "all by Adam's second moment from row and column means, without momentum",
        "Shazeer & Stern 2018, as in Zhao et al. 2024 (GaLore): no relative step, no scaling by "
        "the weights, clipping at RMS 1; adam's rate. pytorch-optimizer caps the decay of the "
        "second moment, here at 0.999",
        {"lr": 1e-3, "weight_decay": 0.0, "beta2": 0.999, "clip_norm": 0.0},
        _adafactor,
        package=PYTORCH_OPTIMIZER,
    ),
    Recipe(
        "lion",
        "all by the sign of a momentum",
        "Chen et al. 2023: their betas; a tenth of adamw-one-lr's rate, as they advise; not tuned",
        {"lr": 3e-4, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.99, "clip_norm": 0.0},
        _lion,
        package=PYTORCH_OPTIMIZER,
    ),
    Recipe(
        "soap",
        "all by Adam in the eigenbasis of Shampoo: tables on their shorter side, vectors as they "
        "are; the first step only measures",
        "Vyas et al. 2024, the authors' defaults: lr 3e-3, betas 0.95, decay 0.01, a new basis "
        "every 10 steps",
        {
            "lr": 3e-3,
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
