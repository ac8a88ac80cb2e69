"""Hurt two ranks of `sinkgd train` in every way that one machine allows, and see what is left.

    python benchmarks/faults/faults.py OUT.jsonl [KILLS]

trains llama-nano on the embedded corpus under torchrun, again and again, in a temporary folder:

    killed     SIGKILL to a random rank at a random moment, KILLS times (default 20) in one run; the
               script starts the run again each time
    restarted  one such kill, after which torchrun starts the ranks again (--max-restarts)
    slow       a rank stands still for ten seconds, and goes on
    hung       a rank stands still forever
    full       files may not grow beyond 2 MiB, as on a full disk
    truncated  the last checkpoint of a stopped run has lost a byte of a rank's file

Each line of OUT says what was done and what came of it. ``equal`` says whether the final loss curve
equals, bit for bit, that of a run that nothing stopped. The script finds the ranks in Linux's list
of torchrun's child processes.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sinkgd.lab.results import Run
from sinkgd.lab.train import RunFolder
from sinkgd.lab.train.machine import describe_environment, select_device

STEPS, CHECKPOINT_EVERY = 150, 6
SEED = 0
Told = dict[str, Any]
OPTIONS = [
    *("--training.steps", str(STEPS), "--checkpoint.every-steps", str(CHECKPOINT_EVERY)),
    *("--training.batch-size", "8", "--training.sequence-length", "64"),
    *("--evaluation.every-steps", "25", "--evaluation.tokens", "2000"),
    *("--training.threads", "1"),
]


class Sitting:
    """A run under torchrun, from its start to its end."""

    def __init__(self, out: Path, restarts: int = 0) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        counts = ["--nproc-per-node", "2", "--max-restarts", str(restarts)]
        program = ["-m", "sinkgd.lab", "train", "--out", str(out), *OPTIONS]
        self.out, self.log = out, out.with_name("log")
        with self.log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen([*torchrun, *counts, *program], stderr=file)
        self.began = len(lines(out))

    def wait_for_steps(self, count: int) -> bool:
        """Wait for ``count`` steps of this sitting; return False if it ends before them."""
        while sum('"kind": "step"' in line for line in lines(self.out)[self.began :]) < count:
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        return True

    def rank(self, number: int) -> int:
        """Return the process of a rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for child in map(int, children.split()):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"RANK={number}".encode() in environment:
                return child
        raise RuntimeError(f"torchrun has no rank {number}")

    def end(self) -> tuple[int, float]:
        """Wait for the end; return the exit code and the seconds of waiting."""
        began = time.monotonic()
        return self.process.wait(timeout=300), time.monotonic() - began

    def said(self, word: str) -> str:
        """Return the first line of the log that begins with ``word``."""
        found = (line for line in self.log.read_text().splitlines() if line.startswith(word))
        return next(found, "")


def lines(out: Path) -> list[str]:
    """Return the lines of a run's results."""
    results = out / "run.jsonl"
    return results.read_text(encoding="utf-8").splitlines() if results.exists() else []


def curve(out: Path) -> list[tuple[float, ...]]:
    """Return the values of steps and evaluations that must be the same in every run."""
    run = Run.read(out / "run.jsonl")
    steps = [(s.step, s.loss, s.lr, s.gradient_norm) for s in run.steps]
    return steps + [(e.step, e.val_loss, e.eval_tokens) for e in run.evaluations]


def last_checkpoint(out: Path) -> int:
    """Return the step of the last checkpoint; 0 where there is none."""
    names = [path.name for path in RunFolder(out).checkpoints.glob("step-*") if path.suffix == ""]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def finish(out: Path) -> None:
    """Start or resume the run, and let it reach its last step."""
    code, _ = Sitting(out).end()
    if code != 0:
        raise RuntimeError(f"{out} did not finish; see {out.with_name('log')}")


def resumed_at(out: Path) -> list[int]:
    """Return the steps from which sittings resumed."""
    records = map(json.loads, lines(out))
    return [record["step"] for record in records if record["kind"] == "resume"]


def killed(out: Path, kills: int) -> Iterator[Told]:
    """Kill ranks at random moments, as often as asked, and then let the run finish."""
    draw = random.Random(SEED)  # noqa: S311  no secret
    for number in range(1, kills + 1):
        rank, steps, delay = draw.randrange(2), draw.randint(1, 12), draw.random() * 0.2
        sitting = Sitting(out)
        if not sitting.wait_for_steps(steps):
            raise RuntimeError(f"the run ended before kill {number}; give it more steps")
        time.sleep(delay)
        after_step = Run.read(out / "run.jsonl").steps[-1].step
        os.kill(sitting.rank(rank), signal.SIGKILL)
        code, seconds = sitting.end()
        yield {
            "number": number,
            "rank": rank,
            "after_step": after_step,
            "exit_code": code,
            "seconds_to_end": seconds,
            "last_checkpoint": last_checkpoint(out),
            "said": sitting.said("error: "),
        }
    finish(out)


def restarted(out: Path, _kills: int) -> Iterator[Told]:
    """Kill a rank once, and let torchrun start all again."""
    sitting = Sitting(out, restarts=1)
    sitting.wait_for_steps(15)
    os.kill(sitting.rank(1), signal.SIGKILL)
    code, _ = sitting.end()
    yield {"exit_code": code, "said": sitting.said("error: ")}


def slow(out: Path, _kills: int) -> Iterator[Told]:
    """Let a rank stand still for ten seconds."""
    sitting = Sitting(out)
    sitting.wait_for_steps(15)
    process = sitting.rank(1)
    os.kill(process, signal.SIGSTOP)
    time.sleep(10)
    os.kill(process, signal.SIGCONT)
    code, _ = sitting.end()
    yield {"exit_code": code}


def hung(out: Path, _kills: int) -> Iterator[Told]:
    """Let a rank stand still forever."""
    sitting = Sitting(out)
    sitting.wait_for_steps(15)
    os.kill(sitting.rank(1), signal.SIGSTOP)
    code, seconds = sitting.end()
    said = sitting.said("error: ")
    yield {"exit_code": code, "seconds_to_end": seconds, "said": said}
    finish(out)


def full(out: Path, _kills: int) -> Iterator[Told]:
    """Let no file grow beyond 2 MiB: less than a rank's weights, more than the results."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 2**20, most))  # ranks inherit it
    sitting = Sitting(out)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    code, _ = sitting.end()
    left = [path.name for path in RunFolder(out).checkpoints.iterdir()]
    yield {"exit_code": code, "said": sitting.said("error: "), "left_in_checkpoints": left}
    finish(out)


def truncated(out: Path, _kills: int) -> Iterator[Told]:
    """Stop a run, and take a byte off a file of its last checkpoint."""
    sitting = Sitting(out)
    sitting.wait_for_steps(20)
    os.kill(sitting.rank(0), signal.SIGTERM)
    sitting.end()
    stopped_at = last_checkpoint(out)
    damaged = RunFolder(out).checkpoints / f"step-{stopped_at:08d}" / "__1_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    sitting = Sitting(out)
    code, _ = sitting.end()
    yield {"exit_code": code, "stopped_at": stopped_at, "said": sitting.said("warning: ")}


FAULTS = (killed, restarted, slow, hung, full, truncated)


def main() -> None:
    """Inject all faults, each into a run of its own."""
    path, kills = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20
    with tempfile.TemporaryDirectory() as folder, path.open("w", encoding="utf-8") as file:

        def tell(fault: str, told: Told) -> None:
            file.write(json.dumps({"fault": fault, **told}).replace(folder, "FOLDER") + "\n")
            file.flush()
            sys.stderr.write(f"{fault} {told}\n")

        def new_run(name: str) -> Path:
            parent = Path(folder) / name
            parent.mkdir()
            return parent / "run"

        environment = describe_environment(select_device("cpu"))
        tell("none", {"options": OPTIONS, "environment": environment})
        whole = new_run("whole")
        finish(whole)
        for fault in FAULTS:
            out = new_run(fault.__name__)
            for told in fault(out, kills):
                tell(fault.__name__, told)
            equal = curve(out) == curve(whole)
            tell(fault.__name__, {"resumed_at": resumed_at(out), "equal": equal})


if __name__ == "__main__":
    main()
