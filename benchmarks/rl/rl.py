"""Train a policy on verifiable rewards, with AdamW, SGD and SinkGD.

A small LLaMA first learns from examples to add two numbers of two digits, until it answers about a
sixth of the sums. Then it learns from rewards alone: it samples eight answers to each of 32 sums,
an answer gets 1 if it is right and 0 if not, and the policy gradient weighs each answer by its
reward minus the mean of its sum's answers, divided by their standard deviation (GRPO, Shao et al.,
https://arxiv.org/abs/2402.03300; one update for each sample, no penalty). A tenth of all sums is
held out: the share of them that greedy decoding answers is the result.

Each line of the record is one run. Every optimizer has a grid of five rates, tried with one seed;
the best rate then runs with the reported seeds. A seed draws the sums and the answers; all runs
start from one model. Runs that the record holds are not repeated.

    python benchmarks/rl/rl.py benchmarks/rl/RECORD.jsonl
"""

import argparse
import copy
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from sinkgd.lab.models import build_model
from sinkgd.lab.train.config import OptimizerConfig
from sinkgd.lab.train.machine import describe_environment
from sinkgd.lab.train.recipes import build_optimizer, resolve_optimizer
from sinkgd.optim.param_groups import ADAMW_UPDATE_SIZE

PLUS, EQUALS, END, PAD = 10, 11, 12, 13  # after the ten digits
VOCABULARY = 16
PROMPT, ANSWER = 6, 4  # tokens: "12+34=", and at most three digits and the end
LIMIT = 100  # terms are below it

EXAMPLES = {"steps": 400, "batch": 128, "lr": 2e-3}  # of the supervised training
REWARDS = {"steps": 150, "sums": 32, "answers": 8}
EVALUATE_EVERY = 25  # steps

RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)  # that AdamW gets, or would get
ARMS: Mapping[str, tuple[Mapping[str, Any], tuple[float, ...]]] = {
    "adamw": ({"recipe": "adamw-one-lr"}, RATES),
    "sgd": ({"recipe": "sgd"}, (0.05, 0.1, 0.2, 0.4, 0.8)),
    "sinkgd": ({"recipe": "sinkgd-finetune"}, RATES),
    "sinkgd-plain": ({"recipe": "sinkgd-finetune", "deflated_rank": 0}, RATES),
    "rows-only": ({"recipe": "rows-only", "beta2": 0.999}, RATES),
}
TUNING_SEED = 1000
SEEDS = (0, 1, 2)


def sums() -> tuple[Tensor, Tensor]:
    """Return all sums: those to train on and those held out, ``(count, 2)`` terms."""
    every = torch.cartesian_prod(torch.arange(LIMIT), torch.arange(LIMIT))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    held_out = len(every) // 10
    return every[order[held_out:]], every[order[:held_out]]


def prompts(terms: Tensor) -> Tensor:
    """Write terms ``(count, 2)`` as tokens, ``(count, PROMPT)``."""
    a, b = terms.unbind(1)
    plus, equals = torch.full_like(a, PLUS), torch.full_like(a, EQUALS)
    return torch.stack([a // 10, a % 10, plus, b // 10, b % 10, equals], 1)


def answers(terms: Tensor) -> Tensor:
    """Write the right answers: the digits from the lowest on, and the end, ``(count, ANSWER)``."""
    total = terms.sum(1)
    digits = torch.stack([total % 10, total // 10 % 10, total // 100], 1)
    return torch.cat([digits, torch.full_like(digits[:, :1], END)], 1)


@torch.no_grad()
def decode(model: nn.Module, begin: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return an answer to each prompt: sampled at temperature 1, or greedy without a generator."""
    tokens = begin
    for _ in range(ANSWER):
        logits = model(tokens)[:, -1]
        if generator is None:
            following = logits.argmax(1, keepdim=True)
        else:
            following = torch.multinomial(logits.softmax(1), 1, generator=generator)
        tokens = torch.cat([tokens, following], 1)
    return tokens[:, PROMPT:]


def accuracy(model: nn.Module, terms: Tensor) -> float:
    """Return the share of sums that greedy decoding answers."""
    right = decode(model, prompts(terms), None) == answers(terms)
    return float(right.all(1).float().mean())


def log_likelihood(model: nn.Module, begin: Tensor, answer: Tensor) -> Tensor:
    """Return the log probability of every token of the answers, ``(count, ANSWER)``."""
    logits: Tensor = model(torch.cat([begin, answer[:, :-1]], 1))[:, PROMPT - 1 :]
    return logits.log_softmax(-1).gather(-1, answer.unsqueeze(-1)).squeeze(-1)


def picked(terms: Tensor, count: int, seed: int) -> Iterator[Tensor]:
    """Yield random sums without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield terms[torch.randint(len(terms), (count,), generator=generator)]


def supervised(folder: Path) -> nn.Module:
    """Return the model that learned from examples; it is trained once and kept in ``folder``."""
    model = build_model("llama-nano-64", vocab_size=VOCABULARY, max_sequence_length=16, seed=0)
    path = folder / "supervised.pt"
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model
    train, held_out = sums()
    optimizer = torch.optim.AdamW(model.parameters(), lr=EXAMPLES["lr"], weight_decay=0.0)
    batches = picked(train, int(EXAMPLES["batch"]), seed=0)
    for step, terms in zip(range(int(EXAMPLES["steps"])), batches, strict=False):
        optimizer.param_groups[0]["lr"] = EXAMPLES["lr"] * (1 - step / EXAMPLES["steps"])
        loss = -log_likelihood(model, prompts(terms), answers(terms)).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"from examples: {accuracy(model, held_out):.3f} of held-out sums", flush=True)  # noqa: T201
    torch.save(model.state_dict(), path)
    return model


def optimizer_of(model: nn.Module, arm: str, rate: float) -> torch.optim.Optimizer:
    """Build the optimizer of an arm from the laboratory's recipe."""
    options = {**ARMS[arm][0], "lr": rate}
    if arm == "rows-only":
        options["matrix_lr"] = ADAMW_UPDATE_SIZE * rate
    return build_optimizer(model, resolve_optimizer(OptimizerConfig(**options)))


def run(folder: Path, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """Learn from rewards once, and return what was found."""
    torch.set_num_threads(1)
    model = supervised(folder)
    first = copy.deepcopy(model)
    train, held_out = sums()
    optimizer = optimizer_of(model, arm, rate)
    generator = torch.Generator().manual_seed(2000 + seed)
    begin, curve, rewards = perf_counter(), {0: accuracy(model, held_out)}, []
    steps = range(1, REWARDS["steps"] + 1)
    for step, terms in zip(steps, picked(train, REWARDS["sums"], seed), strict=False):
        each = terms.repeat_interleave(REWARDS["answers"], 0)
        asked, truth = prompts(each), answers(each)
        given = decode(model, asked, generator)
        reward = (given == truth).all(1).float().view(-1, REWARDS["answers"])
        spread = reward.std(1, keepdim=True)
        advantage = (reward - reward.mean(1, keepdim=True)) / (spread + 1e-6)
        loss = -(advantage.view(-1, 1) * log_likelihood(model, asked, given)).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rewards.append(float(reward.mean()))
        if step % EVALUATE_EVERY == 0:
            curve[step] = accuracy(model, held_out)
    asked = prompts(held_out)
    with torch.no_grad():
        own = decode(model, asked, torch.Generator().manual_seed(1))
        now, before = log_likelihood(model, asked, own), log_likelihood(first, asked, own)
    return {
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "accuracy": curve,
        "reward": [fmean(rewards[i : i + 10]) for i in range(0, len(rewards), 10)],
        "divergence from the first policy": float((now - before).sum(1).mean()),  # nats an answer
        "seconds": perf_counter() - begin,
        "environment": describe_environment(torch.device("cpu")),
    }


def final(line: Mapping[str, Any]) -> float:
    """Return the share of held-out sums that a run answers at its end."""
    return float(line["accuracy"][str(REWARDS["steps"])])


def best_rate(lines: list[dict[str, Any]], arm: str) -> float | None:
    """Return the rate with the best result in tuning; None until the whole grid was tried."""
    tried: dict[float, float] = {
        x["rate"]: final(x) for x in lines if x["arm"] == arm and x["seed"] == TUNING_SEED
    }
    if set(tried) != set(ARMS[arm][1]):
        return None
    return max(tried, key=lambda rate: tried[rate])


def due(lines: list[dict[str, Any]]) -> list[tuple[str, float, int]]:
    """List the runs that the record lacks: the grids first, then the seeds."""
    done = {(x["arm"], x["rate"], x["seed"]) for x in lines}
    grid = [(arm, rate, TUNING_SEED) for arm, (_, rates) in ARMS.items() for rate in rates]
    chosen = {arm: best_rate(lines, arm) for arm in ARMS}
    seeds = [
        (arm, rate, seed) for arm, rate in chosen.items() if rate is not None for seed in SEEDS
    ]
    return [one for one in (*grid, *seeds) if one not in done]


def read(record: Path) -> list[dict[str, Any]]:
    """Return the lines of the record."""
    if not record.exists():
        return []
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Run what the record lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=Path("runs/rl"))
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    supervised(given.scratch)
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        while runs := due(read(given.record)):
            for job in [pool.submit(run, given.scratch, *one) for one in runs]:
                found = json.loads(json.dumps(job.result()))
                with given.record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
                words = f"{found['arm']} at {found['rate']:g}, seed {found['seed']}"
                print(f"{words:40} {final(found):.3f}  {found['seconds']:.0f} s", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
