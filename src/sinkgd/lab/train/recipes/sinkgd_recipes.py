"""Recipes of this package's own optimizers."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

import sinkgd
from sinkgd.lab.train.recipes.recipe import (
    Options,
    Recipe,
    betas,
    check_trains_matrices,
    family_groups,
    split_by_role,
    trained,
)
from sinkgd.norms import Norm
from sinkgd.optim.overrides import Overrides
from sinkgd.optim.param_groups import BETAS, DEFLATED_RANK, LR, MATRIX_LR_SCALE
from sinkgd.optim.roles import EMBEDDING, HEAD, roles
from sinkgd.optim.transforms import TRANSFORMS

_OFF = {name: value for own in TRANSFORMS for name, value in own.options.items()}


def _sinkgd(model: nn.Module, o: Options) -> Optimizer:
    return sinkgd.SinkGDVariant(
        family_groups(model, o, "sinkgd", _of_tables(model, o)),
        sinkhorn_iterations=int(o["sinkhorn_iterations"]),
        cautious_decay=bool(o["cautious_decay"]),
        rounding=o["rounding"],
        momentum=o["momentum"],
        nesterov=o["nesterov"],
        momentum_place=o["momentum_place"],
        last=o["last"],
        operator_norm=o["operator_norm"],
        **{name: o[name] for name in _NEWER if o[name] is not None},
    )


def _sinkgd_finetune(model: nn.Module, o: Options) -> Optimizer:
    adapters = {r"\.lora_[AB]\.": "sinkgd"} if o["adapters"] == "sinkgd" else None
    groups = sinkgd.param_groups(
        model,
        adamw_lr=o["lr"],
        weight_decay=o["weight_decay"],
        betas=betas(o),
        deflated_rank=int(o["deflated_rank"]),
        overrides=adapters,
    )
    return sinkgd.SinkGD(
        groups,
        sinkhorn_iterations=int(o["sinkhorn_iterations"]),
        cautious_decay=bool(o["cautious_decay"]),
        rounding=o["rounding"],
    )


def _of_tables(model: nn.Module, o: Options) -> Overrides | None:
    """Return overrides that give embeddings and output head the requested algorithm and rate."""
    lr = o["lr"] if o["tables_lr"] is None else o["tables_lr"]
    if o["tables"] == "adamw" and lr == o["lr"]:
        return None
    own = {"algorithm": o["tables"], "lr": lr}
    if o["tables"] == "sinkgd":  # tables get SR-Sinkhorn alone
        own |= {"last": "column", **_OFF}
    return {
        f"^{re.escape(name)}$": own
        for name, _, role in roles(model)
        if role.reason in (EMBEDDING, HEAD)
    }


def _sinkgd_stateless(model: nn.Module, o: Options) -> Optimizer:
    return sinkgd.SinkGD(
        trained(model),
        lr=o["lr"],
        sinkhorn_iterations=int(o["sinkhorn_iterations"]),
        rounding=o["rounding"],
        weight_decay=o["weight_decay"],
        cautious_decay=bool(o["cautious_decay"]),
    )


# Patterns of the modules of a block that SWAN leaves to SR-Sinkhorn.
_NOT_WHITENED = {"all": None, "attention": r"\.mlp\.", "mlp": r"\.(self_)?attn\."}


def _swan(model: nn.Module, o: Options) -> Optimizer:
    not_whitened = _NOT_WHITENED[o["whitened"]]
    by_sinkhorn = None if not_whitened is None else {not_whitened: "sinkgd"}
    return sinkgd.SWAN(
        family_groups(model, o, "swan", by_sinkhorn),
        newton_schulz_steps=int(o["newton_schulz_steps"]),
        cautious_decay=bool(o["cautious_decay"]),
        rounding=o["rounding"],
    )


def _scale(model: nn.Module, o: Options) -> Optimizer:
    overrides: dict[str, Any] = {}
    if o["matrix_lr"] is not None:
        matrices, _ = split_by_role(model, o)
        hidden = [name for group in matrices for name, _ in group["params"]]
        overrides = {f"^{re.escape(name)}$": {"lr": o["matrix_lr"]} for name in hidden}
    check_trains_matrices(model)
    groups = sinkgd.scale_groups(
        model,
        o["lr"],
        o["momentum"],
        weight_decay=o["weight_decay"],
        betas=betas(o),
        overrides=overrides,
    )
    return sinkgd.SCALE(groups, cautious_decay=bool(o["cautious_decay"]), rounding=o["rounding"])


def _tempered(model: nn.Module, o: Options) -> Optimizer:
    return sinkgd.TemperedSinkGD(
        trained(model),
        lr=o["lr"],
        weight_decay=o["weight_decay"],
        cautious_decay=bool(o["cautious_decay"]),
        tau=o["tau"],
        n_iter=int(o["n_iter"]),
        rounding=o["rounding"],
    )


@dataclass(frozen=True)
class _WithResets:
    kind: type[sinkgd.SPAM] | type[sinkgd.AdamWSPAM]

    def __call__(self, model: nn.Module, o: Options) -> Optimizer:
        return self.kind(
            trained(model),
            lr=o["lr"],
            betas=betas(o),
            weight_decay=o["weight_decay"],
            cautious_decay=bool(o["cautious_decay"]),
            reset_interval=int(o["reset_every_steps"]),
        )


@dataclass(frozen=True)
class _OneNorm:
    norm: Norm

    def __call__(self, model: nn.Module, o: Options) -> Optimizer:
        return sinkgd.MNGD(
            family_groups(model, o, "mngd"),
            norms=[self.norm],
            num_iters=1,
            cautious_decay=bool(o["cautious_decay"]),
            rounding=o["rounding"],
            momentum=o["momentum"] or 0.0,
            nesterov=bool(o["nesterov"]),
        )


_ADAM: dict[str, float] = {"beta1": 0.9, "beta2": 0.95}
# Options for which None means the library's default. Runs that were recorded before an option
# existed had this default.
_NEWER = (
    *("momentum_bits", "momentum_rank", "low_rank_momentum", "cross_fit", "averaged_scales"),
    *("deflated_start", "weight_projection", "constant_norm"),
)
_DECAY: dict[str, Any] = {"cautious_decay": None}
_STATELESS: dict[str, Any] = {**_DECAY, "rounding": "nearest", "clip_norm": 0.0}
_BEYOND_THE_PAPER: dict[str, Any] = {
    "momentum": 0.0,
    "nesterov": False,
    "momentum_place": "before",
    "last": "column",
    "deflated_rank": 0,
    "operator_norm": None,
    "base_width": None,
    "tables": "adamw",
    "tables_lr": None,
    **dict.fromkeys(_NEWER),
}
# Rates of the recipe sinkgd-paper, from benchmarks/learning_rates; the paper's own ``lr`` is 0.02.
_PAPERS_RATES = {"lr": 0.08, "matrix_lr": 0.001, "weight_decay": 0.0, **_ADAM}


def _one_norm(name: str, summary: str, norm: Norm) -> Recipe:
    build: Callable[[nn.Module, Options], Optimizer] = _OneNorm(norm)
    return Recipe(
        name,
        f"hidden matrices by {summary}, the rest by AdamW",
        "the rates of sinkgd-paper, because updates have the same RMS, 1; not tuned here",
        {**_PAPERS_RATES, **dict.fromkeys(("momentum", "nesterov")), **_STATELESS},
        build,
        can_shard=True,
        can_release=True,
    )


FAMILY = (
    Recipe(
        "sinkgd",
        "hidden matrices by SR-Sinkhorn with deflation, the rest by AdamW: the default",
        "the defaults of SinkGD(param_groups(model)); rates: benchmarks/deflation",
        {
            "lr": LR,
            "matrix_lr": MATRIX_LR_SCALE * LR,
            "weight_decay": 0.0,
            "beta1": BETAS[0],
            "beta2": BETAS[1],
            "sinkhorn_iterations": 5,
            **_BEYOND_THE_PAPER,
            "deflated_rank": DEFLATED_RANK,
            **_STATELESS,
        },
        _sinkgd,
        can_shard=True,
        can_release=True,
    ),
    Recipe(
        "sinkgd-paper",
        "hidden matrices by SR-Sinkhorn without deflation, as in the paper, the rest by AdamW",
        "5 iterations: Scetbon et al. 2025, algorithm 4; rates: benchmarks/learning_rates",
        {**_PAPERS_RATES, "sinkhorn_iterations": 5, **_BEYOND_THE_PAPER, **_STATELESS},
        _sinkgd,
        can_shard=True,
        can_release=True,
    ),
    Recipe(
        "sinkgd-finetune",
        "SinkGD to fine-tune a trained model, at rates derived from the one that AdamW would get",
        "the defaults of SinkGD(param_groups(model, adamw_lr=lr)); rate: 1e-5, common for billions "
        "of weights and far too low for small models; clipping at 1, as is common",
        {
            "lr": 1e-5,
            "weight_decay": 0.0,
            "beta1": 0.9,
            "beta2": 0.999,
            "sinkhorn_iterations": 5,
            "deflated_rank": DEFLATED_RANK,
            "adapters": None,
            **_DECAY,
            "rounding": "nearest",
            "clip_norm": 1.0,
        },
        _sinkgd_finetune,
        can_shard=True,
        can_release=True,
    ),
    Recipe(
        "sinkgd-stateless",
        "matrices by SR-Sinkhorn, vectors by their own norm; no state at all",
        "SinkGD's default arguments; not tuned here",
        {"lr": 1e-3, "weight_decay": 0.0, "sinkhorn_iterations": 5, **_STATELESS},
        _sinkgd_stateless,
        can_shard=True,
        can_release=True,
    ),
    Recipe(
        "swan",
        "hidden matrices by row norm and whitening, the rest by AdamW",
        "one row norm, one whitening: Ma et al. 2024; rates: from three runs, "
        "benchmarks/learning_rates",
        {
            "lr": 0.08,
            "matrix_lr": 0.002,
            "weight_decay": 0.0,
            **_ADAM,
            "newton_schulz_steps": 5,
            "whitened": "all",
            **_STATELESS,
        },
        _swan,
        can_release=True,
    ),
    Recipe(
        "tempered",
        "all parameters by TemperedSinkGD: divides rows and columns in turn by the sums of their "
        "absolute values, applies a tanh, and gives the result the size of the gradient",
        "TemperedSinkGD's default arguments; not tuned here",
        {"lr": 3e-4, "weight_decay": 0.1, "tau": 0.1, "n_iter": 5, **_STATELESS},
        _tempered,
        can_shard=True,
        can_release=True,
    ),
    Recipe(
        "spam",
        "all parameters by Adam, with spikes clipped and the moments reset periodically",
        "Huang et al. 2025, https://arxiv.org/abs/2501.06842: theta 5000, resets every 500 steps, "
        "150 steps of warm-up after each; adam's rate; not tuned here",
        {
            "lr": 1e-3,
            "weight_decay": 0.0,
            "beta1": 0.9,
            "beta2": 0.999,
            **_DECAY,
            "reset_every_steps": 500,
            "clip_norm": 0.0,
        },
        _WithResets(sinkgd.SPAM),
        can_shard=True,
        can_release=True,
    ),
    Recipe(
        "adamw-spam",
        "all parameters by AdamW with AMSGrad, clipped at 1; its moments shrink at a spike and "
        "are reset periodically",
        "lr, decay and resets are those of the baseline in the ablation of TemperedSinkGD, on "
        "the model Lens L6",
        {
            "lr": 6e-4,
            "weight_decay": 0.1,
            "beta1": 0.9,
            "beta2": 0.999,
            **_DECAY,
            "reset_every_steps": 1000,
            "clip_norm": 0.0,
        },
        _WithResets(sinkgd.AdamWSPAM),
        can_shard=True,
    ),
    Recipe(
        "scale",
        "matrices, embeddings and head by row normalization, the head with momentum; vectors by "
        "AdamW",
        "Glentis et al. 2025, https://arxiv.org/abs/2506.16659: 1e-3, momentum .9; not tuned here",
        {
            "lr": 1e-3,
            "matrix_lr": None,
            "weight_decay": 0.0,
            "beta1": 0.9,
            "beta2": 0.999,
            "momentum": 0.9,
            **_STATELESS,
        },
        _scale,
        can_shard=True,
        can_release=True,
    ),
    _one_norm("rows-only", "rows scaled to equal length", sinkgd.RowNorm()),
    _one_norm("columns-only", "columns scaled to equal length", sinkgd.ColumnNorm()),
    _one_norm("frobenius", "the gradient scaled to RMS 1", sinkgd.FrobeniusNorm()),
    _one_norm("sign", "the signs of the gradient", sinkgd.SignNorm()),
)
