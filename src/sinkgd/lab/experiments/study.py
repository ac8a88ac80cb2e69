"""Studies, and their plans, which name all runs and resolve the configuration of each.

A study asks a question. It compares ways to train, the arms. Those that are tuned start with
equally large grids; if some arms take their values from others, this holds only among the arms at
one position of the axis. All arms run with the same seeds, or with the first few of them. A
function, the study's judge, turns the results into a verdict.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from sinkgd.lab.experiments.arms import (
    EMPTY,
    Arm,
    Point,
    arm_as_json,
    arm_from_json,
    check_arms,
    point_name,
)
from sinkgd.lab.experiments.study_results import StudyResults
from sinkgd.lab.experiments.study_verdict import Verdict
from sinkgd.lab.report.figures import Chart, Identities
from sinkgd.lab.train.config import CHANGEABLE_TABLES, ConfigError, RunConfig, SharedConfig
from sinkgd.lab.train.resolve import resolve

Scale = Literal["machine", "paper"]

TUNING_SEED = 1000  # must differ from the reported seeds, which count up from training.seed


class StudyError(RuntimeError):
    """A study cannot continue; the message names the run and the remedy."""


@dataclass(frozen=True)
class Axis:
    """The number in which the arms of a study differ."""

    option: str  # e.g. "iterations"; an option of `sinkgd experiment` if the setting has ``at``
    title: str  # title of the chart's axis
    log: bool = False


@dataclass(frozen=True)
class Setting:
    """A study at one scale."""

    shared: SharedConfig
    arms: tuple[Arm, ...]  # including controls, in the order of the page
    # Makes the arms at a position on the axis, for a shared configuration. If it is given, the user
    # can choose other positions, and the arms with a position are always made by it.
    at: Callable[[float, SharedConfig], tuple[Arm, ...]] | None = None
    seeds: int = 3
    # For each preset, the shared options that replace ``shared``.
    models: Mapping[str, SharedConfig] = field(default_factory=dict)

    def of_model(self, preset: str | None) -> SharedConfig:
        """Return the shared options for the model ``preset``, including its batch and steps.

        They are ``shared`` unless ``models`` has the preset.
        """
        return self.shared if preset is None else self.models.get(preset, self.shared)


@dataclass(frozen=True)
class Study:
    """A question that runs can answer, and how to answer it.

    Raises:
        ConfigError: If two arms share a name, or arms are not tuned alike; see `check_arms`.
    """

    name: str
    question: str  # a sentence that ends in a question mark
    background: str  # the origin of the question, with the published figures
    settings: Mapping[Scale, Setting]
    judge: Callable[[StudyResults], Verdict]
    axis: Axis | None = None
    # Makes charts besides those that every study has.
    charts: Callable[[StudyResults, Identities], list[Chart]] | None = None

    def __post_init__(self) -> None:
        for setting in self.settings.values():
            check_arms(self.name, setting.arms)


@dataclass(frozen=True)
class Task:
    """One training of a study."""

    name: str  # also the name of its folder
    arm: Arm
    point: Point
    seed: int
    tuning: bool  # whether the run belongs to a grid; its loss is then shown only with the grid


@dataclass(frozen=True)
class StudyPlan:
    """All runs of a study."""

    study: str
    scale: Scale
    shared: SharedConfig
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    tune: bool
    tuning_seed: int = TUNING_SEED

    def tuning_tasks(self, arm: Arm, best: Point = EMPTY) -> list[Task]:
        """List the runs of an arm's grid, without those that widening adds.

        Args:
            arm: The arm.
            best: The best point of the arm from which ``arm`` takes its values, if there is one.
        """
        if not self.tune:
            return []
        points = arm.points() if arm.carried is None else arm.carried.points(best)
        return [self.tuning_task(arm, point) for point in points[: arm.efforts]]

    def tuning_task(self, arm: Arm, point: Point) -> Task:
        """Return the run at a point of an arm's grid."""
        name = f"{arm.name}-tune-{point_name(point)}"
        return Task(name, arm, point, self.tuning_seed, tuning=True)

    def seed_task(self, arm: Arm, point: Point, seed: int) -> Task:
        """Return the reported run of a seed, at the point that tuning chose."""
        return Task(f"{arm.name}-seed{seed}", arm, point, seed, tuning=False)

    def config(self, task: Task) -> RunConfig:
        """Return a run's resolved configuration.

        Raises:
            ConfigError: If a value is impossible.
        """
        return resolve(task.arm.config(self.shared, task.point, task.seed))

    @property
    def runs(self) -> int:
        """Number of all runs, without those that widened grids may add."""
        return sum(self.runs_of(arm) for arm in self.arms)

    @property
    def runs_in_words(self) -> str:
        """Number of all runs, e.g. "at least 12 runs" if grids are widened."""
        least = "at least " if self.tune and any(arm.widened for arm in self.arms) else ""
        return f"{least}{self.runs} runs"

    def runs_of(self, arm: Arm) -> int:
        """Return the number of an arm's runs, without those that a widened grid may add."""
        return (arm.efforts if self.tune else 0) + len(self.seeds_of(arm))

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        """Return the reported seeds of an arm."""
        return self.seeds[: arm.seeds]

    def is_tuned(self, arm: Arm) -> bool:
        """Whether the arm has a grid of its own, which is searched."""
        return self.tune and bool(arm.tuned)

    def check(self) -> None:
        """Check all arms and resolve their configurations, so that errors appear before the runs.

        Raises:
            ConfigError: If there is nothing to run, `check_arms` refuses the arms, the tuning seed
                is also reported, or an option is impossible.
        """
        if not self.arms:
            raise ConfigError(f"study {self.study!r} has no arms left; choose another --optimizer")
        untuned = tuple(replace(arm, tuned=EMPTY, carried=None) for arm in self.arms)
        check_arms(self.study, self.arms if self.tune else untuned)
        if self.tuning_seed in self.seeds:
            raise ConfigError(
                f"seed {self.tuning_seed} is used for tuning and cannot also be reported; "
                "use another --training.seed"
            )
        for arm in self.arms:
            grid = self.tuning_tasks(arm) if self.is_tuned(arm) else []
            for task in grid or [self.seed_task(arm, EMPTY, self.seeds[0])]:
                self.config(task)

    def first_tasks(self) -> list[Task]:
        """List one run per arm: the first of its grid, or of its seeds if it is not tuned."""
        return [
            self.tuning_tasks(arm)[0]
            if self.is_tuned(arm)
            else self.seed_task(arm, EMPTY, self.seeds[0])
            for arm in self.arms
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the plan as plain values, for the study's file and for `check_same_plan`."""
        return {
            "study": self.study,
            "scale": self.scale,
            "seeds": list(self.seeds),
            "tune": self.tune,
            "tuning_seed": self.tuning_seed,
            "shared": asdict(self.shared),
            "arms": {arm.name: arm_as_json(arm) for arm in self.arms},
        }


def plan_of(study: Study, scale: Scale, **options: Any) -> StudyPlan:
    """Return the default plan of a study; ``options`` replace its fields."""
    setting = study.settings[scale]
    first = setting.shared.training.seed
    defaults: dict[str, Any] = {
        "shared": setting.shared,
        "arms": setting.arms,
        "seeds": tuple(range(first, first + setting.seeds)),
        "tune": True,
    }
    return StudyPlan(study=study.name, scale=scale, **{**defaults, **options})


def check_same_plan(saved: Mapping[str, Any], plan: Mapping[str, Any], where: str) -> None:
    """Check that a study is continued with the options that it began with.

    Only options of the mesh, of checkpoints and of logging may change, and arms may be added. An
    option that the saved plan lacks, because it was added later, had its default.

    Args:
        saved: The plan in the study's file, a result of `StudyPlan.as_json`.
        plan: The plan that is asked for now, in the same form.
        where: The study's folder.

    Raises:
        ConfigError: If the options differ; the message gives each field that differs, with both
            values.
    """
    known = {name: arm for name, arm in plan["arms"].items() if name in saved["arms"]}
    before, now = dict(_flat(_with_defaults(saved))), dict(_flat({**plan, "arms": known}))
    names = [
        name
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name) and not _may_change(name)
    ]
    if names:
        listed = "; ".join(
            f"{name.removeprefix('shared.')} was {before.get(name, 'absent')!r} and is now "
            f"{now.get(name, 'absent')!r}"
            for name in names
        )
        raise ConfigError(
            f"the study in {where} has other options: {listed}. "
            "Give the same options, or another --out"
        )


def _with_defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved plan with the defaults of options that it lacks."""
    shared = {
        table: {**options, **saved["shared"].get(table, {})}
        for table, options in asdict(SharedConfig()).items()
    }
    arms = {name: arm_as_json(arm_from_json(name, arm)) for name, arm in saved["arms"].items()}
    return {**saved, "shared": {**saved["shared"], **shared}, "arms": arms}


def added_arms(saved: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    """Return the names of the arms that only the second of two plans has."""
    return [name for name in plan["arms"] if name not in saved["arms"]]


def _may_change(name: str) -> bool:
    return any(name.startswith(f"shared.{table}.") for table in CHANGEABLE_TABLES)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
