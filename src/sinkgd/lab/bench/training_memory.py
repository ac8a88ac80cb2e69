"""Memory of one training step: whether a model fits, and the peak of the step, by part.

The step is the laboratory's own, on random tokens. Its peak is measured twice. Inside the process,
the profiler lists every allocation and release of torch's allocator, from the initialization of the
weights to the end of the second step; the peak is that of the second step. The profiler's list
itself takes memory, so a second measurement, from outside, runs in another process without the
profiler. On a CPU it reads the largest resident size (on Linux VmHWM), less that of the same
process after steps of a tiny model, when all code is loaded; this includes buffers that oneDNN
takes for itself, such as the float32 result of a product in bfloat16 where the CPU has no
instructions for it. On CUDA it reads the allocator's own counter.

A block is a piece of memory from its allocation to its release. Two kinds of blocks are counted
within the last step:
    gradient: a block that was a parameter's ``grad`` at some time, from its allocation on
    activation: a block that forward allocated and that still exists when backward begins
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile, record_function

from sinkgd.lab.bench.memory_report import StepSettings, TrainingUse
from sinkgd.lab.bench.workloads import available_bytes
from sinkgd.lab.data import Batch
from sinkgd.lab.launch import in_fresh_process
from sinkgd.lab.models import LanguageModel, build_model
from sinkgd.lab.train.config import OptimizerConfig, RunConfig, TrainingConfig
from sinkgd.lab.train.machine import peak_bytes, return_freed_memory, synchronize, weight_dtype
from sinkgd.lab.train.mesh import Mesh
from sinkgd.lab.train.recipes import build_optimizer
from sinkgd.lab.train.resolve import resolve
from sinkgd.lab.train.state import measure_memory, state_tensors
from sinkgd.lab.train.training_step import ReleasedSteps, take_step
from sinkgd.lab.train.world import World
from sinkgd.optim.grouped import GroupedOptimizer

_LR = 1e-3  # memory does not depend on the rate; a low one suits random tokens


@dataclass(frozen=True)
class Case:
    """A training step to measure, described by names that another process can look up."""

    model: str  # a preset
    recipe: str
    release: bool  # whether gradients are freed inside backward
    settings: StepSettings
    device: str
    threads: int
    vocab_size: int | None = None  # number of tokens; by default the preset's

    @property
    def title(self) -> str:
        """The recipe, and whether gradients are released or kept."""
        return f"{self.recipe}, {'released' if self.release else 'kept'}"

    @property
    def config(self) -> RunConfig:
        """The configuration of a run with this step, with weights in bfloat16."""
        settings = self.settings
        return resolve(
            RunConfig(
                optimizer=OptimizerConfig(recipe=self.recipe, lr=_LR),
                training=TrainingConfig(
                    batch_size=settings.batch_size,
                    sequence_length=settings.sequence_length,
                    precision="bf16",
                    release_gradients=self.release,
                    recompute_activations=settings.recompute,
                    loss_chunk_tokens=settings.loss_chunk_tokens,
                ),
            )
        )


@dataclass(frozen=True)
class Trainee:
    """A model in training, on the same tokens in every step."""

    model: LanguageModel
    optimizer: Optimizer
    released: ReleasedSteps | None
    batch: Batch
    config: RunConfig
    device: torch.device

    def step(self) -> None:
        """Take a training step as `sinkgd train` does."""
        take_step(
            self.model,
            self.optimizer,
            self.batch,
            self.config,
            Mesh(self.device, World()),
            number=1,
            released=self.released,
        )


def model_on_meta(case: Case) -> LanguageModel:
    """Return the model on the meta device, with weights in the type in which they are trained."""
    training = case.config.training
    with torch.device("meta"):
        model = build_model(
            case.model, vocab_size=case.vocab_size, max_sequence_length=training.sequence_length
        )
    model.recompute = training.recompute_activations
    return model.to(weight_dtype(training.precision))


def build_trainee(case: Case, on_gradient: Callable[[Tensor], None] | None = None) -> Trainee:
    """Initialize the weights and build the optimizer, in the order of `sinkgd train`.

    Args:
        case: The training step to build.
        on_gradient: Called with each parameter when its gradient is complete, before release.
    """
    config, device = case.config, torch.device(case.device)
    model = model_on_meta(case).to_empty(device=device).initialize(config.training.seed)
    if on_gradient is not None:
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(on_gradient)  # type: ignore[no-untyped-call]
    optimizer = build_optimizer(model, config.optimizer)
    return Trainee(
        model=model,
        optimizer=optimizer,
        released=ReleasedSteps(optimizer) if case.release else None,
        batch=_random_batch(case, model.config.vocab_size),
        config=config,
        device=device,
    )


def _random_batch(case: Case, vocab_size: int) -> Batch:
    rows, length = case.settings.batch_size, case.settings.sequence_length
    generator = torch.Generator(device="cpu").manual_seed(0)
    tokens = torch.randint(
        vocab_size, (rows, length + 1), generator=generator, dtype=torch.int64, device="cpu"
    )
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


# Bounds that follow from shapes only, about twice what is measured. With release, three tensors
# of the largest gradient's size exist at once: autograd adds the gradients of two chunks of the
# loss into a third tensor.
_GRADIENTS_AT_ONCE = 3
# Bytes for each token and each feature of a block's hidden and inner vectors.
_BYTES_PER_HIDDEN, _BYTES_PER_INNER = 96, 32
# The logit in bfloat16 and in float32, its softmax, and the gradients of all three.
_BYTES_PER_LOGIT = 20
_PROCESS = 1 << 30  # bytes for code, and for scratch of optimizers, such as batches of matrices
_SPARE = 1.05  # factor on the sum of all parts but _PROCESS


def why_no_room(case: Case) -> str | None:
    """Return why a case does not fit into the memory that is free now, or None if it does."""
    free, needed = available_bytes(torch.device(case.device)), needed_bytes(case)
    if free is None or needed <= free:
        return None
    return f"it may need {needed / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free"


def needed_bytes(case: Case) -> int:
    """Return an upper bound on the bytes that a case takes, without allocating them."""
    model = model_on_meta(case)
    sizes = [param.nbytes for param in model.parameters()]
    gradients = _GRADIENTS_AT_ONCE * max(sizes) if case.release else sum(sizes)
    parts = sum(sizes) + gradients + _state_bytes(model, case) + _activation_bytes(model, case)
    return int(_SPARE * parts) + _PROCESS


def _state_bytes(model: LanguageModel, case: Case) -> int:
    optimizer = build_optimizer(model, case.config.optimizer)
    if isinstance(optimizer, GroupedOptimizer):
        optimizer.init_state()
    else:  # other optimizers create their state in a step
        for group in optimizer.param_groups:
            if "fused" in group:  # torch's optimizers: only their plain versions run on meta
                group.update(fused=False, foreach=False)
            elif "foreach" in group:  # pytorch-optimizer's plain versions read tensors' values
                group["foreach"] = True
        for param in model.parameters():
            param.grad = torch.empty_like(param)
        optimizer.step()
    return sum(tensor.nbytes for tensor in state_tensors(optimizer))


def _activation_bytes(model: LanguageModel, case: Case) -> int:
    settings, sizes = case.settings, model.config
    tokens = settings.batch_size * settings.sequence_length
    block = _BYTES_PER_HIDDEN * sizes.hidden_size + _BYTES_PER_INNER * sizes.intermediate_size
    inputs = 2 * sizes.hidden_size * sizes.num_layers
    blocks = inputs + block if settings.recompute else sizes.num_layers * block
    logits = min(tokens, settings.loss_chunk_tokens) * sizes.vocab_size
    return tokens * blocks + _BYTES_PER_LOGIT * logits


STEP_MARK = "sinkgd step"
GRADIENT_MARK = "sinkgd gradient "  # followed by the gradient's address
_BACKWARD_MARK = "autograd::engine::evaluate_function"  # torch's own, at every node of the graph


@dataclass(frozen=True)
class Change:
    """The allocator gave out bytes, or took them back if the number is negative."""

    address: int
    bytes: int


@dataclass(frozen=True)
class Mark:
    """A step begins, backward runs, or the block at an address turns out to be a gradient."""

    kind: Literal["step", "backward", "gradient"]
    address: int = 0


Event = Change | Mark


@dataclass(frozen=True)
class Peak:
    """The most bytes that were allocated at once in the last step, and their parts."""

    bytes: int
    gradients: int  # bytes of gradients at that moment
    activations: int  # bytes of activations at that moment
    activations_kept: int  # bytes of activations when backward began


@dataclass
class _Block:
    begin: int  # index of the event that allocates it
    end: int
    bytes: int
    gradient: bool = False


def peak_of_last_step(events: Sequence[Event]) -> Peak:
    """Find the peak and its parts.

    Examples:
        The weights have 100 bytes. A step keeps an activation of 7 and makes a gradient of 100.

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
    """Return the events of a device's allocator, from a profiler with ``profile_memory``."""
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
    alive: dict[int, _Block] = {}
    for i, event in enumerate(events):
        if isinstance(event, Mark):
            if event.kind == "gradient":
                alive[event.address].gradient = True
        elif event.bytes > 0:
            alive[event.address] = _Block(i, len(events), event.bytes)
            blocks.append(alive[event.address])
        elif event.address in alive:  # otherwise the block was allocated before the recording
            alive.pop(event.address).end = i
    return blocks


_STEPS = 2  # the first one allocates state and scratch memory


def measure_in_fresh_processes(case: Case) -> TrainingUse | str:
    """Measure a case from inside and from outside, each in its own process.

    Returns:
        The memory that the case uses, or why it could not be measured.
    """
    try:
        use = in_fresh_process(measure_inside, case)
        return replace(use, outside_bytes=in_fresh_process(measure_outside, case))
    except BrokenProcessPool:
        return "its process was killed, which the system does when memory runs out"


def measure_inside(case: Case) -> TrainingUse:
    """Count what torch's allocator gives out in this process; ``outside_bytes`` stays 0."""
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
    """Return by how many bytes building and training the model raise this process's peak."""
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
