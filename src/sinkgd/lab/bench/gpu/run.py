"""`sinkgd bench gpu`: the figures that are counted for a step on a GPU, and their targets."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version

import torch

from sinkgd.lab.bench.gpu.cases import LLAMAS, RANK, USUAL, output_of
from sinkgd.lab.bench.gpu.interpreted import Interpreted, interpreted
from sinkgd.lab.bench.gpu.recorded import (
    calls_of_model,
    calls_per_further_matrix,
    launches_of_bucket,
    without_adamw,
)
from sinkgd.lab.bench.gpu.scheduled_bytes import bytes_of_step, scratch_of_model
from sinkgd.lab.bench.gpu.tables import Figure, GpuRecord, Missed
from sinkgd.lab.bench.gpu.variants import Variant, compiled, instructions_per_entry
from sinkgd.lab.bench.interleaved import environment_with_load
from sinkgd.lab.disk import parse_json
from sinkgd.lab.report.console import Progress

INTERPRETER, HOST, SCHEDULE, CODE = "interpreter", "host", "schedule", "code"
# The parts, and about how many seconds each takes. CODE takes that long for each GPU for
# which kernels are compiled.
PARTS = {INTERPRETER: 25.0, HOST: 5.0, SCHEDULE: 2.0, CODE: 30.0}
_VARIANTS = 30  # about how many variants are compiled for a GPU

COUNTED = "sm_90"  # the GPU whose instructions are counted

# The targets of figures that `_figure` makes: the largest values that they should have. Without an
# entry here, such a figure has no target.
LIMITS: dict[str, float] = {
    "readings of G per entry and step, plain": 6,
    "readings of G per entry and step, deflated": 10,
    "float32 copies of gradients, deflated": 0,
    "relative error of r·c": 3e-6,
    "error of deflated updates, relative to their RMS": 3e-6,
    "torch calls for each further matrix, plain": 0,
    "torch calls for each further matrix, deflated": 0.2,
    "torch calls of a hybrid step, llama-1b, plain": 60,
    "launches of a bucket, plain": 6,
    "SASS instructions per entry and step, 2048 columns": 80,
    "SASS instructions per entry and step, 5461 columns": 110,
    "bytes from and to memory, × AdamW fused, llama-1b": 0.6,
}
# The most milliseconds that the host may take for a step.
HOST_TIMES = {"llama-60m": 0.3, "llama-1b": 4.0, "llama-7b": 12.0}
_SPILLING, _NARROW = "variants that spill", "variants with loads below 16 bytes"
_OF_BUCKET, _OF_MODEL = "scratch of a bucket", "scratch of a model"


@dataclass(frozen=True)
class Plan:
    """What to count."""

    parts: tuple[str, ...]  # keys of PARTS
    targets: tuple[str, ...]  # names in cases.TARGETS
    models: tuple[str, ...]  # names in cases.MODELS, whose variants are compiled
    command: str  # the command that repeats this run


def bench_gpu(plan: Plan) -> GpuRecord:
    """Count what the plan lists.

    Raises:
        RuntimeError: If kernels do not compile, or a process that counts fails.
    """
    environment = environment_with_load(torch.device("cpu"))
    weights = {**PARTS, CODE: PARTS[CODE] * len(plan.targets)}
    progress = Progress(sum(weights[part] for part in plan.parts))
    figures: list[Figure] = []
    variants: list[Variant] = []
    if INTERPRETER in plan.parts:
        progress.stage("triton's interpreter", weights[INTERPRETER])
        figures += interpreter_figures(interpreted())
    if HOST in plan.parts:
        progress.stage("the host's work", weights[HOST])
        figures += [*host_figures(), *host_time_figures()]
    if SCHEDULE in plan.parts:
        progress.stage("the schedule", weights[SCHEDULE])
        figures += schedule_figures()
    if CODE in plan.parts:
        variants = _compiled(plan, progress, weights[CODE])
        figures += code_figures(variants, plan.targets)
    progress.end()
    return GpuRecord(
        command=plan.command,
        environment=environment,
        triton=version("triton"),
        figures=tuple(figures),
        missed=tuple(missed(variants)),
        variants=tuple(variants),
    )


def _compiled(plan: Plan, progress: Progress, weight: float) -> list[Variant]:
    """Compile for two targets at a time, each in its own process."""
    show_part = progress.stage("compiling", weight)
    done: list[str] = []

    def show(name: str) -> None:
        done.append(name)
        show_part(min(1.0, len(done) / (_VARIANTS * len(plan.targets))))

    def compile_for(target: str) -> list[Variant]:
        return compiled(target, plan.models, USUAL, show)

    with ThreadPoolExecutor(2) as pool:
        found: Sequence[list[Variant]] = list(pool.map(compile_for, plan.targets))
    return [variant for own in found for variant in own]


def interpreter_figures(found: Interpreted) -> list[Figure]:
    """Return the figures that were counted while kernels were interpreted."""
    how = "loads of G and its copies: by kernels in the interpreter, and by torch operations"
    of = "readings of G per entry and step"
    return [
        _figure(f"{of}, plain", found.readings, how),
        _figure(f"{of}, deflated", found.deflated_readings, how),
        _figure(
            "float32 copies of gradients, deflated",
            found.deflated_copies,
            "new tensors with the sides of a gradient",
        ),
        _figure(
            "relative error of r·c",
            found.relative_error,
            "the largest error against float64, with float32 gradients in the interpreter",
        ),
        _figure(
            "error of deflated updates, relative to their RMS",
            found.deflated_error,
            "the largest error of an entry, found in the same way",
        ),
    ]


def host_figures() -> list[Figure]:
    """Count the work of the host in a step."""
    how = "calls of torch's dispatcher; launches do nothing"
    whole = "calls of torch's dispatcher for all parameters, without AdamW's own calls"
    more, model = "torch calls for each further matrix", "torch calls of a hybrid step, llama-1b"
    plain, deflated = ({"deflated_rank": rank} for rank in (0, RANK))
    return [
        _figure(f"{more}, plain", calls_per_further_matrix(**plain), how),
        _figure(f"{more}, deflated", calls_per_further_matrix(**deflated), how),
        _figure(f"{model}, plain", without_adamw(calls_of_model("llama-1b", **plain)), whole),
        _figure(f"{model}, deflated", without_adamw(calls_of_model("llama-1b", **deflated)), whole),
        _figure("launches of a bucket, plain", launches_of_bucket(), "launches of the backend"),
    ]


def host_time_figures() -> list[Figure]:
    """Measure the host's time for a step, in a process of its own.

    Raises:
        RuntimeError: If the process fails.
    """
    written = output_of("sinkgd.lab.bench.gpu.host_time", "write_milliseconds", interprets=False)
    milliseconds: dict[str, float] = parse_json(written)
    how = "median of several steps in which the driver's launch does nothing; needs an idle machine"
    return [
        Figure(f"host time of a step in ms, {model}", milliseconds[model], most, how)
        for model, most in HOST_TIMES.items()
    ]


def schedule_figures() -> list[Figure]:
    """Return the figures that follow from the schedule of a step on an H100, in bfloat16."""
    bucket = "partial sums and scales, divided by gradients: the worst bucket above half full"
    whole = "bytes of all that a step allocates, divided by the gradients' bytes"
    moved = (
        "buckets of up to half of an H100's L2 cache are read from memory once, or twice if their "
        "update waits for other buckets"
    )
    scratch = {model: scratch_of_model(model) for model in LLAMAS}
    return [
        *(
            _figure(
                f"bytes from and to memory, × AdamW fused, {model}", bytes_of_step(model), moved
            )
            for model in LLAMAS
        ),
        *(
            Figure(f"{_OF_BUCKET}, {model}", one.of_bucket, 0.12, bucket)
            for model, one in scratch.items()
        ),
        *(
            Figure(f"{_OF_MODEL}, {model}", one.of_model, 0.01, whole)
            for model, one in scratch.items()
        ),
    ]


def code_figures(variants: Sequence[Variant], targets: Sequence[str]) -> list[Figure]:
    """Return the figures of the compiled kernels."""
    ours = [variant for variant in variants if variant.target == COUNTED]
    is_there = any("llama-1b" in use for variant in ours for use in variant.uses)
    figures = [
        _figure(
            f"SASS instructions per entry and step, {shape[-1]} columns",
            instructions_per_entry(ours, "plain", "llama-1b", shape),
            "instructions in loops over panels, divided by entries of a thread; bf16, L = 5, sm_90",
        )
        for shape in ((2048, 2048), (2048, 5461))
        if is_there
    ]
    for target in targets:
        own = [one for one in variants if one.target == target]
        spilling, narrow = sum(one.spilled > 0 for one in own), sum(not one.is_wide for one in own)
        how = f"among {len(own)} variants of kernels that steps of the models use"
        figures.append(Figure(f"{_SPILLING}, {target}", spilling, 0, how))
        figures.append(Figure(f"{_NARROW}, {target}", narrow, 0, how))
    return figures


def missed(variants: Iterable[Variant]) -> list[Missed]:
    """Return the variants that spill or have loads below 16 bytes."""
    found = []
    for one in variants:
        why = [f"{one.spilled} spills"] if one.spilled else []
        why += [] if one.is_wide else ["loads below 16 bytes"]
        if why:
            found.append(Missed(one.name, one.target, tuple(sorted(set(one.uses))), ", ".join(why)))
    return found


def _figure(name: str, value: float, how: str) -> Figure:
    return Figure(name, value, LIMITS.get(name), how)
