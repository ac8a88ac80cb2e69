"""The one registry of optimizers: a table of recipes, each with the source of its values.

A recipe's ``defaults`` are also the list of options that it takes: another one is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import sinkgd
from sinkgd.lab.train.config import ConfigError, OptimizerConfig
from sinkgd.lab.train.config_file import nearest

Options = Mapping[str, Any]  # resolved: by name, as many as the recipe's defaults


@dataclass(frozen=True)
class Recipe:
    """An optimizer as it is commonly run."""

    name: str
    summary: str  # one line
    source: str  # of the defaults
    defaults: Options  # those fields of `OptimizerConfig` that it takes
    build: Callable[[nn.Module, Options], Optimizer]
    can_release: bool = False  # whether it can take one gradient at a time, inside backward


def resolve_optimizer(options: OptimizerConfig) -> OptimizerConfig:
    """Fill in the recipe's defaults and check every option.

    Raises:
        ConfigError: If there is no such recipe, it does not take an option that was given, or an
            option is out of range.
    """
    recipe = find_recipe(options.recipe)
    for option in fields(options)[1:]:
        if getattr(options, option.name) is not None and option.name not in recipe.defaults:
            raise ConfigError(
                f"optimizer.{option.name} is {getattr(options, option.name)}, but recipe "
                f"{recipe.name!r} does not take it; it takes {', '.join(recipe.defaults)}"
            )
    open_options: dict[str, Any] = {
        name: value for name, value in recipe.defaults.items() if getattr(options, name) is None
    }
    resolved = replace(options, **open_options)
    _check_ranges(resolved)
    return resolved


def find_recipe(name: str) -> Recipe:
    """Return the recipe called ``name``.

    Raises:
        ConfigError: If there is none; the message gives the nearest name.
    """
    if name not in RECIPES:
        raise ConfigError(
            f"optimizer.recipe is {name!r}; did you mean {nearest(name, RECIPES)!r}? "
            f"There are {', '.join(RECIPES)}"
        )
    return RECIPES[name]


def build_optimizer(model: nn.Module, options: OptimizerConfig) -> Optimizer:
    """Build the optimizer of ``model`` from resolved options.

    Each group has its peak learning rate as ``initial_lr`` too, where torch's schedulers look for
    it when a run goes on.
    """
    recipe = find_recipe(options.recipe)
    taken = {name: getattr(options, name) for name in recipe.defaults}
    optimizer = recipe.build(model, taken)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _check_ranges(options: OptimizerConfig) -> None:
    def check(names: tuple[str, ...], rule: str, holds: Callable[[float], bool]) -> None:
        for name in names:
            value = getattr(options, name)
            if value is not None and not holds(value):
                raise ConfigError(f"optimizer.{name} is {value}; it must be {rule}")

    check(("lr", "matrix_lr"), "positive", lambda value: value > 0)
    check(("weight_decay", "clip_norm"), "at least 0", lambda value: value >= 0)
    check(("beta1", "beta2"), "at least 0 and less than 1", lambda value: 0 <= value < 1)
    check(("sinkhorn_iterations",), "at least 1", lambda value: value >= 1)


def _groups(model: nn.Module, o: Options, matrix_algorithm: str) -> list[dict[str, Any]]:
    """Route the parameters by role: block matrices to an algorithm of theirs, the rest to AdamW."""
    return sinkgd.param_groups(
        model,
        lr=o["lr"],
        matrix_lr_scale=o["matrix_lr"] / o["lr"],
        matrix_algorithm=matrix_algorithm,
        weight_decay=o["weight_decay"],
        betas=(o["beta1"], o["beta2"]),
    )


def _sinkgd(model: nn.Module, o: Options) -> Optimizer:
    return sinkgd.SinkGD(
        _groups(model, o, "sinkgd"),
        lr=o["lr"],
        sinkhorn_iterations=int(o["sinkhorn_iterations"]),
        rounding=o["rounding"],
    )


def _sinkgd_stateless(model: nn.Module, o: Options) -> Optimizer:
    return sinkgd.SinkGD(
        model.named_parameters(),
        lr=o["lr"],
        sinkhorn_iterations=int(o["sinkhorn_iterations"]),
        rounding=o["rounding"],
        weight_decay=o["weight_decay"],
    )


def _swan(model: nn.Module, o: Options) -> Optimizer:
    return sinkgd.SWAN(_groups(model, o, "swan"), lr=o["lr"], rounding=o["rounding"])


def _adamw(model: nn.Module, o: Options) -> Optimizer:
    options = ("params", "lr", "weight_decay")
    groups = [{key: group[key] for key in options} for group in _groups(model, o, "sinkgd")]
    return torch.optim.AdamW(groups, betas=(o["beta1"], o["beta2"]), fused=True)


def _adamw_one_lr(model: nn.Module, o: Options) -> Optimizer:
    return torch.optim.AdamW(
        model.named_parameters(),
        lr=o["lr"],
        betas=(o["beta1"], o["beta2"]),
        weight_decay=o["weight_decay"],
        fused=True,
    )


def _sgd(model: nn.Module, o: Options) -> Optimizer:
    return torch.optim.SGD(
        model.named_parameters(), lr=o["lr"], weight_decay=o["weight_decay"], fused=True
    )


_ADAM: dict[str, float] = {"beta1": 0.9, "beta2": 0.95}

_TABLE = (
    Recipe(
        "sinkgd",
        "block matrices by SR-Sinkhorn, the rest by AdamW",
        "5 iterations: Scetbon et al. 2025, algorithm 4; rates: benchmarks/learning_rates",
        {
            "lr": 0.08,
            "matrix_lr": 0.001,
            "weight_decay": 0.0,
            **_ADAM,
            "sinkhorn_iterations": 5,
            "rounding": "nearest",
            "clip_norm": 0.0,
        },
        _sinkgd,
        can_release=True,
    ),
    Recipe(
        "sinkgd-stateless",
        "matrices by SR-Sinkhorn, vectors by their own norm; no state at all",
        "SinkGD's default arguments; not tuned here",
        {
            "lr": 1e-3,
            "weight_decay": 0.0,
            "sinkhorn_iterations": 5,
            "rounding": "nearest",
            "clip_norm": 0.0,
        },
        _sinkgd_stateless,
        can_release=True,
    ),
    Recipe(
        "swan",
        "block matrices by row norm and whitening, the rest by AdamW",
        "one row norm, one whitening: Ma et al. 2024; rates: three runs, benchmarks/learning_rates",
        {
            "lr": 0.08,
            "matrix_lr": 0.002,
            "weight_decay": 0.0,
            **_ADAM,
            "rounding": "nearest",
            "clip_norm": 0.0,
        },
        _swan,
        can_release=True,
    ),
    Recipe(
        "adamw",
        "AdamW with clipping and a learning rate for each role: the fair baseline",
        "clipping at 1, as is common; rates: benchmarks/learning_rates",
        {"lr": 0.08, "matrix_lr": 3e-3, "weight_decay": 0.0, **_ADAM, "clip_norm": 1.0},
        _adamw,
    ),
    Recipe(
        "adamw-one-lr",
        "AdamW with one learning rate for all and no clipping: the papers' baseline",
        "Zhao et al. 2024 (GaLore), no clipping, no decay; rate: benchmarks/learning_rates",
        {
            "lr": 3e-3,
            "weight_decay": 0.0,
            "beta1": 0.9,
            "beta2": 0.999,
            "clip_norm": 0.0,
        },
        _adamw_one_lr,
    ),
    Recipe(
        "sgd",
        "plain SGD with clipping: the floor in memory",
        "a round value, not tuned",
        {"lr": 0.5, "weight_decay": 0.0, "clip_norm": 1.0},
        _sgd,
    ),
)

RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _TABLE})
