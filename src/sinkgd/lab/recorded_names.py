"""Translates names of recipes in files that were recorded before the recipes were renamed.

Files without a field ``naming`` have naming 1: ``sinkgd`` was SinkGD as in the paper, and SinkGD
with deflation was ``deflated``. In naming 2, ``sinkgd`` is ``SinkGD(param_groups(model))``, with
deflation, and the paper's method is ``sinkgd-paper``. All code that reads a record translates its
names with this module.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

NAMING = 2  # the naming of files that are written now

_RECIPES: Mapping[str, str] = {"sinkgd": "sinkgd-paper", "deflated": "sinkgd"}
# Names that no recipe has any more, each with its present name.
GONE: Mapping[str, str] = {"deflated": "sinkgd"}

# Names of arms and runs begin with a recipe. An exception is the study `alpha` of naming 1, where
# arms and runs of ``sinkgd`` have names without a recipe.
_PREFIXES = (
    (re.compile(r"^deflated(?=-|$)"), "sinkgd"),
    (re.compile(r"^sinkgd(?=-(batch|seed|tune)|$)"), "sinkgd-paper"),
    (re.compile(r"^(?=alpha[\d.])"), "sinkgd-paper-"),
)
_LISTS = ("--optimizer", "--optimizers", "--baseline", "--optimizer.recipe")


def recipe_now(recipe: str, naming: int) -> str:
    """Return the present name of a recorded recipe.

    Args:
        recipe: Recorded name.
        naming: Naming of the record.
    """
    return _RECIPES.get(recipe, recipe) if naming < NAMING else recipe


def name_now(name: str, naming: int) -> str:
    """Return the present name of a recorded arm or run."""
    if naming < NAMING:
        for pattern, now in _PREFIXES:
            if pattern.search(name):
                return pattern.sub(now, name)
    return name


def command_now(command: str, naming: int, recipe: str | None = None) -> str:
    """Return the command that does now what a recorded command did.

    Args:
        command: Recorded command.
        naming: Naming of the record.
        recipe: Present name of a single run's recipe, to add if the command names none.
    """
    if naming >= NAMING:
        return command
    words = shlex.split(command)
    found = [i for i, word in enumerate(words[:-1], start=1) if word in _LISTS]
    for i in found:
        words[i] = ",".join(recipe_now(name, naming) for name in words[i].split(","))
    if recipe is not None and "--optimizer.recipe" not in words:
        words += ["--optimizer.recipe", recipe]
    for i, word in enumerate(words[:-1], start=1):
        if word == "--out":
            path = PurePosixPath(words[i])
            words[i] = str(path.with_name(name_now(path.name, naming))) if path.name else words[i]
    return shlex.join(words)


def start_now(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a run's first record with present names."""
    naming = int(fields.get("naming", 1))
    if naming >= NAMING:
        return dict(fields)
    recipe = recipe_now(fields["recipe"], naming)
    now = {**fields, "naming": NAMING, "recipe": recipe, "name": name_now(fields["name"], naming)}
    config = fields["config"]
    if "recipe" in config.get("optimizer", {}):
        now["config"] = {**config, "optimizer": {**config["optimizer"], "recipe": recipe}}
    is_training = fields["command"].startswith("sinkgd train")
    now["command"] = command_now(fields["command"], naming, recipe if is_training else None)
    return now


def plan_now(plan: Mapping[str, Any], naming: int) -> dict[str, Any]:
    """Return a study's plan with present names."""
    if naming >= NAMING:
        return dict(plan)
    return {
        **plan,
        "arms": {name_now(name, naming): _arm_now(arm) for name, arm in plan["arms"].items()},
    }


def _arm_now(arm: Mapping[str, Any]) -> dict[str, Any]:
    overrides = dict(arm["overrides"])
    if "optimizer.recipe" in overrides:
        overrides["optimizer.recipe"] = recipe_now(overrides["optimizer.recipe"], 1)
    series = arm.get("series", "")
    return {**arm, "overrides": overrides, "series": name_now(series, 1) if series else series}
