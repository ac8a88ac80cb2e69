"""A study made ready: every run of it, named and resolved, before the first of them begins."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from sinkgd.lab.experiments.study import NOTHING, Arm, Point, Scale, Study, check_arms, point_name
from sinkgd.lab.train.config import CHANGEABLE_TABLES, ConfigError, RunConfig, SharedConfig
from sinkgd.lab.train.resolve import resolve

TUNING_SEED = 1000  # apart from the seeds that are reported, which go up from training.seed


@dataclass(frozen=True)
class Task:
    """One training of a study."""

    name: str  # of its folder
    arm: Arm
    point: Point
    seed: int
    tuning: bool  # whether it looks for rates; its loss is reported in the grid alone


@dataclass(frozen=True)
class StudyPlan:
    """What is to be run."""

    study: str
    scale: Scale
    shared: SharedConfig
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    tune: bool
    tuning_seed: int = TUNING_SEED

    def tuning_tasks(self, arm: Arm) -> list[Task]:
        """List the runs of an arm's grid."""
        return [self.tuning_task(arm, point) for point in self._grid(arm)]

    def tuning_task(self, arm: Arm, point: Point) -> Task:
        """Return the run at a point of an arm's grid."""
        name = f"{arm.name}-tune-{point_name(point)}"
        return Task(name, arm, point, self.tuning_seed, tuning=True)

    def seed_task(self, arm: Arm, point: Point, seed: int) -> Task:
        """Return a reported run, at the point that tuning chose."""
        return Task(f"{arm.name}-seed{seed}", arm, point, seed, tuning=False)

    def config(self, task: Task) -> RunConfig:
        """Return a run's resolved configuration.

        Raises:
            ConfigError: If a value cannot be.
        """
        return resolve(task.arm.config(self.shared, task.point, task.seed))

    @property
    def runs(self) -> int:
        """Return how many trainings there are in all."""
        return sum(len(self._grid(arm)) + len(self.seeds) for arm in self.arms)

    def is_tuned(self, arm: Arm) -> bool:
        """Whether a grid is searched for this arm."""
        return self.tune and bool(arm.tuned)

    def _grid(self, arm: Arm) -> tuple[dict[str, float], ...]:
        return arm.points() if self.tune else ()

    def check(self) -> None:
        """Resolve every configuration, so that nothing fails after hours that could fail now.

        Raises:
            ConfigError: If there is nothing to run or an option cannot be.
        """
        if not self.arms:
            raise ConfigError(f"study {self.study!r} has no arms left; name other --optimizer")
        untuned = tuple(replace(arm, tuned=NOTHING) for arm in self.arms)
        check_arms(self.study, self.arms if self.tune else untuned)
        if self.tuning_seed in self.seeds:
            raise ConfigError(
                f"seed {self.tuning_seed} is that of tuning and cannot be reported, too; "
                "use another --training.seed"
            )
        for arm in self.arms:
            for task in self.tuning_tasks(arm) or [self.seed_task(arm, NOTHING, self.seeds[0])]:
                self.config(task)

    def first_tasks(self) -> list[Task]:
        """List one run of every arm: at the first point of its grid, or at the arm's own."""
        return [
            (self.tuning_tasks(arm) or [self.seed_task(arm, NOTHING, self.seeds[0])])[0]
            for arm in self.arms
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the plan as plain values, as it is written and compared."""
        return {
            "study": self.study,
            "scale": self.scale,
            "seeds": list(self.seeds),
            "tune": self.tune,
            "tuning_seed": self.tuning_seed,
            "shared": asdict(self.shared),
            "arms": {arm.name: _arm_as_json(arm) for arm in self.arms},
        }


def plan_of(study: Study, scale: Scale, **options: Any) -> StudyPlan:
    """Return the plan of a study where no option changes it; ``options`` replace its parts."""
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
    """Refuse to go on with a study that was begun with other options.

    Args:
        saved: From the study's file, as of `StudyPlan.as_json`.
        plan: What is asked for now, of the same form.
        where: The study's folder.

    Raises:
        ConfigError: With each field that differs, and both its values.
    """
    before, now = dict(_flat(saved)), dict(_flat(plan))
    names = [
        name
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name) and not _may_change(name)
    ]
    if names:
        listed = "; ".join(
            f"{name} was {before.get(name, 'absent')!r} and is now {now.get(name, 'absent')!r}"
            for name in names
        )
        raise ConfigError(
            f"the study in {where} has other options: {listed}. "
            "Give the same ones, or another --out"
        )


def _may_change(name: str) -> bool:
    return any(name.startswith(f"shared.{table}.") for table in CHANGEABLE_TABLES)


def _arm_as_json(arm: Arm) -> dict[str, Any]:
    return {
        "overrides": dict(arm.overrides),
        "tuned": {name: list(values) for name, values in arm.tuned.items()},
        "value": arm.value,
        "control": arm.control,
        "series": arm.series,
    }


def arm_from_json(name: str, content: Mapping[str, Any]) -> Arm:
    """Return an arm that `StudyPlan.as_json` wrote."""
    tuned = {field: tuple(values) for field, values in content["tuned"].items()}
    return Arm(
        name,
        content["overrides"],
        tuned,
        content["value"],
        content["control"],
        content.get("series", ""),
    )


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
