"""Tune the rate of each optimizer, run the best one with several seeds, and record it.

Every optimizer has a grid of rates, tried with one seed. If the best rate lies at an edge, the grid
grows by a factor of 2 until it does not. The best rate then runs with the reported seeds. Each line
of the record is one run, and runs that the record holds are not repeated.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from sinkgd.lab.train.config import OptimizerConfig
from sinkgd.lab.train.recipes import build_optimizer, resolve_optimizer
from sinkgd.optim.param_groups import ADAMW_UPDATE_SIZE

# Arms that use AdamW have its betas of 0.9 and 0.999.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "adamw": {"recipe": "adamw-one-lr"},
    "sinkgd": {"recipe": "sinkgd-finetune"},
    "sinkgd-plain": {"recipe": "sinkgd-finetune", "deflated_rank": 0},
    "rows-only": {"recipe": "rows-only", "beta2": 0.999},
    "muon": {"recipe": "muon", "beta2": 0.999},
    "sgd": {"recipe": "sgd"},
}
# The rates of matrices, as multiples of the rate that is tuned.
MATRIX_RATES: Mapping[str, float] = {"rows-only": ADAMW_UPDATE_SIZE, "muon": 1.0}

TUNING_SEED = 1000
SEEDS = (0, 1, 2)

Line = dict[str, Any]


class Job(NamedTuple):
    """One run."""

    arm: str
    rate: float
    seed: int


def optimizer_of(model: nn.Module, arm: str, rate: float) -> Optimizer:
    """Build the optimizer of an arm from the laboratory's recipe."""
    options = {**ARMS[arm], "lr": rate}
    if arm in MATRIX_RATES:
        options["matrix_lr"] = MATRIX_RATES[arm] * rate
    return build_optimizer(model, resolve_optimizer(OptimizerConfig(**options)))


def due(
    lines: Sequence[Line], grids: Mapping[str, Sequence[float]], score: Callable[[Line], float]
) -> list[Job]:
    """List the runs that the record lacks and whose rates are known by now.

    Args:
        lines: The record.
        grids: The first rates of each arm.
        score: What a run achieved: the higher, the better.
    """
    done = {Job(x["arm"], x["rate"], x["seed"]): score(x) for x in lines}
    wanted = []
    for arm, rates in grids.items():
        tried = {
            job.rate: y for job, y in done.items() if (job.arm, job.seed) == (arm, TUNING_SEED)
        }
        best = max(tried, key=lambda rate: tried[rate], default=0.0)
        if not set(rates) <= set(tried):
            wanted += [Job(arm, rate, TUNING_SEED) for rate in rates]
        elif best in (min(tried), max(tried)):
            wanted.append(Job(arm, best / 2 if best == min(tried) else best * 2, TUNING_SEED))
        else:
            wanted += [Job(arm, best, seed) for seed in SEEDS]
    return [job for job in wanted if job not in done]


def read(record: Path) -> list[Line]:
    """Return the lines of the record."""
    if not record.exists():
        return []
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]


def run_all(
    record: Path,
    grids: Mapping[str, Sequence[float]],
    run: Callable[[Job], Line],
    score: Callable[[Line], float],
    jobs: int,
) -> None:
    """Run what the record lacks, ``jobs`` runs at a time.

    Args:
        record: File to which each run adds a line.
        grids: The first rates of each arm.
        run: A function that can be pickled, and returns what is to be recorded.
        score: What a run achieved: the higher, the better.
        jobs: Processes.
    """
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        while todo := due(read(record), grids, score):
            for job, result in [(job, pool.submit(run, job)) for job in todo]:
                line = json.loads(json.dumps(job._asdict() | result.result()))
                with record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                words = f"{job.arm} at {job.rate:g}, seed {job.seed}"
                print(f"{words:40} {score(line):.4f}", flush=True)  # noqa: T201
