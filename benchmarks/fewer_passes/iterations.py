"""How many iterations real gradients need, cold and warm, and how fewer iterations affect the loss.

Run ``python benchmarks/fewer_passes/iterations.py OUT.jsonl`` from the root of the repository, with
``sinkgd[lab]`` installed. It trains the demo's SinkGD run once for each variant, on one thread, and
appends one line per variant with the final validation loss. For the plain variant, the line also
has, at some steps, the number of iterations of every block matrix until no row is off its length by
more than 1e-3: from ones (cold), and from the converged scales of the step before (warm). Variants
that OUT.jsonl already has are not run again.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from sinkgd.kernels import select
from sinkgd.lab.data import evaluation_batches
from sinkgd.lab.train.config import OptimizerConfig, RunConfig
from sinkgd.lab.train.evaluate import evaluate
from sinkgd.lab.train.loop import training_steps
from sinkgd.lab.train.machine import describe_environment
from sinkgd.lab.train.resolve import resolve
from sinkgd.lab.train.setup import Job, set_up

# What each variant sets in the groups of hidden matrices.
VARIANTS: dict[str, dict[str, object]] = {
    "L=5": {"sinkhorn_iterations": 5},
    "L=1": {"sinkhorn_iterations": 1},
    "L=2": {"sinkhorn_iterations": 2},
    "L=1, warm_start": {"sinkhorn_iterations": 1, "warm_start": True},
    "L=2, warm_start": {"sinkhorn_iterations": 2, "warm_start": True},
    "L=50, tol=1e-3": {"sinkhorn_iterations": 50, "tol": 1e-3},
}
TOL = 1e-3
MOST = 200
CLOSE_LOOKS = (2, 20, 40, 100, 200, 300, 400)


def main(out: Path) -> None:
    """Run the variants that ``out`` does not hold yet."""
    done = {json.loads(line)["variant"] for line in _lines(out)}
    for variant, options in VARIANTS.items():
        if variant not in done:
            result = run(options, look=variant == "L=5")
            line = json.dumps({"variant": variant, "options": options, **result})
            with out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            print(variant, result["val_loss"], flush=True)  # noqa: T201 - this is a script


def run(options: dict[str, object], *, look: bool) -> dict[str, object]:
    """Train the demo's model once; return its loss and, with ``look``, the iterations counted."""
    base = RunConfig()
    training = replace(base.training, threads=1)
    optimizer = OptimizerConfig(recipe="sinkgd-paper")
    job = set_up(resolve(replace(base, training=training, optimizer=optimizer)), print)
    groups = [g for g in job.state.optimizer.param_groups if g["algorithm"] == "sinkgd"]
    for group in groups:
        group.update(options)
    looks: list[dict[str, object]] = []
    before: dict[torch.Tensor, torch.Tensor] = {}

    def count(*_: object) -> None:
        step = job.state.step + 1
        matrices = [p for group in groups for p in group["params"]]
        if step in CLOSE_LOOKS:
            grads = [p.grad for p in matrices]
            cold = [iterations(grad, None) for grad in grads]
            warm = [iterations(p.grad, before[p]) for p in matrices]
            looks.append({"step": step, "cold": cold, "warm": warm, "l5": [*map(error, grads)]})
        if step + 1 in CLOSE_LOOKS:
            for p in matrices:
                col = select("cpu", p.device).scales([p.grad], MOST)[0].col
                before[p] = col / col.max()

    if look:
        job.state.optimizer.register_step_pre_hook(count)
    for _ in training_steps(job):
        pass
    return {
        "val_loss": _val_loss(job),
        "looks": looks,
        "summary": [_summary(one) for one in looks],
        "environment": describe_environment(job.device),
    }


def iterations(grad: torch.Tensor, start: torch.Tensor | None) -> int:
    """Count the iterations until no row is off its length by more than `TOL`, relative."""
    backend = select("cpu", grad.device)
    for num_iters in range(1, MOST):
        if error(grad, num_iters, start, backend.name) <= TOL:
            return num_iters
    return MOST


def error(
    grad: torch.Tensor, num_iters: int = 5, start: torch.Tensor | None = None, name: str = "cpu"
) -> float:
    """Return the largest relative difference between the length of an update's row and √n."""
    backend = select(name, grad.device)
    row, col = backend.scales([grad], num_iters, starts=[start])[0]
    lengths = (row * grad * col).norm(dim=1) / grad.shape[1] ** 0.5
    return float((lengths[lengths > 0] - 1).abs().max())


def _summary(look: dict[str, object]) -> str:
    parts = [f"step {look['step']}"]
    for kind in ("cold", "warm", "l5"):
        values = look[kind]
        assert isinstance(values, list)
        parts.append(f"{kind} median {statistics.median(values):.3g} most {max(values):.3g}")
    return "; ".join(parts)


def _val_loss(job: Job) -> float:
    config = job.config
    batches = evaluation_batches(
        job.validation,
        sequence_length=config.training.sequence_length,
        batch_size=config.training.batch_size,
        max_tokens=config.evaluation.tokens,
        packing=config.data.packing,
    )
    score = evaluate(job.state.model, batches, precision=config.training.precision, mesh=job.mesh)
    return score.nats_per_token


def _lines(path: Path) -> Iterator[str]:
    if path.exists():
        yield from path.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
