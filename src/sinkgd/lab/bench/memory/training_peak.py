"""The peak of one training step, twice: counted from inside, and as the system sees it.

Inside, the profiler lists every allocation and release of torch's allocator, from the drawing of
the weights to the end of the second step; the second one counts. The profiler's own list takes
memory, so the view from outside has a process without it: on Linux the largest resident size
(VmHWM) less that of the same process after a step of a tiny model, by when all code is loaded; on
CUDA the allocator's own counter.

A block is a piece of memory from its allocation to its release. Within the last step
    gradient: a block that was a parameter's ``grad`` at some time, from its allocation on
    activation: a block that forward allocated and that is there when backward begins
"""

from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from sinkgd.lab.bench.memory.measure import in_fresh_process
from sinkgd.lab.bench.memory.records import TrainingUse
from sinkgd.lab.bench.memory.training_case import Case, Trainee, build_trainee
from sinkgd.lab.train.device import synchronize
from sinkgd.lab.train.memory import measure_memory, peak_bytes, return_freed_memory

STEP_MARK = "sinkgd step"
GRADIENT_MARK = "sinkgd gradient "  # and its address
_BACKWARD_MARK = "autograd::engine::evaluate_function"  # torch's own, at every node of the graph


@dataclass(frozen=True)
class Change:
    """The allocator gave out bytes, or, where they are negative, took them back."""

    address: int
    bytes: int


@dataclass(frozen=True)
class Mark:
    """A step begins, backward is at work, or the block at an address is seen to be a gradient."""

    kind: Literal["step", "backward", "gradient"]
    address: int = 0


Event = Change | Mark


@dataclass(frozen=True)
class Peak:
    """The most that was there at once in the last step, and what of it was what; bytes."""

    bytes: int
    gradients: int  # then
    activations: int  # then
    activations_kept: int  # when backward began


@dataclass
class _Block:
    begin: int  # the event's place
    end: int
    bytes: int
    gradient: bool = False


def peak_of_last_step(events: Sequence[Event]) -> Peak:
    """Find the peak, and what it consists of.

    Examples:
        Weights of 100 bytes; a step keeps an activation of 7, and makes a gradient of 100.

        >>> begin, step, backward = Change(1, 100), Mark("step"), Mark("backward")
        >>> made, seen, freed = Change(3, 100), Mark("gradient", 3), Change(3, -100)
        >>> forward, used = Change(2, 7), Change(2, -7)
        >>> peak_of_last_step([begin, step, forward, backward, made, seen, used, freed])
        Peak(bytes=207, gradients=100, activations=7, activations_kept=7)
    """
    marks = [(i, event.kind) for i, event in enumerate(events) if isinstance(event, Mark)]
    step = max(i for i, kind in marks if kind == "step")
    backward = min(i for i, kind in marks if kind == "backward" and i > step)
    blocks = _blocks(events)
    changes = [0] * (len(events) + 1)
    for block in blocks:
        changes[block.begin] += block.bytes
        changes[block.end] -= block.bytes
    levels = list(accumulate(changes))
    moment = max(range(step, len(events)), key=levels.__getitem__)
    alive = [block for block in blocks if block.begin <= moment < block.end]
    kept = [block for block in blocks if step < block.begin < backward < block.end]
    return Peak(
        bytes=levels[moment],
        gradients=sum(block.bytes for block in alive if block.gradient),
        activations=sum(block.bytes for block in kept if block.begin <= moment < block.end),
        activations_kept=sum(block.bytes for block in kept),
    )


def recorded_events(profiler: profile, device: torch.device) -> list[Event]:
    """Return what a profiler with ``profile_memory`` recorded of a device's allocator."""
    assert profiler.profiler is not None, "it has run"
    results = profiler.profiler.kineto_results
    assert results is not None, "it has stopped"
    tree = sorted(_flat(results.experimental_event_tree()), key=lambda node: node.start_time_ns)
    return [event for node in tree if (event := _event(node, device)) is not None]


def _flat(nodes: Sequence[Any]) -> Iterator[Any]:
    waiting = list(reversed(nodes))
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(reversed(node.children))


def _event(node: Any, device: torch.device) -> Event | None:
    kind, details = node.typed
    if kind == _EventType.Allocation:
        ours = details.device.type == device.type
        return Change(details.ptr, details.alloc_size) if ours else None
    if node.name == STEP_MARK:
        return Mark("step")
    if node.name.startswith(_BACKWARD_MARK):
        return Mark("backward")
    if node.name.startswith(GRADIENT_MARK):
        return Mark("gradient", int(node.name.removeprefix(GRADIENT_MARK)))
    return None


def _blocks(events: Sequence[Event]) -> list[_Block]:
    blocks: list[_Block] = []
    there: dict[int, _Block] = {}
    for i, event in enumerate(events):
        if isinstance(event, Mark):
            if event.kind == "gradient":
                there[event.address].gradient = True
        elif event.bytes > 0:
            there[event.address] = _Block(i, len(events), event.bytes)
            blocks.append(there[event.address])
        elif event.address in there:  # others were allocated before the recording began
            there.pop(event.address).end = i
    return blocks


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
