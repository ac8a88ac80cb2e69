"""The whole of `sinkgd bench memory`: every optimizer, and every training step, by itself."""

from dataclasses import dataclass

import torch

from sinkgd.lab.bench.contenders import contenders
from sinkgd.lab.bench.memory.measure import Subject, measure_in_fresh_process
from sinkgd.lab.bench.memory.records import MemoryRecord, MemoryUse, NotMeasured
from sinkgd.lab.bench.memory.training import TrainingPlan, bench_training
from sinkgd.lab.bench.progress import Progress
from sinkgd.lab.bench.workloads import WORKLOADS
from sinkgd.lab.train.environment import describe_environment


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
