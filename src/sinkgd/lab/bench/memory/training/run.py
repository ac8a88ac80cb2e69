"""All cases, one after the other, each where there is room for it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sinkgd.lab.bench.memory.training.case import Case, StepSettings
from sinkgd.lab.bench.memory.training.measure import measure_in_fresh_processes
from sinkgd.lab.bench.memory.training.records import (
    TrainingMemory,
    TrainingNotMeasured,
    TrainingUse,
)
from sinkgd.lab.bench.memory.training.room import why_no_room
from sinkgd.lab.bench.progress import Progress
from sinkgd.lab.models import preset_config
from sinkgd.lab.train.recipes import find_recipe


@dataclass(frozen=True)
class TrainingPlan:
    """What to weigh."""

    models: tuple[str, ...]  # presets
    recipes: tuple[str, ...]
    releases: tuple[bool, ...]  # True where the recipe can
    settings: StepSettings
    device: torch.device


def bench_training(plan: TrainingPlan) -> TrainingMemory:
    """Weigh every case of the plan; one that memory has no room for is told, not begun."""
    cases = list(cases_of(plan))
    progress = Progress(sum(_weight(case) for case in cases))
    uses: list[TrainingUse] = []
    absent: list[TrainingNotMeasured] = []
    for case in cases:
        progress.stage(f"training {case.model}, {case.title}", _weight(case))
        found = why_no_room(case) or measure_in_fresh_processes(case)
        if isinstance(found, TrainingUse):
            uses.append(found)
        else:
            absent.append(TrainingNotMeasured(case.model, case.title, found))
    progress.end()
    return TrainingMemory(plan.settings, tuple(uses), tuple(absent))


def cases_of(plan: TrainingPlan) -> Iterator[Case]:
    """Yield the cases; a recipe that needs all gradients at once has none that releases them."""
    for model in plan.models:
        for recipe in plan.recipes:
            for release in plan.releases:
                if not release or find_recipe(recipe).can_release:
                    threads = torch.get_num_threads()
                    yield Case(model, recipe, release, plan.settings, str(plan.device), threads)


def _weight(case: Case) -> float:
    return preset_config(case.model).parameter_count
