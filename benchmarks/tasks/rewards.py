"""Train a policy on verifiable rewards, with AdamW, SGD, Muon and SinkGD.

A small LLaMA first learns from examples to add two numbers of two digits, until it answers a third
of the sums. Then it learns from rewards alone. It samples eight answers to each of 32 sums; the
reward of an answer is 1 if it is right, and 0 otherwise. The policy gradient weights each answer by
its reward minus the mean reward of all answers to the same sum, divided by the standard deviation
of these rewards (GRPO, Shao et al., https://arxiv.org/abs/2402.03300; with one update for each
sample, and no penalty). A tenth of all sums is held out. The result is the share of held-out sums
that greedy decoding answers, averaged over the last four evaluations.

Each line of the record is one run; `tuned_runs` says how rates are chosen. A seed draws the sums
and the answers; all runs start from one model.

    python benchmarks/tasks/rewards.py RECORD.jsonl
"""

import argparse
import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from time import perf_counter

import torch
from torch import Tensor, nn
from tuned_runs import ARMS, Job, Line, optimizer_of, run_all

from sinkgd.lab.models import build_model
from sinkgd.lab.train.machine import describe_environment

PLUS, EQUALS, END, PAD = 10, 11, 12, 13  # after the ten digits
VOCABULARY = 16
PROMPT, ANSWER = 6, 4  # tokens: "12+34=", and at most three digits and the end
LIMIT = 100  # terms are below it

EXAMPLES = {"steps": 500, "batch": 128, "lr": 2e-3}  # of the supervised training
REWARDS = {"steps": 300, "warmup": 10, "sums": 32, "answers": 8}
EVALUATE_EVERY, AVERAGED = 25, 4  # steps, evaluations

RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)  # AdamW's; the rates of other arms follow from them
GRIDS: Mapping[str, Sequence[float]] = dict.fromkeys(ARMS, RATES) | {
    "sgd": (0.0025, 0.005, 0.01, 0.02, 0.04)
}


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
    """Write the right answers, ``(count, ANSWER)``: the digits, the lowest first, and the end."""
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


def run(folder: Path, job: Job) -> Line:
    """Learn from rewards once, and return what was found."""
    torch.set_num_threads(1)
    model = supervised(folder)
    first = copy.deepcopy(model)
    train, held_out = sums()
    optimizer = optimizer_of(model, job.arm, job.rate)
    generator = torch.Generator().manual_seed(2000 + job.seed)
    begin, curve, rewards = perf_counter(), {0: accuracy(model, held_out)}, []
    steps = range(1, REWARDS["steps"] + 1)
    warmup = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1.0, (done + 1) / REWARDS["warmup"])
    )
    for step, terms in zip(steps, picked(train, REWARDS["sums"], job.seed), strict=False):
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
        warmup.step()
        rewards.append(float(reward.mean()))
        if step % EVALUATE_EVERY == 0:
            curve[step] = accuracy(model, held_out)
    asked = prompts(held_out)
    with torch.no_grad():
        own = decode(model, asked, torch.Generator().manual_seed(1))
        now, before = log_likelihood(model, asked, own), log_likelihood(first, asked, own)
    return {
        "accuracy": curve,
        "reward": [fmean(rewards[i : i + 10]) for i in range(0, len(rewards), 10)],
        "divergence from the first policy": float((now - before).sum(1).mean()),  # nats an answer
        "seconds": perf_counter() - begin,
        "environment": describe_environment(torch.device("cpu")),
    }


def final(line: Line) -> float:
    """Return the share of held-out sums that a run answers, averaged over its last evaluations."""
    return fmean(list(line["accuracy"].values())[-AVERAGED:])


def main() -> None:
    """Run what the record lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=Path("runs/rl"))
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    supervised(given.scratch)
    run_all(given.record, GRIDS, functools.partial(run, given.scratch), final, given.jobs)


if __name__ == "__main__":
    main()
