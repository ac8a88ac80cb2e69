"""How far the tempered update is from the gradient, on a model in training.

Run ``python benchmarks/tempered/direction.py OUT.jsonl [CORPUS]`` from the root of the repository,
with ``sinkgd[lab]`` installed; without a corpus it takes the embedded one. It trains the machine
scale's Lens L6 with its control, AdamWSPAM, on one thread. At some steps it measures every matrix
of the blocks, and writes the least, the median and the largest of each of these values:

- the cosines between the gradient and each variant's update, between the updates of the variants,
  and between the gradient and SinkGD's update;
- the root-mean-square of each variant's update, relative to that of the gradient;
- the root-mean-square of the gradient itself. The sizes of the tempered steps vary as much over
  matrices and steps, while SinkGD's steps all have root-mean-square 1.
"""

import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from sinkgd import sr_sinkhorn, temper
from sinkgd.lab.experiments.studies.lens import CONTROL, LENS, VARIANTS
from sinkgd.lab.experiments.study import plan_of
from sinkgd.lab.train.loop import training_steps
from sinkgd.lab.train.machine import describe_environment
from sinkgd.lab.train.resolve import resolve
from sinkgd.lab.train.setup import set_up

CLOSE_LOOKS = (1, 24, 120, 240)
LR = 0.0025  # within the control's grid


def main(out: Path, corpus: str | None) -> None:
    """Train the control once, and write how updates of its matrices compare with the gradients."""
    plan = plan_of(LENS, "machine")
    (arm,) = (arm for arm in plan.arms if arm.name == CONTROL)
    config = arm.config(plan.shared, {"optimizer.lr": LR}, seed=0)
    data = replace(config.data, corpus=corpus, vocab_size=None) if corpus else config.data
    training = replace(config.training, threads=1)
    job = set_up(resolve(replace(config, data=data, training=training)), print)
    matrices = {
        name: param
        for name, param in job.state.model.named_parameters()
        if param.ndim == 2 and ".h." in name
    }

    def look(*_: object) -> None:
        step = job.state.step + 1
        if step in CLOSE_LOOKS:
            rows = [measure(p.grad) for p in matrices.values() if p.grad is not None]
            found = {key: _spread([row[key] for row in rows]) for key in rows[0]}
            line = {"step": step, "matrices": len(rows), **found}
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)  # noqa: T201 - this is a script

    out.write_text(
        json.dumps({"lr": LR, "environment": describe_environment(job.device)}) + "\n",
        encoding="utf-8",
    )
    job.state.optimizer.register_step_pre_hook(look)
    for _ in training_steps(job):
        pass


def measure(grad: Tensor) -> dict[str, float]:
    """Return cosines, sizes relative to the gradient's, and the size of the gradient."""
    grad = grad.double()
    updates = {name: temper(grad, tau, n_iter) for name, (tau, n_iter) in VARIANTS.items()}
    found = {f"cos({name}, gradient)": cosine(update, grad) for name, update in updates.items()}
    for (one, a), (other, b) in combinations(updates.items(), 2):
        found[f"cos({one}, {other})"] = cosine(a, b)
    found["cos(SinkGD, gradient)"] = cosine(sr_sinkhorn(grad), grad)
    for name, update in updates.items():
        found[f"rms({name}) / rms(gradient)"] = (update.norm() / grad.norm()).item()
    found["rms(gradient)"] = grad.square().mean().sqrt().item()
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of the angle between two matrices as vectors."""
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def _spread(values: list[float]) -> Mapping[str, float]:
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
