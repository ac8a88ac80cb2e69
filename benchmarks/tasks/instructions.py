"""Fine-tune a language model on instructions that have one right answer.

The model is a run of ``sinkgd train`` or a Hugging Face checkpoint; the corpus is that of its first
training, as ``sinkgd prepare`` writes it. An instruction names a task, such as to reverse some
words, and gives three to five words; the loss counts only the tokens of the answer. The rate
follows a warmup and a cosine, and gradients are clipped at 1. The result is the share of 256 new
instructions that greedy decoding answers exactly. The record also has the loss on the first text,
which says what was forgotten. `tuned_runs` says how rates are chosen.

    python benchmarks/tasks/instructions.py runs/gpt2-by-adamw eltec-2048 RECORD.jsonl
"""

import argparse
import functools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tuned_runs import ARMS, Job, Line, optimizer_of, run_all

from sinkgd.lab.data import TokenDataset
from sinkgd.lab.data.tokenizer import Tokenizer
from sinkgd.lab.models import model_of
from sinkgd.lab.train.machine import describe_environment
from sinkgd.lab.train.starting_weights import StartingWeights
from sinkgd.lab.train.world import World

LENGTH = 128  # tokens that the model was trained with
STEPS, WARMUP, BATCH = 200, 10, 32
TESTED = 256  # new instructions
IGNORED = -100  # a target that the loss ignores
NUMBERS = ("three", "four", "five")

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)  # AdamW's; the rates of other arms follow from them
GRIDS: Mapping[str, Sequence[float]] = dict.fromkeys(ARMS, RATES) | {
    "sgd": (0.025, 0.05, 0.1, 0.2, 0.4),
}


def instruction(words: Sequence[str], draw: random.Random) -> tuple[str, str]:
    """Draw an instruction; return it and its answer."""
    given = draw.sample(words, draw.randint(3, 5))
    task, answer = draw.choice(
        (
            ("Write the words in reverse order", given[::-1]),
            ("Write the words in the order of the alphabet", sorted(given)),
            ("Write the last word", given[-1:]),
            ("Write the words without the second", [given[0], *given[2:]]),
            ("Write the longest word", [max(given, key=len)]),  # the first of several
            ("Write how many words there are", [NUMBERS[len(given) - 3]]),
        )
    )
    return f"{task}: {' '.join(given)}.\nAnswer:", f" {' '.join(answer)}.\n"


class Instructions:
    """Rows of tokens, ``(count, length)``: an instruction, its answer, and padding.

    Args:
        tokenizer: The tokenizer of the model.
        words: The words from which instructions are made.
        count: Number of instructions.
        seed: Equal seeds give equal instructions.
    """

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str], count: int, seed: int) -> None:
        draw = random.Random(seed)  # noqa: S311
        pairs = [instruction(words, draw) for _ in range(count)]
        asked, answered = (tokenizer.encode_batch(texts) for texts in zip(*pairs, strict=True))
        longest = max(len(a) + len(b) for a, b in zip(asked, answered, strict=True))
        self.tokens = torch.full((count, longest), tokenizer.pad_id)
        self.targets = torch.full((count, longest), IGNORED)
        self.begins = torch.tensor([len(a) for a in asked])
        for row, (a, b) in enumerate(zip(asked, answered, strict=True)):
            answer = torch.from_numpy(b.astype("int64"))
            self.tokens[row, : len(a)] = torch.from_numpy(a.astype("int64"))
            self.tokens[row, len(a) : len(a) + len(b)] = answer
            self.targets[row, len(a) : len(a) + len(b)] = answer


def common_words(tokenizer: Tokenizer, count: int) -> list[str]:
    """Return words that are one token each, the most frequent first."""
    texts = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
    words = [t[1:] for t in texts if t[:1] == " " and t[1:].islower() and t[1:].isalpha()]
    return [word for word in words if len(word) > 3][:count]


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of the targets that count, nats per token."""
    logits: Tensor = model(tokens[:, :-1])
    return cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def exact(model: nn.Module, asked: Instructions) -> float:
    """Return the share of instructions that greedy decoding answers exactly."""
    tokens = torch.where(asked.targets == IGNORED, asked.tokens, 0)
    for place in range(int(asked.begins.min()), tokens.shape[1]):
        following = model(tokens[:, :place])[:, -1].argmax(1)
        tokens[:, place] = torch.where(asked.begins <= place, following, tokens[:, place])
    counted = asked.targets != IGNORED
    return float(((tokens == asked.targets) | ~counted).all(1).float().mean())


@torch.no_grad()
def loss_on_text(model: nn.Module, corpus: Path) -> float:
    """Return the loss on the validation split of a text, nats per token."""
    split = TokenDataset.open(corpus).split("validation")
    rows = torch.from_numpy(split.read(0, 64 * (LENGTH + 1)).astype(np.int64)).view(64, -1)
    return float(loss_of(model, rows, rows))


def run(weights: Path, corpus: Path, job: Job) -> Line:
    """Fine-tune once, and return what was found."""
    torch.set_num_threads(1)
    start = StartingWeights.find(weights, LENGTH)
    tokenizer, model = Tokenizer.from_file(corpus), model_of(start.sizes)
    start.load(model, World())
    optimizer = optimizer_of(model, job.arm, job.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS)),
    )
    words = common_words(tokenizer, 400)
    train = Instructions(tokenizer, words, STEPS * BATCH, seed=job.seed)
    test = Instructions(tokenizer, words, TESTED, seed=-1)
    begin, curve = perf_counter(), {0: (exact(model, test), loss_on_text(model, corpus))}
    for step in range(1, STEPS + 1):
        rows = slice((step - 1) * BATCH, step * BATCH)
        torch.autograd.backward(loss_of(model, train.tokens[rows], train.targets[rows]))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            curve[step] = (exact(model, test), loss_on_text(model, corpus))
    return {
        "exact": {step: share for step, (share, _) in curve.items()},
        "answer loss": float(loss_of(model, test.tokens, test.targets).detach()),
        "text loss": {step: loss for step, (_, loss) in curve.items()},
        "weights": str(weights),
        "seconds": perf_counter() - begin,
        "environment": describe_environment(torch.device("cpu")),
    }


def score(line: Line) -> float:
    """Return the negative loss of the answers, by which rates are chosen."""
    return -float(line["answer loss"])


def main() -> None:
    """Run what the record lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    run_all(
        given.record, GRIDS, functools.partial(run, given.weights, given.corpus), score, given.jobs
    )


if __name__ == "__main__":
    main()
