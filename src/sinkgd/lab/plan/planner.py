"""A plan: what every method needs for one model, one mesh and one device, and its JSON record."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sinkgd.lab.devices import DeviceSheet
from sinkgd.lab.plan.architecture import PUBLISHED, Architecture, find_architecture
from sinkgd.lab.plan.method import Method
from sinkgd.lab.plan.methods import METHODS
from sinkgd.lab.plan.peak_memory import Memory, rank_memory
from sinkgd.lab.plan.rank_model import Grid, weights_of
from sinkgd.lab.plan.step_time import (
    Messages,
    StepTime,
    optimizer_communication,
    step_time,
    training_communication,
)
from sinkgd.lab.plan.trace import Work
from sinkgd.lab.report.cost import gpu_hours
from sinkgd.lab.train.config import ConfigError

# From small to large. For each method and each of these models, the plan computes the peak.
LADDER = ("llama-60m", "llama-130m", "llama-350m", "llama-1b", "llama-7b", "llama-10b", *PUBLISHED)

# Shown by default: SinkGD's variants and their usual baselines.
USUAL_METHODS = ("sinkgd", "sinkgd-paper", "sinkgd-stateless", "adamw", "adamw-8bit", "muon")
MOST_SHARDS = 1024  # the largest dp_shard that is tried in the search for the fewest devices

_DAY = 86_400  # seconds


@dataclass(frozen=True)
class Question:
    """The model, mesh, device and method of a plan, and its assumptions."""

    work: Work
    grid: Grid
    device: DeviceSheet
    method: Method
    usable: float  # fraction of the device's memory that training may use
    mfu: float  # fraction of the device's peak that matrix products reach
    tokens: float  # number of tokens to train on
    price: float | None  # price of a device per hour


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
    # The fewest devices on which the method fits, a power of two times tp; None if it does not fit
    # with `MOST_SHARDS` shards.
    fewest_devices: int | None


@dataclass(frozen=True)
class Rung:
    """A model of the ladder: the peak of each method, or why the mesh cannot divide the model."""

    model: str
    parameters: int
    peaks: dict[str, int]
    reason: str = ""


@dataclass(frozen=True)
class Answer:
    """The figures of a plan."""

    parameters: int
    matrix_parameters: int
    limit_bytes: int  # memory of a device that training may use
    methods: tuple[MethodPlan, ...]
    ladder: tuple[Rung, ...]

    def of(self, name: str) -> MethodPlan:
        """Return the plan of a method."""
        return next(one for one in self.methods if one.name == name)


def make_plan(
    question: Question,
    *,
    ladder: Sequence[str] = LADDER,
    methods: Sequence[str] = tuple(METHODS),
    echo: Callable[[str], None] = lambda _: None,
) -> Answer:
    """Compute the plan of several methods.

    Args:
        question: The question to answer.
        ladder: Models for which only the peak of each method is computed.
        methods: Names of the methods; the question's method and AdamW are always included.
        echo: Called with a line before each method and each model.

    Raises:
        ConfigError: If the mesh cannot divide the model, or if the question releases gradients and
            its method cannot.
    """
    if question.work.release and not question.method.can_release:
        able = ", ".join(name for name, method in METHODS.items() if method.can_release)
        raise ConfigError(
            f"release_gradients needs an optimizer that can take one gradient at a time; "
            f"{question.method.name!r} cannot. Those that can: {able}"
        )
    asked = {*methods, question.method.name, "adamw"}
    chosen = [method for name, method in METHODS.items() if name in asked]
    weights = weights_of(question.work.architecture, question.grid)
    plans, rungs = [], []
    for i, method in enumerate(chosen, start=1):
        echo(f"counting {question.work.architecture.name} with {method.title} ({i}/{len(chosen)})")
        plans.append(_method_plan(question, method))
    for i, name in enumerate(ladder, start=1):
        echo(f"counting the ladder: {name} ({i}/{len(ladder)})")
        rungs.append(_rung(question, find_architecture(name), chosen))
    return Answer(
        parameters=sum(w.count for w in weights),
        matrix_parameters=sum(w.count for w in weights if w.is_matrix),
        limit_bytes=_limit(question),
        methods=tuple(plans),
        ladder=tuple(rungs),
    )


def _limit(question: Question) -> int:
    return math.floor(question.usable * question.device.memory_bytes)


def _method_plan(question: Question, method: Method) -> MethodPlan:
    work = replace(question.work, adapter_rank=method.adapter_rank)
    grid = question.grid
    memory = rank_memory(work, grid, method)
    messages = [*training_communication(work, grid), *optimizer_communication(work, grid, method)]
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
        fewest_devices=_fewest_devices(question, method),
    )


def _fewest_devices(question: Question, method: Method) -> int | None:
    """Find the fewest devices on which the method fits, trying powers of two as dp_shard."""
    shards = 1
    while shards <= MOST_SHARDS:
        grid = replace(question.grid, dp_replicate=1, dp_shard=shards)
        if rank_memory(question.work, grid, method).peak <= _limit(question):
            return shards * question.grid.tp
        shards *= 2
    return None


def _rung(question: Question, architecture: Architecture, methods: Sequence[Method]) -> Rung:
    parameters = sum(w.count for w in weights_of(architecture))
    work = replace(question.work, architecture=architecture)
    try:
        peaks = {method.name: rank_memory(work, question.grid, method).peak for method in methods}
    except ConfigError as error:  # the mesh cannot divide this model
        return Rung(architecture.name, parameters, {}, str(error))
    return Rung(architecture.name, parameters, peaks)


_GIB = 2**30


def as_json(question: Question, answer: Answer, command: str) -> dict[str, Any]:
    """Return a plan as plain data; sizes are in bytes, or in GiB if the name says so."""
    chosen = answer.of(question.method.name)
    work = question.work
    return {
        "command": command,
        "model": work.architecture.name,
        "optimizer": question.method.name,
        **_memory(chosen),
        "fits": chosen.fits,
        "limit_gib": answer.limit_bytes / _GIB,
        "parameters": answer.parameters,
        "matrix_parameters": answer.matrix_parameters,
        "step_seconds": chosen.time.step,
        "tokens_per_day": chosen.tokens_per_day,
        "days": chosen.days,
        "cost": chosen.cost,
        "architecture": asdict(work.architecture),
        "work": {
            key: value
            for key, value in vars(work).items()
            if key not in ("architecture", "adapter_rank")
        },
        "mesh": {**asdict(question.grid), "ranks": question.grid.ranks},
        "device": asdict(question.device),
        "assumed": {
            "mfu": question.mfu,
            "usable_memory": question.usable,
            "tokens": question.tokens,
            "price_per_gpu_hour": question.price,
        },
        "methods": [_method(one) for one in answer.methods],
        "ladder": [
            {
                "model": rung.model,
                "parameters": rung.parameters,
                "peak_gib": {name: peak / _GIB for name, peak in rung.peaks.items()},
                "fits": {name: peak <= answer.limit_bytes for name, peak in rung.peaks.items()},
                "reason": rung.reason,
            }
            for rung in answer.ladder
        ],
    }


def _memory(one: MethodPlan) -> dict[str, Any]:
    memory = one.memory
    return {
        "weights_plus_state_gib": memory.weights_and_state / _GIB,
        "weights_plus_gradients_plus_state_gib": memory.training / _GIB,
        "peak_gib": memory.peak / _GIB,
        "peak_moment": memory.moment,
    }


def _method(one: MethodPlan) -> dict[str, Any]:
    method = METHODS[one.name]
    return {
        "name": one.name,
        "title": one.title,
        "state": method.formula,
        "source": method.source,
        **_memory(one),
        "fits": one.fits,
        "memory_bytes": asdict(one.memory),
        "messages": [{**asdict(m), "sent_bytes": m.sent} for m in one.messages],
        "seconds": {**asdict(one.time), "step": one.time.step},
        "tokens_per_day": one.tokens_per_day,
        "days": one.days,
        "cost": one.cost,
    }
