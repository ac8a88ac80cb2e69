"""Train the demo's model on several meshes, and compare each loss curve with that of one process.

    python benchmarks/mesh/curves.py OUT.jsonl [RECIPE]

trains llama-nano on the embedded corpus, in float32 and with the demo's batches, for 40 steps with
RECIPE (sinkgd): in one process, and under torchrun with FSDP2 (2 ranks), HSDP (2 × 2) and
FSDP2 × tensor parallelism (2 × 2). Each run on a mesh is stopped by SIGTERM on its way, and resumed
from its checkpoint three times: in one process, on another mesh, and on the same mesh. Each line of
OUT has the largest distance, over all steps and evaluations, between a curve and that of one
process, in nats.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sinkgd.lab.results import Run
from sinkgd.lab.train.machine import describe_environment, select_device

STEPS, STOP_AFTER = 40, 15
OPTIONS = [
    *("--training.steps", str(STEPS), "--training.precision", "float32"),
    *("--training.threads", "1", "--evaluation.every-steps", "10"),
]
HSDP, TENSOR = ["--mesh.dp-replicate", "2"], ["--mesh.tp", "2"]
MESHES = {  # ranks and options of the run, and of the other mesh on which it is resumed
    "FSDP2": ((2, []), (2, TENSOR)),
    "HSDP": ((4, HSDP), (2, [])),
    "FSDP2 × tp": ((4, TENSOR), (4, HSDP)),
}


def command(recipe: str, out: Path, ranks: int, mesh: list[str]) -> list[str]:
    """Return the command of a run."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    program = ["-m", "sinkgd.lab", "train", "--out", str(out), "--optimizer.recipe", recipe]
    return [sys.executable, *(torchrun if ranks > 1 else []), *program, *OPTIONS, *mesh]


def finish(recipe: str, out: Path, ranks: int = 1, mesh: list[str] | None = None) -> None:
    """Run to the last step, from wherever the run is."""
    subprocess.run(command(recipe, out, ranks, mesh or []), check=True)


def stop(recipe: str, out: Path, ranks: int, mesh: list[str]) -> None:
    """Run until some steps are recorded, and stop all ranks as torchrun does."""
    process = subprocess.Popen(command(recipe, out, ranks, mesh))
    results = out / "run.jsonl"
    while not results.exists() or results.read_text().count('"kind": "step"') < STOP_AFTER:
        if process.poll() is not None:
            raise RuntimeError(f"the run in {out} ended before step {STOP_AFTER}")
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.wait()


def distance(out: Path, reference: Path) -> dict[str, float]:
    """Return how far a curve is from another, and where both end."""
    found, expected = (Run.read(path / "run.jsonl") for path in (out, reference))
    steps = zip(found.steps, expected.steps, strict=True)
    evaluations = zip(found.evaluations, expected.evaluations, strict=True)
    return {
        "largest_loss_distance": max(abs(a.loss - b.loss) for a, b in steps),
        "largest_val_loss_distance": max(abs(a.val_loss - b.val_loss) for a, b in evaluations),
        "last_val_loss": found.evaluations[-1].val_loss,
    }


def main() -> None:
    """Train in one process and on every mesh, and record the distances."""
    recipe = sys.argv[2] if len(sys.argv) > 2 else "sinkgd"
    with tempfile.TemporaryDirectory() as temporary, Path(sys.argv[1]).open("w") as file:

        def tell(**values: object) -> None:
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
            file.flush()

        folder = Path(temporary)
        example = shlex.join(command("RECIPE", Path("FOLDER"), 2, ["MESH"])[1:])
        environment = describe_environment(select_device("cpu"))
        tell(command=f"python {example}", environment=environment)
        alone = folder / f"{recipe}-alone"
        finish(recipe, alone)
        tell(recipe=recipe, mesh="one process", **distance(alone, alone))
        for name, (own, other) in MESHES.items():
            out = folder / f"{recipe}-{name}"
            stop(recipe, out, *own)
            for where, ranks in {"one process": (1, []), "another mesh": other}.items():
                copy = folder / f"{recipe}-{name}-{where}"
                shutil.copytree(out, copy)
                finish(recipe, copy, *ranks)
                told = distance(copy, alone)
                tell(recipe=recipe, mesh=name, then=f"{where} {shlex.join(ranks[1])}", **told)
            finish(recipe, out, *own)
            tell(recipe=recipe, mesh=name, then="the same", **distance(out, alone))


if __name__ == "__main__":
    main()
