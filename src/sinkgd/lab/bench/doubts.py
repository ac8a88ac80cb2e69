"""Why a measured ratio is doubtful: rounds that spread, or a loaded machine."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from sinkgd.lab.bench.quartiles import Quartiles
from sinkgd.lab.train.environment import describe_environment

LOAD = "load_per_core"  # of the environment: the load average before the first turn, per core
_WIDE = 0.2  # of the median: a wider range between the quartiles is no result
_LOADED = 0.5  # runnable processes a core


def environment_before(device: torch.device) -> dict[str, Any]:
    """Describe the machine and its load, before our own turns add to it."""
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    return {**describe_environment(device), LOAD: round(load, 2)}


def is_wide(found: Quartiles) -> bool:
    """Whether rounds differ so much that their median says little."""
    return found.upper - found.lower > _WIDE * found.median


def is_loaded(environment: Mapping[str, Any]) -> bool:
    """Whether other processes kept the machine busy when the measurement began."""
    load = environment.get(LOAD)
    return load is not None and load > _LOADED


def doubts(environment: Mapping[str, Any], wide: Mapping[str, list[str]]) -> tuple[str, ...]:
    """Say that the machine was busy, and what spreads.

    Args:
        environment: What `environment_before` returned.
        wide: What was measured, and of each the names of those whose rounds spread widely.
    """
    found = []
    if is_loaded(environment):
        found.append(
            f"The machine was busy before the first turn: a load of {environment[LOAD]:.2f} a "
            "core. Measure again when nothing else runs."
        )
    for what, names in wide.items():
        if names:
            found.append(
                f"Rounds spread widely on {what}: {', '.join(names)}. Use more --rounds, or a "
                "quieter machine."
            )
    return tuple(found)
