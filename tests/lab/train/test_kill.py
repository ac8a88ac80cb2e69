"""Real processes, killed: what `sinkgd train` leaves behind is enough to go on exactly."""

import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sinkgd.lab.results import Run

pytestmark = pytest.mark.slow

STEPS = 40
CHECKPOINT_EVERY = 7

Curve = tuple[list[tuple], list[tuple]]


@pytest.fixture(scope="module")
def options(shards: Path) -> list[str]:
    return [
        *("--data.corpus", str(shards), "--training.threads", "1"),
        *("--training.steps", str(STEPS), "--checkpoint.every-steps", str(CHECKPOINT_EVERY)),
        *("--training.batch-size", "16", "--training.sequence-length", "32"),
        *("--evaluation.every-steps", "4", "--evaluation.tokens", "100"),
    ]


@pytest.fixture(scope="module")
def whole(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """The curve of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    finish(out, options)
    return curve(out)


def start(out: Path, options: list[str], **popen: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sinkgd.lab.cli", "train", "--out", str(out), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **popen)


def finish(out: Path, options: list[str]) -> str:
    process = start(out, options)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def recorded_steps(out: Path) -> int:
    results = out / "run.jsonl"
    return results.read_text(encoding="utf-8").count('"kind": "step"') if results.exists() else 0


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    while recorded_steps(out) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def curve(out: Path) -> Curve:
    result = Run.read(out / "run.jsonl")
    assert result.finished
    return (
        [(s.step, s.tokens, s.loss, s.lr, s.gradient_norm) for s in result.steps],
        [(e.step, e.val_loss, e.eval_tokens) for e in result.evaluations],
    )


def test_killed_at_random_steps_the_curve_is_the_same_to_the_bit(options, whole, tmp_path):
    seed = time.time_ns()
    draw = random.Random(seed)
    killed = tmp_path / "killed"
    # The first kill is before any checkpoint, the second and third are anywhere.
    steps = [draw.randint(1, 5), *sorted(draw.sample(range(6, STEPS), 2))]
    for step in steps:
        process = start(killed, options)
        wait_for_step(process, killed, step)
        time.sleep(draw.random() * 0.05)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(killed, options)
    assert curve(killed) == whole, f"seed {seed}, killed at steps {steps}"
    assert '"kind": "resume"' in (killed / "run.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_polite_signal_saves_says_how_to_go_on_and_has_its_exit_code(
    options, whole, tmp_path, number, code
):
    out = tmp_path / "stopped"
    process = start(out, options)
    wait_for_step(process, out, 10)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    step = recorded_steps(out)
    assert f"stopped by {number.name} after step {step} of {STEPS}" in said
    assert (out / "checkpoints" / f"step-{step:08d}").is_dir()
    assert Run.read(out / "run.jsonl").end.status == "interrupted"
    command = said.strip().rpartition("Go on with: sinkgd train ")[2].split()
    again = [sys.executable, "-m", "sinkgd.lab.cli", "train", *command]
    subprocess.run(again, check=True, capture_output=True, timeout=120)
    assert curve(out) == whole


def test_a_disk_that_fills_up_is_a_clear_error_and_leaves_no_half_checkpoint(
    options, whole, tmp_path
):
    size_limit = 2 * 2**20  # less than the weights, more than the results

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_limit, size_limit))

    out = tmp_path / "full"
    process = start(out, options, preexec_fn=limit_file_size)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    error = said.strip().splitlines()[-1]
    assert error.startswith(f"error: cannot write checkpoint {out}/checkpoints/step-00000007: ")
    assert "make room there" in error
    assert not list((out / "checkpoints").iterdir())
    last = json.loads((out / "run.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert (last["kind"], last["status"]) == ("end", "failed")
    finish(out, options)
    assert curve(out) == whole
