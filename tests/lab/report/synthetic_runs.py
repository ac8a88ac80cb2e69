"""Runs made up for tests: written by ResultsWriter and read back as the page reads them."""

import math
import random
from pathlib import Path
from typing import Any

from sinkgd.lab.results import (
    Evaluation,
    Memory,
    ResultsWriter,
    Run,
    RunEnd,
    RunStart,
    TrainStep,
)

TOKENS_PER_STEP = 100
MEMORY = Memory(weights_bytes=1000, gradients_bytes=1000, state_bytes=2000, peak_bytes=9000)


def evaluation(step: int, val_loss: float, *, seconds: float | None = None) -> Evaluation:
    """An evaluation after ``step`` steps of 100 tokens and, unless given, one second each."""
    return Evaluation(
        step=step,
        tokens=TOKENS_PER_STEP * step,
        seconds=float(step) if seconds is None else seconds,
        val_loss=val_loss,
        perplexity=math.exp(val_loss),
        bits_per_byte=val_loss / 3,
        eval_tokens=64,
    )


def write_run(
    folder: Path,
    recipe: str,
    losses: dict[int, float],
    *,
    seed: int = 0,
    step_seconds: float = 1.0,
    optimizer_seconds: float = 0.25,
    status: str | None = "finished",
    message: str = "",
    **start: Any,
) -> Run:
    """Write a run with the validation ``losses`` after these steps; the last one is its end."""
    name = start.pop("name", f"{recipe}-seed{seed}")
    about: dict[str, Any] = {
        "command": f"sinkgd train --recipe {recipe} --seed {seed}",
        "config": {"recipe": recipe, "seed": seed, "model": {"preset": "llama-nano"}},
        "environment": {"python": "3.11", "torch": "2.13"},
        "parameters": 1000,
        "tokens_per_step": TOKENS_PER_STEP,
        **start,
    }
    path = folder / f"run-{len(list(folder.glob('*')))}" / "run.jsonl"
    last = max(losses, default=0)
    with ResultsWriter(path) as writer:
        writer.write(RunStart(name=name, recipe=recipe, seed=seed, **about))
        for step in range(1, last + 1):
            writer.write(_step(step, step_seconds, optimizer_seconds))
            if step in losses:
                seconds = step * step_seconds
                writer.write(evaluation(step, losses[step], seconds=seconds))
        if status is not None:
            tokens, seconds = TOKENS_PER_STEP * last, last * step_seconds
            writer.write(RunEnd(status, last, tokens, seconds, seconds + 1, MEMORY, message))
    return Run.read(path)


def _step(step: int, step_seconds: float, optimizer_seconds: float) -> TrainStep:
    return TrainStep(
        step=step,
        tokens=TOKENS_PER_STEP * step,
        seconds=step * step_seconds,
        loss=5.0 - 0.01 * step,
        lr=0.01,
        gradient_norm=1.0,
        step_seconds=step_seconds,
        optimizer_seconds=optimizer_seconds,
    )


# recipe: (loss it tends to, how fast, seconds a step, optimizer's share, bytes of state)
_LIKELY = {
    "adamw": (3.98, 62.0, 0.335, 0.045, 16_900_000),
    "sinkgd": (3.86, 55.0, 0.341, 0.058, 8_500_000),
    "swan": (3.80, 52.0, 0.372, 0.142, 8_500_000),
    "adamw-one-lr": (4.18, 75.0, 0.333, 0.046, 16_900_000),
}


def write_likely_run(folder: Path, recipe: str, seed: int, *, steps: int = 400) -> Run:
    """Write a run with the look of a real one: noise, warm-up, a plunge and a long tail."""
    floor, pace, step_seconds, share, state = _LIKELY[recipe]
    noise = random.Random(f"{recipe}-{seed}")
    floor += noise.gauss(0, 0.012)
    tokens_per_step, seconds = 4096, 0.0
    path = folder / f"{recipe}-seed{seed}" / "run.jsonl"
    with ResultsWriter(path) as writer:
        writer.write(_likely_start(recipe, seed, steps, tokens_per_step))
        for step in range(1, steps + 1):
            loss = floor + 2.2 * math.exp(-step / pace) + 2.6 * math.exp(-step / 18)
            loss += 0.35 * (1 - step / steps)
            lasted = step_seconds * noise.uniform(0.97, 1.06)
            seconds += lasted
            at = {"step": step, "tokens": step * tokens_per_step, "seconds": seconds}
            writer.write(
                TrainStep(
                    **at,
                    loss=loss - 0.05 + noise.gauss(0, 0.09),
                    lr=0.02 * min(1, step / 40),
                    gradient_norm=noise.uniform(0.6, 1.1),
                    step_seconds=lasted,
                    optimizer_seconds=share * lasted,
                )
            )
            if step % 25 == 0 or step == 1:
                val = loss + noise.gauss(0, 0.006)
                writer.write(
                    Evaluation(
                        **at,
                        val_loss=val,
                        perplexity=math.exp(val),
                        bits_per_byte=val / math.log(2) / 4.1,
                        eval_tokens=65_536,
                    )
                )
        memory = Memory(8_450_000, 8_450_000, state, 902_000_000 + state)
        writer.write(RunEnd("finished", step, at["tokens"], seconds, seconds + 21, memory))
    return Run.read(path)


def _likely_start(recipe: str, seed: int, steps: int, tokens_per_step: int) -> RunStart:
    lr = {"sinkgd": 0.02, "swan": 0.02, "adamw": 0.003, "adamw-one-lr": 0.003}[recipe]
    return RunStart(
        name=f"{recipe}-seed{seed}",
        recipe=recipe,
        seed=seed,
        command=f"sinkgd train --recipe {recipe} --seed {seed} --steps {steps} --out runs/demo",
        config={
            "optimizer": {"recipe": recipe, "lr": lr, "weight_decay": 0.0},
            "seed": seed,
            "model": {"preset": "llama-nano", "vocab_size": 8192, "max_sequence_length": 256},
            "data": {"corpus": "sotu", "packing": "concat", "batch_size": 16},
            "schedule": {"steps": steps, "warmup_fraction": 0.1, "final_fraction": 0.1},
        },
        environment={
            "sinkgd": "0.1.0",
            "commit": "3f2c9d1",
            "python": "3.11.2",
            "torch": "2.13.0",
            "device": "cpu, 2 threads",
            "platform": "Linux x86_64",
        },
        parameters=2_112_000,
        tokens_per_step=tokens_per_step,
    )
