"""The table of all recipes, and building an optimizer from options.

A recipe's ``defaults`` list the options that it takes; any other option is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sinkgd.lab.options import how_to_install, suggest
from sinkgd.lab.recorded_names import GONE
from sinkgd.lab.train.config import ConfigError, OptimizerConfig
from sinkgd.lab.train.recipes.baseline_recipes import FROM_PAPERS, FROM_TORCH
from sinkgd.lab.train.recipes.recipe import Recipe
from sinkgd.lab.train.recipes.sinkgd_recipes import FAMILY
from sinkgd.optim.transforms.momentum import BITS

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {recipe.name: recipe for recipe in (*FAMILY, *FROM_TORCH, *FROM_PAPERS)}
)


def resolve_optimizer(options: OptimizerConfig) -> OptimizerConfig:
    """Fill in the recipe's defaults and check every option.

    Raises:
        ConfigError: If there is no such recipe, the recipe's package is not installed, the recipe
            does not take an option that was given, or an option is out of range or has no effect.
    """
    recipe = find_recipe(options.recipe)
    if recipe.package is not None and find_spec(recipe.package) is None:
        raise ConfigError(
            f"optimizer.recipe is {recipe.name!r}, which needs the package {recipe.package}; "
            f"{how_to_install('experiments')}"
        )
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
        ConfigError: If there is no such recipe; the message gives the new name of a renamed recipe,
            or else the names that exist.
    """
    if name in GONE:
        raise ConfigError(f"optimizer.recipe is {name!r}; it is called {GONE[name]!r} now")
    if name not in RECIPES:
        raise ConfigError(f"optimizer.recipe is {name!r}; {suggest(name, RECIPES)}")
    return RECIPES[name]


def build_optimizer(model: nn.Module, options: OptimizerConfig) -> Optimizer:
    """Build the optimizer of ``model`` from resolved options.

    Each group also stores its peak learning rate as ``initial_lr``, which torch's schedulers read
    when a run is resumed.
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

    positive = ("lr", "matrix_lr", "tables_lr", "tau", "projection_scale")
    counts = (
        "sinkhorn_iterations",
        "newton_schulz_steps",
        "projection_every_steps",
        "reset_every_steps",
        "base_width",
    )
    decays = ("beta1", "beta2", "momentum", "low_rank_momentum")
    check(positive, "positive", lambda value: value > 0)
    nonnegative = (
        *("weight_decay", "clip_norm", "n_iter", "rank"),
        *("deflated_rank", "momentum_rank"),
    )
    check(nonnegative, "at least 0", lambda value: value >= 0)
    check(decays, "at least 0 and less than 1", lambda value: 0 <= value < 1)
    check(counts, "at least 1", lambda value: value >= 1)
    if options.momentum_bits is not None and options.momentum_bits not in BITS:
        raise ConfigError(
            f"optimizer.momentum_bits is {options.momentum_bits}; it must be one of {BITS}"
        )
    if options.low_rank_momentum is not None and not options.momentum_rank:
        raise ConfigError(
            f"optimizer.low_rank_momentum is {options.low_rank_momentum}, but "
            "optimizer.momentum_rank is 0, so nothing is remembered; give a momentum_rank, or "
            "leave out low_rank_momentum"
        )
    if options.deflated_start == "kept" and not options.deflated_rank:
        raise ConfigError(
            "optimizer.deflated_start is 'kept', but optimizer.deflated_rank is 0, so nothing is "
            "deflated; give a deflated_rank, or leave out deflated_start"
        )
    if options.cautious_decay and not options.weight_decay:
        raise ConfigError(
            "optimizer.cautious_decay is True, but optimizer.weight_decay is 0, so nothing decays; "
            "give a weight_decay, or leave out cautious_decay"
        )
