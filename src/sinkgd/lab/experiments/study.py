"""What a study is: a question, arms that differ in one thing, and a judge of the numbers.

A study is plain data. It names recipes and presets; it builds nothing. Every arm that is tuned is
tuned with equally many points, or there is no study.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from sinkgd.lab.train.config import ConfigError, RunConfig, SharedConfig, nearest

if TYPE_CHECKING:
    from sinkgd.lab.experiments.charts import Identities
    from sinkgd.lab.experiments.results import StudyResults
    from sinkgd.lab.experiments.verdict import Verdict
    from sinkgd.lab.report.charts import Chart

Scale = Literal["machine", "paper"]
Overrides = Mapping[str, Any]  # dotted names of a `RunConfig`'s fields, with their values
Grid = Mapping[str, tuple[float, ...]]  # dotted names, with the values to try
Point = Mapping[str, float]  # one choice of a grid

NOTHING: Mapping[str, Any] = MappingProxyType({})


class StudyError(RuntimeError):
    """A study that cannot go on, with the run and the remedy."""


@dataclass(frozen=True)
class Arm:
    """One way to train: what sets it apart, and what is tuned in it.

    Examples:
        >>> arm = Arm("L5", {"optimizer.recipe": "sinkgd"}, {"optimizer.lr": (0.04, 0.08)})
        >>> arm.points()
        ({'optimizer.lr': 0.04}, {'optimizer.lr': 0.08})
    """

    name: str  # unique in the study; also a part of folder names
    overrides: Overrides
    tuned: Grid = field(default_factory=dict)  # the product is searched; empty: nothing is tuned
    value: float | None = None  # place on the study's axis
    control: bool = False  # another arms are compared with
    series: str = ""  # what joins arms along the axis; by default the recipe

    @property
    def recipe(self) -> str:
        """Name of the optimizer's recipe."""
        return str(self.overrides["optimizer.recipe"])

    def points(self) -> tuple[dict[str, float], ...]:
        """List the points of the grid; none where nothing is tuned."""
        if not self.tuned:
            return ()
        return tuple(
            dict(zip(self.tuned, values, strict=True)) for values in product(*self.tuned.values())
        )

    def config(self, shared: SharedConfig, point: Point, seed: int) -> RunConfig:
        """Return the configuration of a run, not resolved.

        Args:
            shared: What all arms have in common.
            point: Values of tuned fields; they win over ``overrides``.
            seed: Of the weights and of the order of the text.

        Raises:
            ConfigError: If a name is no field of a configuration.
        """
        whole = RunConfig(**vars(shared))
        return override(whole, {**self.overrides, **point, "training.seed": seed})


@dataclass(frozen=True)
class Axis:
    """What the arms of a study differ in, where that is a number."""

    option: str  # of `sinkgd experiment`, e.g. "iterations"
    title: str  # of the chart's axis
    log: bool = False


@dataclass(frozen=True)
class Setting:
    """A study at one scale."""

    shared: SharedConfig
    arms: tuple[Arm, ...]  # in the order of the page; controls among them
    # The arms at a place on the axis, for a shared configuration. Where it is given, options may
    # change both; ``arms`` are then made anew.
    at: Callable[[float, SharedConfig], tuple[Arm, ...]] | None = None
    seeds: int = 3
    models: Mapping[str, SharedConfig] = field(default_factory=dict)  # what is shared, by preset

    def of_model(self, preset: str) -> SharedConfig:
        """Return what all arms share where the model is ``preset``; batch and steps follow it."""
        return self.models.get(preset, self.shared)


@dataclass(frozen=True)
class Study:
    """A question that runs can answer.

    Raises:
        ConfigError: If two arms share a name, or tuned arms have grids of unequal size.
    """

    name: str
    question: str  # a sentence that ends in a question mark
    background: str  # where the question comes from, with the published figures
    settings: Mapping[Scale, Setting]
    judge: "Callable[[StudyResults], Verdict]"
    axis: Axis | None = None
    charts: "Callable[[StudyResults, Identities], list[Chart]] | None" = None  # the question's own

    def __post_init__(self) -> None:
        for setting in self.settings.values():
            check_arms(self.name, setting.arms)


def check_arms(study: str, arms: tuple[Arm, ...]) -> None:
    """Refuse arms that cannot be told apart, or of which some are tuned harder than others.

    Raises:
        ConfigError: With the names of the arms.
    """
    names = [arm.name for arm in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"study {study!r} has more than one arm called {', '.join(twice)}")
    efforts = {arm.name: len(arm.points()) for arm in arms if arm.tuned}
    if len(set(efforts.values())) > 1:
        listed = ", ".join(f"{name} {effort}" for name, effort in efforts.items())
        raise ConfigError(
            f"the arms of study {study!r} are not tuned alike: points of their grids are {listed}; "
            "give each as many"
        )


def override(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return ``config`` with fields replaced by their dotted names.

    Raises:
        ConfigError: If there is no such field; the nearest name is given.

    Examples:
        >>> override(RunConfig(), {"training.steps": 7}).training.steps
        7
    """
    known = {
        f"{table}.{name}": table
        for table, content in vars(config).items()
        for name in vars(content)
    }
    for name, value in values.items():
        if name not in known:
            raise ConfigError(
                f"a study overrides {name!r}, which is no option of a run; "
                f"did you mean {nearest(name, known)!r}?"
            )
        table = getattr(config, known[name])
        changed = replace(table, **{name.partition(".")[2]: value})
        config = replace(config, **{known[name]: changed})
    return config


def point_name(point: Point) -> str:
    """Write a point for a folder's name.

    >>> point_name({"optimizer.lr": 0.02, "optimizer.matrix_lr": 0.001})
    'lr0.02-matrix_lr0.001'
    """
    return "-".join(f"{name.rpartition('.')[2]}{value:g}" for name, value in point.items())


def point_words(point: Point) -> str:
    """Write a point for a reader.

    >>> point_words({"optimizer.lr": 0.02, "optimizer.matrix_lr": 1e-05})
    'lr 0.02, matrix_lr 1e-05'
    """
    return ", ".join(f"{name.rpartition('.')[2]} {value:g}" for name, value in point.items())


def edges(arm: Arm, chosen: Point) -> list[str]:
    """Name the fields whose best value is the first or last that was tried, of at least three.

    Of two values either is at an edge, which says nothing.

    Examples:
        >>> arm = Arm("a", {}, {"optimizer.lr": (0.1, 0.2, 0.4)})
        >>> edges(arm, {"optimizer.lr": 0.4}), edges(arm, {"optimizer.lr": 0.2})
        (['optimizer.lr = 0.4'], [])
    """
    found = []
    for name, values in arm.tuned.items():
        value = chosen.get(name, math.nan)
        if len(values) > 2 and value in (min(values), max(values)):
            found.append(f"{name} = {value:g}")
    return found
