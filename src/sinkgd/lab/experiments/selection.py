"""Select and change a study's arms by the options of `sinkgd experiment`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from sinkgd.lab.experiments.arms import Arm
from sinkgd.lab.experiments.study import Scale, Setting, Study
from sinkgd.lab.options import LARGEST_COUNT, suggest
from sinkgd.lab.recorded_names import GONE
from sinkgd.lab.train.config import ConfigError, SharedConfig, differences
from sinkgd.lab.train.recipes import find_recipe

LR, MATRIX_LR = "optimizer.lr", "optimizer.matrix_lr"
# For each option --optimizer.NAME, fields of the configuration. The option changes the arm that
# --step names: it sets the first of the fields that the arm's recipe has.
STEP_OPTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"tau": ("tau",), "iterations": ("n_iter", "sinkhorn_iterations"), "lr": ("lr",)}
)


_COUNTS = ("iterations", "batch")  # options whose values are whole numbers


def select_arms(
    study: Study,
    scale: Scale,
    shared: SharedConfig,
    *,
    axis: Mapping[str, Sequence[float]],
    rates: Sequence[float] = (),
    recipes: Sequence[str] = (),
) -> tuple[Arm, ...]:
    """Return a study's arms, changed by options.

    Args:
        study: The study.
        scale: The scale to run it at.
        shared: The configuration from the options.
        axis: For each option, positions that replace those on the study's axis; may be empty.
        rates: Values to try for ``optimizer.lr``; an arm that does not tune this rate takes only
            one. Where the study fixes both rates, ``optimizer.matrix_lr`` keeps its ratio to
            ``optimizer.lr``. Widened grids are widened only in other options, and only if a single
            value is given.
        recipes: If given, keep only the arms with these recipes. A name that is not an arm's recipe
            selects the arm with this name.

    Raises:
        ConfigError: If an option does not fit the study.
    """
    setting = study.settings[scale]
    places = _places(study, setting, axis)
    arms = _arms_at(places, setting, shared)
    _check_effective(arms, places, setting, shared)
    if rates:
        arms = tuple(_with_rates(arm, tuple(rates)) for arm in arms)
    if recipes:
        arms = _only(arms, recipes)
    return arms


def select_step(
    arms: Sequence[Arm], step: str | None, options: Mapping[str, float]
) -> tuple[Arm, ...]:
    """Keep one arm and the controls, and change the arm's options.

    Args:
        arms: The study's arms.
        step: The arm's name; None keeps all arms.
        options: New values for the arm, with keys of `STEP_OPTIONS`.

    Raises:
        ConfigError: If there is no such arm, if its recipe lacks one of the options, or if options
            are given without a step.
    """
    if step is None:
        if options:
            name = next(iter(options))
            raise ConfigError(f"--optimizer.{name} changes one arm of the study; name it by --step")
        return tuple(arms)
    by_name = {arm.name: arm for arm in arms}
    if step not in by_name:
        raise ConfigError(f"step is {step!r}; {suggest(step, by_name)}")
    changed = _with_options(by_name[step], options)
    return tuple(
        changed if arm.name == step else arm for arm in arms if arm.control or arm.name == step
    )


def _with_options(arm: Arm, options: Mapping[str, float]) -> Arm:
    known = find_recipe(arm.recipe).defaults
    overrides, tuned = dict(arm.overrides), dict(arm.tuned)
    for name, value in options.items():
        fields = [field for field in STEP_OPTIONS[name] if field in known]
        if not fields:
            raise ConfigError(
                f"optimizer.{name} is {value:g}, but arm {arm.name!r} trains with {arm.recipe!r}, "
                f"which has no such option; it has {', '.join(known)}"
            )
        overrides[f"optimizer.{fields[0]}"] = value
        tuned.pop(f"optimizer.{fields[0]}", None)
    return replace(arm, overrides=overrides, tuned=tuned)


def numbers(option: str, text: str | None) -> tuple[float, ...]:
    """Parse comma-separated numbers; None gives no numbers.

    Raises:
        ConfigError: If there is no value, if a value is not a number, is not above 0 or is too
            large, or if the option takes whole numbers and a value is not one.

    Examples:
        >>> numbers("lr", "0.01,0.02")
        (0.01, 0.02)
    """
    if text is None:
        return ()
    try:
        values = tuple(float(word) for word in text.split(",") if word.strip())
    except ValueError:
        values = ()
    counts = option in _COUNTS
    kind = "whole numbers" if counts else "numbers"
    if not values or not all(0 < value <= LARGEST_COUNT for value in values):
        raise ConfigError(
            f"{option} is {text!r}; give {kind} above 0 and up to {LARGEST_COUNT}, with commas "
            "between them"
        )
    if counts and not all(value.is_integer() for value in values):
        raise ConfigError(f"{option} is {text!r}; give {kind}, with commas between them")
    return values


def _places(study: Study, setting: Setting, axis: Mapping[str, Sequence[float]]) -> Sequence[float]:
    """Return the requested positions on the axis, or the study's own."""
    asked = {option: values for option, values in axis.items() if values}
    for option in asked:
        if study.axis is None or study.axis.option != option or setting.at is None:
            has = "it has no axis of numbers"
            if study.axis is not None:
                fixed = setting.at is None
                has = "its positions are fixed" if fixed else f"its axis is --{study.axis.option}"
            raise ConfigError(f"study {study.name!r} does not take --{option}; {has}")
    own = dict.fromkeys(arm.value for arm in setting.arms if arm.value is not None)
    return next(iter(asked.values()), list(own))


def _arms_at(places: Sequence[float], setting: Setting, shared: SharedConfig) -> tuple[Arm, ...]:
    """Return the arms at positions on the axis, and those without a position."""
    if setting.at is None:
        return setting.arms
    off_axis = (arm for arm in setting.arms if arm.value is None)
    return (*(arm for place in places for arm in setting.at(place, shared)), *off_axis)


def _check_effective(
    arms: tuple[Arm, ...], places: Sequence[float], setting: Setting, shared: SharedConfig
) -> None:
    """Check that no arm overrides an option of the user, which would then have no effect.

    The option has an effect if other values of it make other arms.
    """
    usual = setting.of_model(shared.model.preset)
    for name, old, value in differences(usual, shared):
        owners = [arm.name for arm in arms if name in arm.overrides]
        if owners and arms == _arms_at(places, setting, _with_option(shared, name, old)):
            raise ConfigError(
                f"{name} is {value!r}, but the study sets it for {', '.join(owners)}; leave out "
                "the option"
            )


def _with_option(shared: SharedConfig, name: str, value: Any) -> SharedConfig:
    table, _, key = name.partition(".")
    return replace(shared, **{table: replace(getattr(shared, table), **{key: value})})


def _with_rates(arm: Arm, rates: tuple[float, ...]) -> Arm:
    overrides: dict[str, Any] = dict(arm.overrides)
    if LR in arm.tuned:
        if len(rates) == 1:
            overrides[LR] = rates[0]
            if arm.widened and len(arm.tuned) > 1:  # the search for the other rates goes on
                others = {name: values for name, values in arm.tuned.items() if name != LR}
                return replace(arm, overrides=overrides, tuned=others)
        return replace(arm, overrides=overrides, tuned={**arm.tuned, LR: rates}, widened=False)
    if len(rates) > 1:
        raise ConfigError(
            f"lr is {', '.join(f'{rate:g}' for rate in rates)}, but arm {arm.name!r} does not tune "
            "it; give one rate"
        )
    if LR in overrides and MATRIX_LR in overrides:
        overrides[MATRIX_LR] *= rates[0] / overrides[LR]
    return replace(arm, overrides={**overrides, LR: rates[0]})


def _only(arms: tuple[Arm, ...], recipes: Sequence[str]) -> tuple[Arm, ...]:
    by_recipe = {arm.recipe for arm in arms}
    known = dict.fromkeys(name for arm in arms for name in (arm.recipe, arm.name))
    for recipe in recipes:
        if recipe in GONE:
            raise ConfigError(f"optimizer is {recipe!r}; it is called {GONE[recipe]!r} now")
        if recipe not in known:
            raise ConfigError(
                f"optimizer is {recipe!r}, which no arm of the study has; {suggest(recipe, known)}"
            )
    one = set(recipes) - by_recipe
    return tuple(arm for arm in arms if arm.recipe in recipes or arm.name in one)
