"""A plan: what every method needs for one model, one mesh and one device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sinkgd.lab.devices import DeviceSheet
from sinkgd.lab.plan.architecture import PUBLISHED, Architecture, find_architecture
from sinkgd.lab.plan.memory import Memory, rank_memory
from sinkgd.lab.plan.methods import METHODS, Method
from sinkgd.lab.plan.speed import StepTime, step_time
from sinkgd.lab.plan.trace import Work
from sinkgd.lab.plan.traffic import Messages, optimizer_traffic, training_traffic
from sinkgd.lab.plan.weights import Grid, weights_of
from sinkgd.lab.report.cost import gpu_hours
from sinkgd.lab.train.config import ConfigError

# From small to large: where each method stops fitting is looked for among these.
LADDER = ("llama-60m", "llama-130m", "llama-350m", "llama-1b", "llama-7b", "llama-10b", *PUBLISHED)

_DAY = 86_400  # seconds


@dataclass(frozen=True)
class Question:
    """What is asked."""

    work: Work
    grid: Grid
    device: DeviceSheet
    method: Method
    usable: float  # part of the device's memory that training may have
    mfu: float  # part of the device's peak that products reach
    tokens: float  # to train on
    price: float | None  # of a device, an hour


@dataclass(frozen=True)
class MethodPlan:
    """What one method needs."""

    name: str
    title: str
    memory: Memory
    fits: bool
    messages: tuple[Messages, ...]
    time: StepTime
    tokens_per_day: float
    days: float  # for all tokens
    cost: float | None  # in the currency of the price


@dataclass(frozen=True)
class Rung:
    """A model of the ladder: the peak of each method, or why it cannot be divided so."""

    model: str
    parameters: int
    peaks: dict[str, int]
    reason: str = ""


@dataclass(frozen=True)
class Answer:
    """A plan."""

    parameters: int
    matrix_parameters: int
    limit_bytes: int  # of a device, for training
    methods: tuple[MethodPlan, ...]
    ladder: tuple[Rung, ...]

    def of(self, name: str) -> MethodPlan:
        """Return the plan of a method."""
        return next(one for one in self.methods if one.name == name)


def make_plan(question: Question, *, ladder: Sequence[str] = LADDER) -> Answer:
    """Answer a question for every method.

    Args:
        question: What is asked.
        ladder: Models among which to look for where each method stops fitting.

    Raises:
        ConfigError: If the mesh cannot divide the model, or the method cannot release gradients.
    """
    if question.work.release and not question.method.can_release:
        able = ", ".join(name for name, method in METHODS.items() if method.can_release)
        raise ConfigError(
            f"release_gradients needs an optimizer that can take one gradient at a time; "
            f"{question.method.name!r} cannot. Those that can: {able}"
        )
    weights = weights_of(question.work.architecture, question.grid)
    return Answer(
        parameters=sum(w.count for w in weights),
        matrix_parameters=sum(w.count for w in weights if w.is_matrix),
        limit_bytes=_limit(question),
        methods=tuple(_method_plan(question, method) for method in METHODS.values()),
        ladder=tuple(_rung(question, find_architecture(name)) for name in ladder),
    )


def _limit(question: Question) -> int:
    return math.floor(question.usable * question.device.memory_bytes)


def _method_plan(question: Question, method: Method) -> MethodPlan:
    work, grid = question.work, question.grid
    memory = rank_memory(work, grid, method)
    messages = [*training_traffic(work, grid), *optimizer_traffic(work, grid, method)]
    time = step_time(work, grid, method, question.device, messages, mfu=question.mfu)
    tokens = work.batch_size * work.micro_batches * work.sequence_length * grid.batches
    tokens_per_day = tokens * _DAY / time.step
    hours = gpu_hours(question.tokens, tokens / time.step / grid.ranks)
    return MethodPlan(
        name=method.name,
        title=method.title,
        memory=memory,
        fits=memory.peak <= _limit(question),
        messages=tuple(messages),
        time=time,
        tokens_per_day=tokens_per_day,
        days=question.tokens / tokens_per_day,
        cost=None if question.price is None else question.price * hours,
    )


def _rung(question: Question, architecture: Architecture) -> Rung:
    parameters = sum(w.count for w in weights_of(architecture))
    work = replace(question.work, architecture=architecture)
    try:
        peaks = {
            name: rank_memory(work, question.grid, method).peak for name, method in METHODS.items()
        }
    except ConfigError as error:  # the mesh cannot divide this model
        return Rung(architecture.name, parameters, {}, str(error))
    return Rung(architecture.name, parameters, peaks)
