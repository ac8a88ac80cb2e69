"""Ranks train what one process trains, save what any number of them can read, and go on exactly."""

import math
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed as dist

from sinkgd.lab.results import Run
from sinkgd.lab.train.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    RunConfig,
    TrainingConfig,
)
from sinkgd.lab.train.mesh import mesh_shape
from sinkgd.lab.train.run import Outcome, train
from spawn import on_ranks
from stopping import stopping_at

pytestmark = pytest.mark.slow

STEPS, STOPPED = 8, 5
# Sums in another order move a weight by a few units of float32 a step: one process that takes
# its batches one sequence at a time differs from itself by 6e-5 in a gradient's norm near 5.
TOLERANCE = 2e-4

# Each has a mesh, and each what saves memory or divides work in another way.
SETTINGS = {
    "fsdp": {
        "mesh": {},
        "optimizer": {"recipe": "sinkgd"},
        "training": {
            "release_gradients": True,
            "recompute_activations": True,
            "loss_chunk_tokens": 8,
        },
        "checkpoint": {"asynchronous": True},
    },
    "hsdp": {
        "mesh": {"dp_replicate": 2},
        "optimizer": {"recipe": "adamw"},
        "training": {"batch_size": 8, "micro_batch_size": 1},
        "data": {"packing": "none"},
        "evaluation": {"batch_size": 6},
    },
    "fsdp-tp": {"mesh": {"tp": 2}, "optimizer": {"recipe": "sinkgd"}},
    "tp": {"mesh": {"tp": 2}, "optimizer": {"recipe": "sinkgd-stateless"}},
}
RANKS = {"fsdp": 2, "tp": 2, "hsdp": 4, "fsdp-tp": 4}


def base_config(shards: Path) -> RunConfig:
    return RunConfig(
        data=DataConfig(corpus=str(shards)),
        training=TrainingConfig(
            steps=STEPS, batch_size=4, sequence_length=16, precision="float32", threads=1
        ),
        evaluation=EvaluationConfig(every_steps=4, tokens=100),
        checkpoint=CheckpointConfig(every_steps=3),
    )


def settings(kind: str, shards: Path) -> RunConfig:
    base = base_config(shards)
    tables = {
        name: replace(getattr(base, name), **values) for name, values in SETTINGS[kind].items()
    }
    return replace(base, **tables)


def on_one_process(kind: str, shards: Path) -> RunConfig:
    return replace(settings(kind, shards), mesh=MeshConfig())


class Job(NamedTuple):
    config: RunConfig
    path: Path
    stops: bool = False  # by a signal to the last rank alone
    after: Path | None = None  # goes on from a copy of that run


def train_on_ranks(jobs: list[Job]) -> list[Outcome]:
    """Train one after the other."""
    outcomes = []
    last = dist.get_rank() == dist.get_world_size() - 1
    for job in jobs:
        if job.after is not None:
            if last:
                shutil.copytree(job.after, job.path)
            dist.barrier()
        with stopping_at(STOPPED) if job.stops and last else nullcontext():
            outcomes.append(train(job.config, job.path, echo=lambda _: None))
    return outcomes


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory) -> Path:
    """Of each kind a run that nothing stopped, one that was, and how that went on elsewhere."""
    folder = tmp_path_factory.mktemp("runs")
    configs = {kind: settings(kind, shards) for kind in SETTINGS}

    def own(kind):
        stopped = folder / f"{kind}-stopped"
        return [
            Job(configs[kind], folder / kind),
            Job(configs[kind], stopped, stops=True),
            Job(configs[kind], folder / f"{kind}-same", after=stopped),
        ]

    def other(kind, **mesh):
        config = replace(configs[kind], mesh=MeshConfig(**mesh))
        return Job(config, folder / f"{kind}-other", after=folder / f"{kind}-stopped")

    rounds = [
        (4, [*own("hsdp"), *own("fsdp-tp")]),
        (
            2,
            [
                *own("fsdp"),
                *own("tp"),
                other("fsdp", tp=2),
                other("hsdp", tp=2),
                other("fsdp-tp"),
                other("tp"),
            ],
        ),
    ]
    for ranks, jobs in rounds:
        for outcomes in on_ranks(ranks, train_on_ranks, jobs):
            for job, outcome in zip(jobs, outcomes, strict=True):
                # Every rank knows of a signal that one was sent.
                assert outcome == (
                    Outcome(STOPPED, signal.SIGTERM) if job.stops else Outcome(STEPS)
                )
    return folder


def curve(path: Path) -> tuple[list, list]:
    result = Run.read(path / "run.jsonl")
    assert result.finished
    return (
        [(s.step, s.tokens, s.loss, s.lr, s.gradient_norm) for s in result.steps],
        [
            (e.step, e.val_loss, e.eval_tokens, math.log(e.galore_perplexity))
            for e in result.evaluations
        ],
    )


def assert_near(found: Path, expected: Path) -> None:
    for ours, theirs in zip(curve(found), curve(expected), strict=True):
        assert len(ours) == len(theirs)
        for own, other in zip(ours, theirs, strict=True):
            assert own == pytest.approx(other, rel=0, abs=TOLERANCE)


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    """Returns the folder of a kind's run in one process."""
    folder = tmp_path_factory.mktemp("alone")

    def run(kind):
        train(on_one_process(kind, shards), folder / kind, echo=lambda _: None)
        return folder / kind

    return run


@pytest.mark.parametrize("kind", SETTINGS)
def test_ranks_learn_what_one_process_learns(runs, alone, kind):
    whole = Run.read(runs / kind / "run.jsonl")
    assert whole.steps[-1].loss < whole.steps[0].loss - 0.5
    assert whole.start.environment["mesh"] == mesh_of(kind)
    assert_near(runs / kind, alone(kind))


def mesh_of(kind):
    shape = mesh_shape(MeshConfig(**SETTINGS[kind]["mesh"]), RANKS[kind])
    return dict(zip(("dp_replicate", "dp_shard", "tp"), shape, strict=True))


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_same_mesh_goes_on_bit_for_bit(runs, kind):
    assert curve(runs / f"{kind}-same") == curve(runs / kind)


@pytest.mark.parametrize("kind", SETTINGS)
def test_another_mesh_goes_on(runs, kind):
    assert_near(runs / f"{kind}-other", runs / kind)


@pytest.mark.parametrize("kind", SETTINGS)
def test_one_process_goes_on(runs, shards, tmp_path, kind):
    shutil.copytree(runs / f"{kind}-stopped", tmp_path / kind)
    train(on_one_process(kind, shards), tmp_path / kind, echo=lambda _: None)
    assert_near(tmp_path / kind, runs / kind)


@pytest.mark.parametrize("kind", SETTINGS)
def test_each_rank_holds_and_writes_its_part(runs, alone, kind):
    memory = Run.read(runs / kind / "run.jsonl").end.memory
    whole = Run.read(alone(kind) / "run.jsonl").end.memory
    pieces = RANKS[kind] // mesh_of(kind)["dp_replicate"]
    assert memory.weights_bytes == pytest.approx(whole.weights_bytes / pieces, rel=0.02)
    assert memory.state_bytes == pytest.approx(whole.state_bytes / pieces, rel=0.02, abs=1)
    files = (runs / kind / "checkpoints" / f"step-{STEPS:08d}").glob("*.distcp")
    written = sum(file.stat().st_size for file in files)
    everything = whole.weights_bytes + whole.state_bytes
    assert everything < written < 1.3 * everything  # each number once, and what names it


@pytest.mark.parametrize(
    ("mesh", "ranks", "message"),
    [
        (MeshConfig(dp_shard=4), 1, r"= 4 ranks, but 1 is running; .*torchrun --nproc-per-node 4"),
        (MeshConfig(dp_replicate=2, tp=2), 6, "dp_shard 1 × tp 2 = 4 ranks, but 6 are running"),
    ],
)
def test_a_mesh_that_does_not_fit_the_ranks_is_refused(mesh, ranks, message):
    with pytest.raises(ConfigError, match=message):
        mesh_shape(mesh, ranks)


def refused(configs: list[RunConfig], folder: Path) -> list[str]:
    messages = []
    for i, config in enumerate(configs):
        with pytest.raises(ConfigError) as caught:
            train(config, folder / str(i), echo=lambda _: None)
        messages.append(str(caught.value))
    return messages


def test_what_a_mesh_cannot_divide_is_refused_by_every_rank(shards, tmp_path):
    base = base_config(shards)
    configs = [
        replace(base, training=replace(base.training, batch_size=3)),
        replace(base, mesh=MeshConfig(tp=2), training=replace(base.training, sequence_length=15)),
    ]
    first, second = on_ranks(2, refused, configs, tmp_path)
    assert first == second
    assert "batch_size is 3, which cannot be divided into 2 equal parts" in first[0]
    assert "mesh.tp is 2, which does not divide the 15 tokens of a sequence" in first[1]
