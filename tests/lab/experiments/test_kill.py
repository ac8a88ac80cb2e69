"""A study whose processes are killed: the same command goes on, and ends where it would have."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sinkgd.lab.experiments.study_record import StudyRecord

pytestmark = pytest.mark.slow

RUNS = 3  # two rates, then one seed


def command(out: Path, shards: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "sinkgd.lab.cli", "experiment", "iterations", "--out", str(out)),
        *("--optimizer", "adamw-one-lr", "--seeds", "1", "--jobs", "2"),
        *("--data", str(shards), "--lr", "0.003,0.006"),
        *("--training.threads", "1", "--training.batch-size", "4"),
        *("--training.steps", "30", "--training.sequence-length", "16"),
        *("--evaluation.every-steps", "10", "--evaluation.tokens", "100"),
        *("--checkpoint.every-steps", "7", "--logging.print-every-steps", "1"),
    ]


def start(out: Path, shards: Path) -> subprocess.Popen[bytes]:
    """Start in a process group of its own; what it says goes to a file beside ``out``."""
    with log_of(out).open("ab") as log:
        return subprocess.Popen(
            command(out, shards), stdout=log, stderr=log, start_new_session=True
        )


def log_of(out: Path) -> Path:
    return out.with_suffix(".log")


def finish(out: Path, shards: Path) -> str:
    process = start(out, shards)
    code = process.wait(timeout=240)
    said = log_of(out).read_text(encoding="utf-8")
    assert code == 0, said
    return said


def losses(out: Path) -> dict[str, list[float]]:
    record = StudyRecord.read(out / "study.jsonl")
    return {name: [e.val_loss for e in r.run.evaluations] for name, r in record.runs.items()}


def steps_in(out: Path) -> int:
    files = list(out.glob("runs/*/run.jsonl"))
    return sum(path.read_text(encoding="utf-8").count('"kind": "step"') for path in files)


def wait_for_steps(process: subprocess.Popen[bytes], out: Path, steps: int) -> None:
    while steps_in(out) < steps:
        assert process.poll() is None, log_of(out).read_text()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """The losses of a study that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "study"
    finish(out, shards)
    found = losses(out)
    assert len(found) == RUNS
    return found


@pytest.mark.parametrize(("all_processes", "kills"), [(True, 2), (False, 1)], ids=["group", "one"])
def test_killed_at_random_moments_the_losses_are_the_same_to_the_bit(
    shards, whole, tmp_path, all_processes, kills
):
    seed = time.time_ns()
    draw = random.Random(seed)
    out = tmp_path / "killed"
    for steps in sorted(draw.sample(range(1, 80), kills)):
        process = start(out, shards)
        wait_for_steps(process, out, steps)
        time.sleep(draw.random() * 0.3)
        if all_processes:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
    said = finish(out, shards)
    assert losses(out) == whole, f"seed {seed}\n{said}"


def test_a_polite_signal_saves_and_the_same_command_goes_on(shards, whole, tmp_path):
    out = tmp_path / "stopped"
    process = start(out, shards)
    wait_for_steps(process, out, 10)
    os.killpg(process.pid, signal.SIGTERM)
    code = process.wait(timeout=120)
    said = log_of(out).read_text(encoding="utf-8")
    assert code == 128 + signal.SIGTERM, said
    assert "stopped by SIGTERM; " in said
    assert "Everything is saved. Go on with: sinkgd experiment " in said
    assert steps_in(out) < 30 * RUNS
    finish(out, shards)
    assert losses(out) == whole
