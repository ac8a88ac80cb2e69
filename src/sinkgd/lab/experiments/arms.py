"""Arms: the ways to train that a study compares, and the grids that tune them.

An arm is plain data: the values of a configuration in which it differs from other arms, and a grid
of values to try. It names a recipe and a preset, but builds nothing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from types import MappingProxyType
from typing import Any

from sinkgd.lab.train.config import ConfigError, RunConfig, SharedConfig, nearest

Overrides = Mapping[str, Any]  # dotted names of a `RunConfig`'s fields, with their values
Grid = Mapping[str, tuple[float, ...]]  # dotted names of fields, with the values to try
Point = Mapping[str, float]  # dotted names of fields, with one value of the grid each

EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Carried:
    """The best point of another arm, from which an arm takes its values.

    A large model then needs no grid of its own: it uses the best point of a small model.
    """

    arm: str  # name of the other arm, which has a grid of its own
    # Dotted names of fields, with factors that multiply their values; other fields keep theirs.
    factors: Mapping[str, float] = field(default_factory=dict)
    # Multiples of the fields in ``factors`` to try. If there is only one, it is used without a
    # trial.
    tried: tuple[float, ...] = (1.0,)

    def points(self, best: Point) -> tuple[dict[str, float], ...]:
        """List the points to try, given the best point of the other arm.

        Examples:
            >>> Carried("small", {"optimizer.lr": 0.5}, (1, 2)).points({"optimizer.lr": 0.4})
            ({'optimizer.lr': 0.2}, {'optimizer.lr': 0.4})
        """
        return tuple(
            {
                name: value * multiple * self.factors[name] if name in self.factors else value
                for name, value in best.items()
            }
            for multiple in self.tried
        )


@dataclass(frozen=True)
class Arm:
    """One way to train: its options, and the grid of options to tune.

    Examples:
        >>> arm = Arm("L5", {"optimizer.recipe": "sinkgd"}, {"optimizer.lr": (0.04, 0.08)})
        >>> arm.points()
        ({'optimizer.lr': 0.04}, {'optimizer.lr': 0.08})
    """

    name: str  # unique in the study; part of folder names
    overrides: Overrides
    # All combinations of these values are tried; if it is empty, nothing is tuned.
    tuned: Grid = field(default_factory=dict)
    value: float | None = None  # position on the study's axis
    control: bool = False  # whether other arms are compared with this one
    series: str = ""  # arms of one series are joined along the axis; default: the recipe
    # For each field that is a multiple of a tuned one at every point: (tuned field, factor).
    multiples: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    carried: Carried | None = None  # instead of a grid
    seeds: int | None = None  # how many of the study's seeds to run; default: all
    # Whether the search goes on from the best point to its neighbors, until all neighbors of the
    # best point are tried. In the end no best value is at an edge.
    widened: bool = False

    @property
    def efforts(self) -> int:
        """Number of points to try, without those that widening adds."""
        if self.carried is not None:
            return len(self.carried.tried) if len(self.carried.tried) > 1 else 0
        return len(self.points())

    @property
    def recipe(self) -> str:
        """Name of the optimizer's recipe."""
        return str(self.overrides["optimizer.recipe"])

    def points(self) -> tuple[dict[str, float], ...]:
        """List the points of the grid; none if nothing is tuned."""
        if not self.tuned:
            return ()
        return tuple(
            self._with_multiples(dict(zip(self.tuned, values, strict=True)))
            for values in product(*self.tuned.values())
        )

    def neighbors(self, point: Point) -> tuple[dict[str, float], ...]:
        """List the points that differ from ``point`` in one tuned field, by one place in its grid.

        Beyond each end a grid goes on by the ratio of the two values there, or by 2 if it has only
        one value.

        Examples:
            >>> arm = Arm("sinkgd", {}, {"optimizer.lr": (0.1, 0.2, 0.6)})
            >>> arm.neighbors({"optimizer.lr": 0.6})
            ({'optimizer.lr': 0.2}, {'optimizer.lr': 1.8})
        """
        return tuple(
            self._with_multiples({**point, name: value})
            for name, values in self.tuned.items()
            for value in _around(values, point[name])
        )

    def config(self, shared: SharedConfig, point: Point, seed: int) -> RunConfig:
        """Return the unresolved configuration of a run.

        Args:
            shared: The options that all arms share.
            point: Values of tuned fields; they take precedence over ``overrides``.
            seed: Seed of the weights and of the order of the text.

        Raises:
            ConfigError: If a name is not a field of a configuration.
        """
        whole = RunConfig(**vars(shared))
        return override(whole, {**self.overrides, **point, "training.seed": seed})

    def _with_multiples(self, point: dict[str, float]) -> dict[str, float]:
        return point | {name: factor * point[of] for name, (of, factor) in self.multiples.items()}


def _around(values: Sequence[float], value: float) -> tuple[float, float]:
    """Return the values before and after ``value`` in a grid that goes on beyond both its ends."""
    line = sorted(values)
    down, up = (line[1] / line[0], line[-1] / line[-2]) if len(line) > 1 else (2.0, 2.0)
    while value <= line[0]:
        line.insert(0, float(f"{line[0] / down:.6g}"))
    while value >= line[-1]:
        line.append(float(f"{line[-1] * up:.6g}"))
    place = line.index(value)
    return line[place - 1], line[place + 1]


def _can_be_widened(values: Sequence[float]) -> bool:
    line = sorted(values)
    return line[0] > 0 and all(after >= 1.01 * before for before, after in pairwise(line))


def check_arms(study: str, arms: tuple[Arm, ...]) -> None:
    """Check that names of arms are unique, and that arms are tuned alike.

    All tuned arms have the same number of points. If some arms are carried, this holds only among
    the arms at one position of the axis. All tuned arms are widened, or none is. The values of a
    widened grid are above zero and at least 1 % apart. A carried arm takes its values from an arm
    with a grid.

    Raises:
        ConfigError: If names are not unique, grids differ in size or only some are widened, a grid
            cannot be widened, or a carried arm has no source; the message names the arms.
    """
    names = [arm.name for arm in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"study {study!r} has more than one arm called {', '.join(twice)}")
    with_grid = {arm.name for arm in arms if arm.tuned}
    for arm in arms:
        if arm.carried is not None and arm.carried.arm not in with_grid:
            raise ConfigError(
                f"arm {arm.name!r} of study {study!r} carries its rates over from "
                f"{arm.carried.arm!r}, which is not among the arms with a grid; keep that arm"
            )
    tuned = [arm for arm in arms if arm.tuned]
    for arm in tuned:
        for name, values in arm.tuned.items():
            if arm.widened and not _can_be_widened(values):
                raise ConfigError(
                    f"arm {arm.name!r} of study {study!r} tries {values} for {name}, which cannot "
                    "be widened; give values above 0 that are at least 1 % apart"
                )
    carries = any(arm.carried for arm in arms)
    for place in dict.fromkeys(arm.value if carries else None for arm in arms):
        efforts = {
            arm.name: arm.efforts
            for arm in arms
            if (arm.tuned or arm.carried) and (not carries or arm.value == place)
        }
        if len(set(efforts.values())) > 1:
            listed = ", ".join(f"{name} {effort}" for name, effort in efforts.items())
            raise ConfigError(
                f"the arms of study {study!r} are not tuned alike: the numbers of points in "
                f"their grids are {listed}; give each the same number of points"
            )
    if (odd := [arm.name for arm in tuned if not arm.widened]) and len(odd) < len(tuned):
        raise ConfigError(
            f"the arms of study {study!r} are not tuned alike: the grids of {', '.join(odd)} are "
            "not widened, the others are; widen all or none"
        )


def override(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return ``config`` with the fields of these dotted names replaced.

    Raises:
        ConfigError: If there is no such field; the message suggests the nearest name.

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
                f"a study overrides {name!r}, which is not an option of a run; "
                f"did you mean {nearest(name, known)!r}?"
            )
        table = getattr(config, known[name])
        changed = replace(table, **{name.partition(".")[2]: value})
        config = replace(config, **{known[name]: changed})
    return config


def point_name(point: Point) -> str:
    """Format a point for a folder's name.

    >>> point_name({"optimizer.lr": 0.02, "optimizer.matrix_lr": 0.001})
    'lr0.02-matrix_lr0.001'
    """
    return "-".join(f"{name.rpartition('.')[2]}{value:g}" for name, value in point.items())


def point_words(point: Point) -> str:
    """Format a point for a reader.

    >>> point_words({"optimizer.lr": 0.02, "optimizer.matrix_lr": 1e-05})
    'lr 0.02, matrix_lr 1e-05'
    """
    return ", ".join(f"{name.rpartition('.')[2]} {value:g}" for name, value in point.items())


def best_point(losses: Iterable[tuple[float, Point]]) -> Point | None:
    """Return the point with the lowest loss; None if no loss is finite.

    If several points have this loss, it is the first of them. A widened search therefore does not
    move on to a neighbor with an equal loss.

    Examples:
        >>> best_point([(4.0, {"lr": 0.2}), (3.9, {"lr": 0.4}), (3.9, {"lr": 0.1})])
        {'lr': 0.4}
    """
    finite = [(loss, point) for loss, point in losses if math.isfinite(loss)]
    return min(finite, key=lambda one: one[0])[1] if finite else None


def edges(tried: Grid, chosen: Point) -> list[str]:
    """Return "field = value" for each field whose best value is at an end of three or more tried.

    Fields with fewer values are left out, because their best value is always at an edge.

    Examples:
        >>> tried = {"optimizer.lr": (0.1, 0.2, 0.4)}
        >>> edges(tried, {"optimizer.lr": 0.4}), edges(tried, {"optimizer.lr": 0.2})
        (['optimizer.lr = 0.4'], [])
    """
    found = []
    for name, values in tried.items():
        value = chosen.get(name, math.nan)
        if len(values) > 2 and value in (min(values), max(values)):
            found.append(f"{name} = {value:g}")
    return found


def arm_as_json(arm: Arm) -> dict[str, Any]:
    """Return an arm as plain values, as a study's file stores it."""
    content = {
        "overrides": dict(arm.overrides),
        "tuned": {name: list(values) for name, values in arm.tuned.items()},
        "value": arm.value,
        "control": arm.control,
        "series": arm.series,
    }
    if arm.widened:
        content["widened"] = True
    if arm.multiples:
        content["multiples"] = {name: list(pair) for name, pair in arm.multiples.items()}
    if arm.carried is not None:
        content["carried"] = {
            "arm": arm.carried.arm,
            "factors": dict(arm.carried.factors),
            "tried": list(arm.carried.tried),
        }
    if arm.seeds is not None:
        content["seeds"] = arm.seeds
    return content


def arm_from_json(name: str, content: Mapping[str, Any]) -> Arm:
    """Return the arm that `arm_as_json` wrote."""
    tuned = {field: tuple(values) for field, values in content["tuned"].items()}
    carried = content.get("carried")
    return Arm(
        name,
        content["overrides"],
        tuned,
        widened=content.get("widened", False),
        value=content["value"],
        control=content["control"],
        series=content.get("series", ""),
        multiples={
            name: (of, factor) for name, (of, factor) in content.get("multiples", {}).items()
        },
        carried=carried and Carried(carried["arm"], carried["factors"], tuple(carried["tried"])),
        seeds=content.get("seeds"),
    )
