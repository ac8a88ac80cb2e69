"""Real ranks: `sinkgd train` under torchrun, with what it takes to hurt one of them."""

import subprocess
import sys
import time
from pathlib import Path

PATIENCE = 120  # seconds


def start(
    out: Path, options: list[str], *, ranks: int = 2, restarts: int = 0, **popen: object
) -> subprocess.Popen[str]:
    """Start a run; its output is to be read from ``out.log``, beside ``out``."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    counts = ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    program = ["-m", "sinkgd.lab", "train", "--out", str(out), *options]
    with log(out).open("w", encoding="utf-8") as file:
        return subprocess.Popen([*torchrun, *counts, *program], stderr=file, text=True, **popen)


def log(out: Path) -> Path:
    return out.with_name(f"{out.name}.log")


def said(out: Path) -> str:
    return log(out).read_text(encoding="utf-8")


def process_of(torchrun: subprocess.Popen[str], rank: int) -> int:
    """Return the number of the process that is a rank."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children")
    for child in children.read_text(encoding="utf-8").split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return int(child)
    raise AssertionError(f"torchrun has no rank {rank}")


def wait_for_step(torchrun: subprocess.Popen[str], out: Path, step: int) -> None:
    results = out / "run.jsonl"
    for _ in range(PATIENCE * 100):
        if results.exists() and results.read_text(encoding="utf-8").count('"kind": "step"') >= step:
            return
        assert torchrun.poll() is None, said(out)
        time.sleep(0.01)
    raise AssertionError(f"step {step} did not come within {PATIENCE} seconds: {said(out)}")
