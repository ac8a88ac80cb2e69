"""What SR-Sinkhorn and deflation do to the directions of real gradients, and which directions help.

    python benchmarks/directions/directions.py RECORD CORPUS
    python benchmarks/directions/directions.py RECORD CORPUS --presets llama-nano --steps 480

For each preset, the script trains a model by the recipe ``sinkgd`` in the setting of study table1,
on one thread, and looks at every hidden matrix in some steps:

- G, the gradient of a batch, and S, the mean gradient of `SIGNAL` other batches, which has far less
  noise;
- X, the update by SR-Sinkhorn, of root-mean-square 1;
- D, X after deflation, before it is brought back to root-mean-square 1, so that X - D is what
  deflation takes away.

A line of the record is one matrix in one step: the singular values of G, X and D, where G has
root-mean-square 1 too; for each direction (u, v) of X, the parts of G and S along this direction,
uᵀGv and uᵀSv; and the cosines of G, X and D with S. A matrix of independent entries of variance 1
has no singular value far above √m + √n: the directions of X above this edge stand out.

Another line is the whole model in one step: the loss on other batches after a step along X - D,
along D, and along X, in all hidden matrices together. Each of the three is scaled to
root-mean-square 1 in each matrix, so that a step of length 1 changes a weight by the present rate;
`LENGTHS` are tried. Other parameters stay as they are.

A look is recorded when it is complete. The same command skips presets that the record holds.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sinkgd import sr_sinkhorn
from sinkgd.deflation import deflate
from sinkgd.lab.data import Batch
from sinkgd.lab.experiments.studies.table1 import TABLE1
from sinkgd.lab.experiments.study import plan_of
from sinkgd.lab.train.config import RunConfig
from sinkgd.lab.train.loop import training_steps
from sinkgd.lab.train.machine import describe_environment
from sinkgd.lab.train.resolve import resolve
from sinkgd.lab.train.setup import Job, set_up
from sinkgd.lab.train.training_step import loss_of
from sinkgd.optim.param_groups import DEFLATED_RANK, LR, MATRIX_LR_SCALE

PRESETS = ("llama-nano-48", "llama-nano-64", "llama-nano-96", "llama-nano", "llama-20m")
SHARES = (0.02, 0.1, 0.3, 0.6, 1.0)  # shares of the steps at which to look
SIGNAL = 64  # batches
HELD_OUT = 8  # batches of the losses
LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Train and look."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, help="file of JSON lines")
    parser.add_argument("corpus", help="folder of prepared text")
    parser.add_argument("--presets", nargs="+", default=PRESETS, help="models (%(default)s)")
    parser.add_argument("--steps", type=int, default=240, help="steps of each model (%(default)s)")
    args = parser.parse_args(argv)
    args.record.parent.mkdir(parents=True, exist_ok=True)
    for preset in args.presets:
        if preset in finished(args.record):
            print(f"{preset}: in the record")  # noqa: T201 - this is a script
            continue
        job = set_up(resolve(config_of(preset, args.corpus, args.steps)), print)
        start = {"kind": "start", "preset": preset, "steps": args.steps}
        write(args.record, [{**start, "environment": describe_environment(job.device)}])
        run(job, preset, args.record)
        write(args.record, [{"kind": "end", "preset": preset}])


def config_of(preset: str, corpus: str, steps: int) -> RunConfig:
    """Return the setting of the deflated arm of table1, with another model."""
    plan = plan_of(TABLE1, "machine")
    (arm,) = (arm for arm in plan.arms if arm.name == "sinkgd")
    rates = {"optimizer.lr": LR, "optimizer.matrix_lr": MATRIX_LR_SCALE * LR}
    config = arm.config(plan.shared, rates, seed=0)
    return replace(
        config,
        model=replace(config.model, preset=preset),
        data=replace(config.data, corpus=corpus, vocab_size=None),
        training=replace(config.training, threads=1, steps=steps),
    )


def run(job: Job, preset: str, record: Path) -> None:
    """Train to the end, and look before some of the steps."""
    steps = job.config.training.steps
    looks = {max(1, round(share * steps)) for share in SHARES}
    matrices = {
        name: param
        for group in job.state.optimizer.param_groups
        if group["algorithm"] == "sinkgd"
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }

    def look(*_: object) -> None:
        step = job.state.step + 1
        if step in looks:
            place = {"preset": preset, "step": step}
            write(record, [{**place, **line} for line in look_at(job, matrices)])
            print(f"{preset}: step {step} of {steps}", flush=True)  # noqa: T201 - this is a script

    job.state.optimizer.register_step_pre_hook(look)
    for _ in training_steps(job):
        pass


def look_at(job: Job, matrices: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Return a line for each matrix, and one for the model. Gradients stay as they are."""
    model, params = job.state.model, list(matrices.values())
    grads = [param.grad.double() for param in params if param.grad is not None]
    # Batches that the run has not seen and will not see.
    first = job.config.training.steps
    signal = mean_gradients(model, params, [job.batches.at(first + i) for i in range(SIGNAL)])
    updates = [sr_sinkhorn(grad) for grad in grads]
    deflated = [deflate(update, DEFLATED_RANK) for update in updates]
    lines = [
        {"kind": "matrix", "matrix": name, **measure(*own)}
        for name, *own in zip(matrices, grads, signal, updates, deflated, strict=True)
    ]
    rate = job.state.optimizer.param_groups[0]["lr"]
    batches = [job.batches.at(first + SIGNAL + i) for i in range(HELD_OUT)]
    taken = [update - rest for update, rest in zip(updates, deflated, strict=True)]
    losses = {
        "before": losses_along(model, params, updates, [0.0], batches)[0],
        **{
            name: losses_along(
                model, params, [*map(of_size_1, along)], [rate * own for own in LENGTHS], batches
            )
            for name, along in (("taken", taken), ("rest", deflated), ("update", updates))
        },
    }
    return [*lines, {"kind": "model", "rate": rate, "lengths": LENGTHS, "losses": losses}]


def measure(grad: Tensor, signal: Tensor, update: Tensor, deflated: Tensor) -> dict[str, Any]:
    """Return what the record has of a matrix; all are float64, (m, n)."""
    u, values, vt = torch.linalg.svd(update, full_matrices=False)
    size = grad.square().mean().sqrt()
    return {
        "shape": list(grad.shape),
        "gradient": rounded(torch.linalg.svdvals(grad / size)),
        "update": rounded(values),
        "deflated": rounded(torch.linalg.svdvals(deflated)),
        "along gradient": rounded(((u.mT @ grad) * vt).sum(-1) / size),
        "along signal": rounded(((u.mT @ signal) * vt).sum(-1) / size),
        "cosines": {
            name: round(cosine(one, signal), 4)
            for name, one in (("gradient", grad), ("update", update), ("deflated", deflated))
        },
    }


def mean_gradients(
    model: nn.Module, params: Sequence[nn.Parameter], batches: Sequence[Batch]
) -> list[Tensor]:
    """Return the gradients of the mean loss over batches, float64."""
    total = [torch.zeros_like(param, dtype=torch.float64) for param in params]
    for batch in batches:
        loss = loss_of(model, batch.inputs, batch.targets) / batch.target_count
        for own, grad in zip(total, torch.autograd.grad(loss, params), strict=True):
            own.add_(grad, alpha=1 / len(batches))
    return total


@torch.no_grad()
def losses_along(
    model: nn.Module,
    params: Sequence[nn.Parameter],
    directions: Sequence[Tensor],
    lengths: Sequence[float],
    batches: Sequence[Batch],
) -> list[float]:
    """Return the mean loss after a step of each length, and restore the weights bit for bit."""
    before = [param.clone() for param in params]
    found = []
    for length in lengths:
        for param, own, direction in zip(params, before, directions, strict=True):
            param.copy_(own - length * direction)
        losses = [loss_of(model, one.inputs, one.targets) / one.target_count for one in batches]
        found.append(round(float(torch.stack(losses).mean()), 6))
    for param, own in zip(params, before, strict=True):
        param.copy_(own)
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of the angle between two matrices as vectors."""
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def of_size_1(matrix: Tensor) -> Tensor:
    """Bring a matrix to root-mean-square 1."""
    return matrix / matrix.square().mean().sqrt()


def rounded(values: Tensor) -> list[float]:
    """Return numbers with four digits after the point."""
    return [round(value, 4) for value in values.tolist()]


def write(record: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Append lines to the record."""
    with record.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def finished(record: Path) -> set[str]:
    """Return the presets whose runs are complete in the record."""
    if not record.exists():
        return set()
    lines = map(json.loads, record.read_text(encoding="utf-8").splitlines())
    return {line["preset"] for line in lines if line["kind"] == "end"}


if __name__ == "__main__":
    main()
