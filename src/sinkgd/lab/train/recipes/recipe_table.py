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

from sinkgd.contrib.tempered import TAU
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

# Options that need another one: the option, its value that needs nothing, and the other option. The
# last entry says what happens if the other option is 0.
_NEEDS = (
    ("nesterov", False, "momentum", "nothing is averaged"),
    ("momentum_place", "before", "momentum", "nothing is averaged"),
    ("momentum_bits", 32, "momentum", "nothing is averaged"),
    ("low_rank_momentum", None, "momentum_rank", "nothing is remembered"),
    ("deflated_start", "fixed", "deflated_rank", "nothing is deflated"),
    ("cautious_decay", False, "weight_decay", "nothing decays"),
    ("tau", TAU, "n_iter", "no entry is tempered"),
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

    Raises:
        ConfigError: If the library refuses options that do not go together.
    """
    recipe = find_recipe(options.recipe)
    taken = {name: getattr(options, name) for name in recipe.defaults}
    try:
        optimizer = recipe.build(model, taken)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(
            f"recipe {options.recipe!r} does not take these options: {error}"
        ) from error
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
    decays = ("beta1", "beta2", "momentum", "low_rank_momentum", "averaged_scales")
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
    _check_needs(options)


def _check_needs(options: OptimizerConfig) -> None:
    """Refuse an option that has no effect without another one."""
    for name, without_effect, needed, reason in _NEEDS:
        value = getattr(options, name)
        if value in (None, without_effect) or getattr(options, needed):
            continue
        raise ConfigError(
            f"optimizer.{name} is {value!r}, but optimizer.{needed} is 0, so {reason}; set "
            f"{needed}, or leave out {name}"
        )
