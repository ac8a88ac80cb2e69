"""The whole of `sinkgd bench memory`: every optimizer, and every training step, by itself."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sinkgd.lab.bench.contenders import contenders
from sinkgd.lab.bench.memory.measure import Subject, measure_in_fresh_process
from sinkgd.lab.bench.memory.records import (
    MemoryRecord,
    MemoryUse,
    NotMeasured,
    TrainingMemory,
    TrainingNotMeasured,
    TrainingUse,
)
from sinkgd.lab.bench.memory.training_case import Case, StepSettings, why_no_room
from sinkgd.lab.bench.memory.training_peak import measure_in_fresh_processes
from sinkgd.lab.bench.progress import Progress
from sinkgd.lab.bench.workloads import WORKLOADS
from sinkgd.lab.models import preset_config
from sinkgd.lab.train.environment import describe_environment
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


@dataclass(frozen=True)
class MemoryPlan:
    """What to measure: optimizers on matrices alone, and training steps."""

    workloads: tuple[str, ...]  # names in WORKLOADS
    dtypes: tuple[str, ...]  # names in DTYPES
    contenders: tuple[str, ...]  # names; all where empty
    device: torch.device
    command: str  # that repeats it
    training: TrainingPlan | None = None


def bench_memory(plan: MemoryPlan) -> MemoryRecord:
    """Measure what the plan says."""
    environment = describe_environment(plan.device)
    uses, absent = _bench_optimizers(plan)
    training = None if plan.training is None else bench_training(plan.training)
    return MemoryRecord(plan.command, environment, tuple(uses), tuple(absent), training)


def _bench_optimizers(plan: MemoryPlan) -> tuple[list[MemoryUse], list[NotMeasured]]:
    subjects = list(_subjects(plan))
    progress = Progress(len(subjects))
    uses: list[MemoryUse] = []
    absent: list[NotMeasured] = []
    for subject in subjects:
        progress.stage(f"{subject.workload} {subject.dtype} {subject.contender}", 1)
        found = measure_in_fresh_process(subject)
        if isinstance(found, MemoryUse):
            uses.append(found)
        else:
            row = NotMeasured(subject.contender, subject.workload, subject.dtype, found)
            absent.append(row)
    progress.end()
    return uses, absent


def _subjects(plan: MemoryPlan) -> list[Subject]:
    threads = torch.get_num_threads()
    return [
        Subject(contender.name, name, dtype, str(plan.device), threads)
        for name in plan.workloads
        for dtype in plan.dtypes
        if dtype in WORKLOADS[name].dtypes
        for contender in contenders(WORKLOADS[name], plan.device)
        if not plan.contenders or contender.name in plan.contenders
    ]
