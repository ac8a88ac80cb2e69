"""`sinkgd bench loop`: the training loop against a bare one with the same model and fused AdamW.

All loops run in one process. They are timed in turn, a block of steps each, in an order that
rotates, so that other load on the machine affects them alike. Speeds and ratios are medians over
the rounds; the speeds of the slowest and of the fastest round are given, too.
"""

import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from sinkgd.lab.bench.interleaved import (
    environment_with_load,
    quartiles,
    ratios,
    reliability_warnings,
    spreads_widely,
)
from sinkgd.lab.results import RESULTS_FILE, ResultsWriter
from sinkgd.lab.train.config import OptimizerConfig, RunConfig
from sinkgd.lab.train.loop import training_steps
from sinkgd.lab.train.machine import arithmetic, select_device, synchronize
from sinkgd.lab.train.resolve import resolve
from sinkgd.lab.train.setup import Job, set_up
from sinkgd.lab.train.sinks import LineMeter

BARE = "bare loop, fused AdamW"


@dataclass(frozen=True)
class LoopSpeed:
    """One loop's speed over the rounds."""

    name: str
    tokens_per_second: float  # in the median round
    slowest: float  # tokens per second in the slowest round
    fastest: float  # tokens per second in the fastest round
    of_bare: float  # median over the rounds of the ratio to the bare loop


@dataclass(frozen=True)
class LoopBenchmark:
    """One run of `sinkgd bench loop`."""

    contenders: tuple[LoopSpeed, ...]  # the bare loop first
    rounds: int
    steps_per_block: int
    tokens_per_step: int
    environment: dict[str, Any]
    doubts: tuple[str, ...]  # warnings about the ratios; empty if they are reliable


def bench_loop(
    config: RunConfig,
    recipes: Sequence[str],
    *,
    rounds: int,
    steps_per_block: int,
    echo: Callable[[str], None],
) -> LoopBenchmark:
    """Time the training loop with each of ``recipes`` against the bare loop.

    Args:
        config: Model, text and batch; its optimizer and number of steps are ignored.
        recipes: Recipes of `sinkgd train`, by name.
        rounds: Number of timed blocks of each loop; one more is run first as a warm-up.
        steps_per_block: Optimizer steps in a block.
        echo: Called with lines of text about the progress.

    Raises:
        ConfigError: If the configuration cannot run.
        DataError: If the text is missing, damaged or too small.
        ModelError: If there is no such preset.
        NonFiniteLossError: If a loss or gradient of the training loop is not finite.
    """
    environment = environment_with_load(select_device(config.training.device))
    steps = (rounds + 1) * steps_per_block
    jobs = {recipe: _job(config, recipe, steps, echo) for recipe in recipes}
    with TemporaryDirectory() as folder:
        loops: dict[str, Iterator[object]] = {BARE: _bare_steps(_job(config, "sgd", steps, echo))}
        for recipe, job in jobs.items():
            loops[f"sinkgd train, {recipe}"] = _recorded_steps(job, Path(folder))
        device = next(iter(jobs.values())).device
        seconds = _time_interleaved(loops, rounds, steps_per_block, device, echo)
    tokens = steps_per_block * config.tokens_per_step
    return LoopBenchmark(
        contenders=tuple(_summarize(name, seconds, tokens) for name in loops),
        rounds=rounds,
        steps_per_block=steps_per_block,
        tokens_per_step=config.tokens_per_step,
        environment=environment,
        doubts=reliability_warnings(environment, {"training steps": _wide(seconds)}),
    )


def _job(config: RunConfig, recipe: str, steps: int, echo: Callable[[str], None]) -> Job:
    training = replace(config.training, steps=steps)
    return set_up(
        resolve(replace(config, training=training, optimizer=OptimizerConfig(recipe=recipe))), echo
    )


def _recorded_steps(job: Job, folder: Path) -> Iterator[None]:
    """Take steps as `sinkgd train` does: with text, schedule, clipping, record and meter."""
    recipe = job.config.optimizer.recipe
    every = job.config.logging.print_every_steps
    meter = LineMeter(recipe, job.config.training.steps, every, io.StringIO())
    with ResultsWriter(folder / recipe / RESULTS_FILE, (meter,)) as results:
        for record in training_steps(job):
            results.write(record)
            yield


def _bare_steps(job: Job) -> Iterator[None]:
    """Take steps of only forward, backward and fused AdamW, always on the same batch."""
    model, precision = job.state.model, job.config.training.precision
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = job.batches.at(0)
    inputs, targets = batch.inputs.to(job.device), batch.targets.to(job.device).flatten()
    while True:
        optimizer.zero_grad()
        with arithmetic(precision, job.device):
            logits = model(inputs)
        loss = cross_entropy(logits.float().flatten(0, 1), targets)
        torch.autograd.backward(loss)
        optimizer.step()
        yield


def _time_interleaved(
    loops: dict[str, Iterator[object]],
    rounds: int,
    steps: int,
    device: torch.device,
    echo: Callable[[str], None],
) -> dict[str, list[float]]:
    """Return each loop's seconds per block, one for each round."""
    names = list(loops)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        echo(f"round {i} of {rounds}" if i else "warming up")
        for name in names[i % len(names) :] + names[: i % len(names)]:
            synchronize(device)
            started = time.perf_counter()
            for _ in range(steps):
                next(loops[name])
            synchronize(device)
            if i:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _wide(seconds: dict[str, list[float]]) -> list[str]:
    return [
        name
        for name, own in seconds.items()
        if spreads_widely(quartiles(ratios(own, seconds[BARE])))
    ]


def _summarize(name: str, seconds: dict[str, list[float]], tokens: int) -> LoopSpeed:
    speeds = [tokens / block for block in seconds[name]]
    of_bare = statistics.median(ratios(seconds[BARE], seconds[name]))
    return LoopSpeed(name, statistics.median(speeds), min(speeds), max(speeds), of_bare)
