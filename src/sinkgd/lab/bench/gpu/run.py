"""The whole of `sinkgd bench gpu`: each part of the table after the other."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version

import torch

from sinkgd.lab.bench.gpu.interpreted import interpreted
from sinkgd.lab.bench.gpu.sheets import Figure, GpuRecord
from sinkgd.lab.bench.gpu.targets import (
    missed,
    of_code,
    of_host,
    of_host_time,
    of_interpreter,
    of_schedule,
)
from sinkgd.lab.bench.gpu.variants import USUAL, Variant, compiled
from sinkgd.lab.bench.interleaved import environment_with_load
from sinkgd.lab.report.console import Progress

INTERPRETER, HOST, SCHEDULE, CODE = "interpreter", "host", "schedule", "code"
# The parts, and about how many seconds each takes; kernels of one target.
PARTS = {INTERPRETER: 25.0, HOST: 5.0, SCHEDULE: 2.0, CODE: 30.0}
_VARIANTS = 30  # about as many as a target has


@dataclass(frozen=True)
class Plan:
    """What to count."""

    parts: tuple[str, ...]  # names in PARTS
    targets: tuple[str, ...]  # names in launches.TARGETS
    models: tuple[str, ...]  # whose variants are compiled
    command: str  # that repeats it


def bench_gpu(plan: Plan) -> GpuRecord:
    """Count what the plan says.

    Raises:
        RuntimeError: If kernels do not compile, or the interpreter fails.
    """
    weights = {**PARTS, CODE: PARTS[CODE] * len(plan.targets)}
    progress = Progress(sum(weights[part] for part in plan.parts))
    figures: list[Figure] = []
    variants: list[Variant] = []
    if INTERPRETER in plan.parts:
        progress.stage("triton's interpreter", weights[INTERPRETER])
        figures += of_interpreter(interpreted())
    if HOST in plan.parts:
        progress.stage("the host's work", weights[HOST])
        figures += [*of_host(), *of_host_time()]
    if SCHEDULE in plan.parts:
        progress.stage("the schedule", weights[SCHEDULE])
        figures += of_schedule()
    if CODE in plan.parts:
        variants = _compiled(plan, progress, weights[CODE])
        figures += of_code(variants, plan.targets)
    progress.end()
    return GpuRecord(
        command=plan.command,
        environment=environment_with_load(torch.device("cpu")),
        triton=version("triton"),
        figures=tuple(figures),
        missed=tuple(missed(variants)),
        variants=tuple(variants),
    )


def _compiled(plan: Plan, progress: Progress, weight: float) -> list[Variant]:
    """Compile for two targets at a time, a process each."""
    told = progress.stage("compiling", weight)
    done: list[str] = []

    def show(name: str) -> None:
        done.append(name)
        told(min(1.0, len(done) / (_VARIANTS * len(plan.targets))))

    def compile_for(target: str) -> list[Variant]:
        return compiled(target, plan.models, USUAL, show)

    with ThreadPoolExecutor(2) as pool:
        found: Sequence[list[Variant]] = list(pool.map(compile_for, plan.targets))
    return [variant for own in found for variant in own]
