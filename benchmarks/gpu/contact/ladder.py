"""Does the gain over AdamW grow with the model? Four sizes on a text, much as study `ladder` does.

Rules:
    tokens: the same number for each hidden weight at every size: 20, or as many as the time allows.
        Below 5 the largest size is left out
    rates: of matrices those of `MATRIX_LR` at the width of llama-9m, and in inverse proportion to
        the width for larger models; Muon's does not depend on the width. All other parameters take
        AdamW at 0.08. Nothing is tuned here.
    schedule: a warm-up, then a cosine down to a tenth

The batch does not grow with the model. There is one seed.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import sinkgd
from contact import models
from contact.items import Item, Row, Section, Setting, Skipped
from contact.measure import synchronize
from sinkgd.lab.models import LanguageModel, build_model

SIZES = ("llama-9m", "llama-20m", "llama-35m", "llama-60m")
TINY_SIZES = ("llama-nano-48", "llama-nano-64")
TOKENS_PER_WEIGHT, LEAST_TOKENS = 20.0, 5.0
SECONDS_FOR_ANOTHER = 80.0  # with fewer left, a larger size is not tried
BATCH, TIME = 64, 256  # 16,384 tokens a step
WARM_UP, CHUNKS = 0.1, 20  # share of the steps for the warm-up; number of evaluations
HELD_OUT = 8  # batches of an evaluation
TRIAL_STEPS = (4, 8)  # steps that try each arm's speed: to warm up, and timed

LR, WIDTH = 0.08, 128  # of embeddings, head and vectors; the width at which rates are given
# The best rates of studies on smaller batches: `table1` for muon and sinkgd-paper (the largest of
# its grid), `table1-long` for adamw, and `recipes` for sinkgd.
MATRIX_LR: Mapping[str, float] = {
    "adamw": 0.006,
    "muon": 0.01,
    "sinkgd-paper": 0.002,
    "sinkgd": 0.004,
}
LARGEST_NORM = 1.0  # to which AdamW's gradients are clipped


def section() -> Section:
    """Return the section; it takes whatever time is left."""
    return Section("ladder", 20, (Item("sizes", on_text, 600),))


class Cost(NamedTuple):
    """What a size costs, for all its arms together."""

    weights: int  # hidden ones
    step: float  # seconds
    evaluation: float  # seconds


def steps_within(costs: Sequence[Cost], seconds: float) -> list[int]:
    """Return the steps of each size, by the module's rules; sizes at the end may be left out."""
    for count in range(len(costs), 0, -1):
        own = costs[:count]
        wanted = [TOKENS_PER_WEIGHT * cost.weights / (BATCH * TIME) for cost in own]
        training = sum(steps * cost.step for steps, cost in zip(wanted, own, strict=True))
        evaluations = sum(CHUNKS * cost.evaluation for cost in own)
        share = min(1.0, max(0.0, 0.9 * seconds - evaluations) / training)
        if count == 1 or share * TOKENS_PER_WEIGHT >= LEAST_TOKENS:
            break
    return [max(CHUNKS, int(share * steps)) for steps in wanted]


def read_tokens(path: Path) -> tuple[Tensor, Tensor]:
    """Return training and validation tokens of a file that ``make_tokens.py`` wrote."""
    with np.load(path) as arrays:
        train, validation = (
            torch.from_numpy(arrays[name].astype(np.int32)) for name in ("train", "validation")
        )
    return train, validation


def trainer_of(model: LanguageModel, arm: str) -> models.Trainer:
    """Return an arm's optimizer for a model, at the rates of the module's rules."""
    width = model.config.hidden_size
    matrix_lr = MATRIX_LR[arm] * (1.0 if arm == "muon" else WIDTH / width)
    groups = sinkgd.param_groups(model, LR, matrix_lr / LR, betas=models.BETAS)
    if arm == "sinkgd-paper":
        for group in groups:
            if group["algorithm"] == "sinkgd":
                group["deflated_rank"] = 0
    if arm.startswith("sinkgd"):
        optimizer = sinkgd.SinkGD(groups)
        return models.Trainer(optimizer.step, (optimizer,))
    rest = [_plain(group) for group in groups if group["algorithm"] == "adamw"]
    matrices = [_plain(group) for group in groups if group["algorithm"] != "adamw"]
    if arm == "muon":
        muon = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        return models.both(muon, _adamw(rest))
    adamw = _adamw([*matrices, *rest])

    def step() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        adamw.step()

    return models.Trainer(step, (adamw,))


def _plain(group: dict[str, object]) -> dict[str, object]:
    return {"params": group["params"], "lr": group["lr"]}


def _adamw(groups: list[dict[str, object]]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, betas=models.BETAS, weight_decay=0.0, fused=True)


class _Arm:
    """A model that trains on the text, and the seconds that its training has taken."""

    def __init__(self, name: str, preset: str, vocab: int, setting: Setting) -> None:
        self.name, self.device = name, setting.device
        _, length = _shape(setting)
        self.model: LanguageModel = build_model(
            preset, vocab_size=vocab, max_sequence_length=length
        ).to(setting.device)
        self.hidden_weights: int = self.model.config.linear_parameter_count
        self.trainer = trainer_of(self.model, name)
        self.seconds, self.step = 0.0, 0

    def train(self, batches: list[Tensor], steps: int) -> None:
        """Take a step on each batch; rates follow a warm-up and a cosine over ``steps`` steps."""
        begin = time.perf_counter()
        for tokens in batches:
            warm = min(1.0, (self.step + 1) / max(1.0, WARM_UP * steps))
            cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * self.step / steps))
            self.trainer.set_factor(warm * cosine)
            self._loss(tokens).backward()  # type: ignore[no-untyped-call]
            self.trainer.step()
            self.trainer.zero_grad()
            self.step += 1
        synchronize(self.device)
        self.seconds += time.perf_counter() - begin

    def _loss(self, tokens: Tensor) -> Tensor:
        kind = self.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            return models.loss_of(self.model, tokens)

    @torch.no_grad()
    def evaluate(self, batches: list[Tensor]) -> float:
        """Return the mean loss of some batches."""
        return sum(float(self._loss(tokens)) for tokens in batches) / len(batches)


def on_text(setting: Setting) -> Iterator[Row]:
    """Train every arm of every size on the same tokens, in turns."""
    if setting.tokens is None:
        raise Skipped("no --tokens; make_tokens.py makes them")
    train, validation = (part.to(setting.device) for part in read_tokens(setting.tokens))
    vocab = int(max(train.max(), validation.max())) + 1
    shape = _shape(setting)
    held_out = models.some(models.batches(validation, *shape, seed=1), HELD_OUT)
    sizes: tuple[str, ...] = TINY_SIZES
    steps = [CHUNKS] * len(sizes)
    if not setting.tiny:
        costs: list[Cost] = []
        for preset in SIZES:
            if costs and setting.left() < SECONDS_FOR_ANOTHER:
                break
            costs.append(_cost(preset, train, held_out, vocab, setting))
        sizes, steps = SIZES, steps_within(costs, setting.left() - 2)
    for preset, own in zip(sizes, steps, strict=False):
        yield from _train(preset, own, train, held_out, vocab, setting)


def _train(
    preset: str, steps: int, train: Tensor, held_out: list[Tensor], vocab: int, setting: Setting
) -> Iterator[Row]:
    arms = [_Arm(name, preset, vocab, setting) for name in MATRIX_LR]
    shape = _shape(setting)
    text = models.batches(train, *shape, seed=0)
    done = 0
    for chunk in range(1, CHUNKS + 1):
        batches = models.some(text, steps * chunk // CHUNKS - done)
        done += len(batches)
        for arm in arms:
            arm.train(batches, steps)
            yield {
                "preset": preset,
                "arm": arm.name,
                "step": done,
                "of": steps,
                "hidden_weights": arm.hidden_weights,
                "tokens": done * shape[0] * shape[1],
                "val_loss": round(arm.evaluate(held_out), 4),
                "train_seconds": round(arm.seconds, 2),
            }


def _cost(preset: str, train: Tensor, held_out: list[Tensor], vocab: int, setting: Setting) -> Cost:
    """Time a few steps and an evaluation of each arm."""
    text = models.batches(train, *_shape(setting), seed=2)
    step = evaluation = 0.0
    for name in MATRIX_LR:
        arm = _Arm(name, preset, vocab, setting)
        for count in TRIAL_STEPS:
            arm.seconds = 0.0
            arm.train(models.some(text, count), sum(TRIAL_STEPS))
        step += arm.seconds / TRIAL_STEPS[-1]
        begin = time.perf_counter()
        arm.evaluate(held_out)
        evaluation += time.perf_counter() - begin
    return Cost(arm.hidden_weights, step, evaluation)


def _shape(setting: Setting) -> tuple[int, int]:
    return (2, 32) if setting.tiny else (BATCH, TIME)
