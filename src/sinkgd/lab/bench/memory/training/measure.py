"""The peak of one training step, twice: counted from inside, and as the system sees it.

Inside, the profiler lists every allocation and release of torch's allocator, from the drawing of
the weights to the end of the second step; the second one counts. The profiler's own list takes
memory, so the view from outside has a process without it: on Linux the largest resident size
(VmHWM) less that of the same process after a step of a tiny model, by when all code is loaded; on
CUDA the allocator's own counter.
"""

from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from sinkgd.lab.bench.memory.fresh_process import in_fresh_process
from sinkgd.lab.bench.memory.training.case import Case, Trainee, build_trainee
from sinkgd.lab.bench.memory.training.records import TrainingUse
from sinkgd.lab.bench.memory.training.timeline import (
    GRADIENT_MARK,
    STEP_MARK,
    peak_of_last_step,
    recorded_events,
)
from sinkgd.lab.train.device import synchronize
from sinkgd.lab.train.memory import measure_memory, peak_bytes, return_freed_memory

_STEPS = 2  # the first one makes state and scratch


def measure_in_fresh_processes(case: Case) -> TrainingUse | str:
    """Measure a case, each view in a process of its own.

    Returns:
        What it uses, or why it could not be measured.
    """
    try:
        use = in_fresh_process(measure_inside, case)
        return replace(use, outside_bytes=in_fresh_process(measure_outside, case))
    except BrokenProcessPool:
        return "its process was killed, as the system does where memory runs out"


def measure_inside(case: Case) -> TrainingUse:
    """Count what torch's allocator gives out, in this process; ``outside_bytes`` stays 0."""
    _prepare(case)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainee = build_trainee(case, _mark)
        _take_steps(trainee)
    peak = peak_of_last_step(recorded_events(profiler, trainee.device))
    held = measure_memory(trainee.model, trainee.optimizer, trainee.device)
    return TrainingUse(
        model=case.model,
        recipe=case.recipe,
        release=case.release,
        weights_bytes=held.weights_bytes,
        state_bytes=held.state_bytes,
        gradients_bytes=peak.gradients,
        activations_bytes=peak.activations,
        kept_activations_bytes=peak.activations_kept,
        peak_bytes=peak.bytes,
        outside_bytes=0,
    )


def measure_outside(case: Case) -> int:
    """Return by how much building and training raise the peak of this process, in bytes."""
    _prepare(case)
    device = torch.device(case.device)
    _take_steps(build_trainee(replace(case, model="llama-nano", vocab_size=64)))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = peak_bytes(device)
    _take_steps(build_trainee(case))
    return peak_bytes(device) - before


def _prepare(case: Case) -> None:
    torch.set_num_threads(case.threads)
    if case.release:
        return_freed_memory()


def _take_steps(trainee: Trainee) -> None:
    for _ in range(_STEPS):
        with record_function(STEP_MARK):
            trainee.step()
            synchronize(trainee.device)


def _mark(param: Tensor) -> None:
    assert param.grad is not None, "it was just accumulated"
    with record_function(f"{GRADIENT_MARK}{param.grad.untyped_storage().data_ptr()}"):
        pass
