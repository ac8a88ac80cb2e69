"""The grid behind the laboratory's default learning rates, with equally many runs per recipe.

Run ``python benchmarks/learning_rates/grid.py FOLDER`` from the root of the repository, with
``sinkgd[lab]`` installed. It trains every point with ``sinkgd train``, two at a time with one
thread each, prints a table and writes ``FOLDER/grid.jsonl``. If the command was stopped, the same
command goes on.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sinkgd.lab.results import Run

# recipe: (lr, matrix_lr) of each run; None where the recipe has one rate for all
GRID: dict[str, list[tuple[float, float | None]]] = {
    "sinkgd-paper": [
        (0.01, 1e-3),
        (0.02, 1e-3),
        (0.04, 1e-3),
        (0.08, 1e-3),
        (0.16, 1e-3),
        (0.02, 2e-3),
        (0.04, 2e-3),
        (0.08, 5e-4),
    ],
    "adamw": [
        (0.01, 3e-3),
        (0.02, 3e-3),
        (0.04, 3e-3),
        (0.08, 3e-3),
        (0.02, 1.5e-3),
        (0.04, 1.5e-3),
        (0.08, 1.5e-3),
        (0.16, 1.5e-3),
    ],
    "adamw-one-lr": [(lr, None) for lr in (1e-3, 1.5e-3, 2e-3, 2.5e-3, 3e-3, 4e-3, 6e-3, 1.2e-2)],
}


def train(folder: Path, recipe: str, lr: float, matrix_lr: float | None) -> Path:
    """Train one point, or resume its run; return the results file."""
    out = folder / f"{recipe}-lr{lr:g}"
    options = ["--optimizer.recipe", recipe, "--optimizer.lr", str(lr)]
    if matrix_lr is not None:
        out = folder / f"{recipe}-lr{lr:g}-matrix_lr{matrix_lr:g}"
        options += ["--optimizer.matrix-lr", str(matrix_lr)]
    options += ["--training.threads", "1", "--evaluation.every-steps", "100"]
    command = [sys.executable, "-m", "sinkgd.lab.cli", "train", "--out", str(out), *options]
    subprocess.run(command, check=True)
    return out / "run.jsonl"


def record(path: Path) -> dict[str, Any]:
    """Return one run as a line of the grid's record: its options, loss and environment."""
    run = Run.read(path)
    return {
        "recipe": run.start.recipe,
        "optimizer": run.start.config["optimizer"],
        "steps": run.steps[-1].step,
        "final": asdict(run.evaluations[-1]),
        "finished": run.finished,
        "environment": run.start.environment,
    }


def main(folder: Path) -> None:
    """Run the grid and print the final validation losses."""
    points = [(recipe, *rates) for recipe, grid in GRID.items() for rates in grid]
    with ThreadPoolExecutor(max_workers=2) as pool:
        paths = list(pool.map(lambda point: train(folder, *point), points))
    records = [record(path) for path in paths]
    lines = "".join(json.dumps(row) + "\n" for row in records)
    (folder / "grid.jsonl").write_text(lines, encoding="utf-8")
    print("| recipe | lr | matrix_lr | val_loss |\n|---|---|---|---|")  # noqa: T201
    for (recipe, lr, matrix_lr), row in zip(points, records, strict=True):
        loss = row["final"]["val_loss"]
        print(f"| {recipe} | {lr:g} | {matrix_lr or '–'} | {loss:.3f} |")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
