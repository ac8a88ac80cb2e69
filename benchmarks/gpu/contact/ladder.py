"""Does the gain over AdamW grow with the model? Four sizes on a text, much as study `ladder` does.

Rules:
    tokens: 20 for each hidden weight, or as many as the time allows; equal for all arms of a size
    rates: of matrices those of `MATRIX_LR` at the width of llama-9m, and in inverse proportion to
        the width for larger models; Muon's does not depend on the width. All other parameters take
        AdamW at 0.08. Nothing is tuned here.
    schedule: a warm-up, then a cosine down to a tenth

The batch does not grow with the model. There is one seed.
"""

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import sinkgd
from contact import models
from contact.items import Item, Row, Section, Setting, Skipped
from contact.measure import synchronize
from sinkgd.lab.models import LanguageModel, build_model

# The sizes, and the shares of the time that they take if it is short.
SIZES: Mapping[str, int] = {"llama-9m": 1, "llama-20m": 2, "llama-35m": 3, "llama-60m": 4}
TINY_SIZES: Mapping[str, int] = {"llama-nano-48": 1, "llama-nano-64": 1}
LEAST_SECONDS = 40.0  # for a size
TOKENS_PER_WEIGHT = 20
BATCH, TIME = 64, 256  # 16,384 tokens a step
WARM_UP, CHUNKS = 0.1, 20  # share of the steps for the warm-up; number of evaluations
TRIAL_STEPS = (4, 8)  # steps that try each arm's speed: to warm up, and timed

LR, WIDTH = 0.08, 128  # of embeddings, head and vectors; the width at which rates are given
# The best rates in studies `table1-long` and `ladder`, on smaller batches.
MATRIX_LR: Mapping[str, float] = {
    "adamw": 0.006,
    "muon": 0.01,
    "sinkgd-paper": 0.002,
    "sinkgd": 0.004,
}
LARGEST_NORM = 1.0  # to which AdamW's gradients are clipped


def section(*, tiny: bool) -> Section:
    """Return the section; it takes whatever time is left."""
    sizes = TINY_SIZES if tiny else SIZES
    items = [Item(preset, _Size(place, sizes), 600) for place, preset in enumerate(sizes)]
    return Section("ladder", 20, tuple(items))


def seconds_for(place: int, sizes: Mapping[str, int], left: float) -> float | None:
    """Return the seconds that a size may take of those left; None if they are too few."""
    if place and left < LEAST_SECONDS:
        return None
    shares = list(sizes.values())[place:]
    if left < 2 * LEAST_SECONDS:
        return left
    return max(LEAST_SECONDS, left * shares[0] / sum(shares))


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
        return _both(muon, _adamw(rest))
    adamw = _adamw([*matrices, *rest])

    def step() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        adamw.step()

    return models.Trainer(step, (adamw,))


def _plain(group: dict[str, object]) -> dict[str, object]:
    return {"params": group["params"], "lr": group["lr"]}


def _adamw(groups: list[dict[str, object]]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, betas=models.BETAS, weight_decay=0.0, fused=True)


def _both(first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> models.Trainer:
    def step() -> None:
        first.step()
        second.step()

    return models.Trainer(step, (first, second))


class _Arm:
    """A model that trains on the text, and the seconds that its training has taken."""

    def __init__(self, name: str, preset: str, vocab: int, setting: Setting) -> None:
        self.name, self.device = name, setting.device
        self.shape = _shape(setting)
        self.model: LanguageModel = build_model(
            preset, vocab_size=vocab, max_sequence_length=self.shape[1]
        ).to(setting.device)
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


class _Size:
    """Trains every arm of one size on the same tokens, in turns."""

    def __init__(self, place: int, sizes: Mapping[str, int]) -> None:
        self.place, self.sizes = place, sizes
        self.preset = list(sizes)[place]

    def __call__(self, setting: Setting) -> Iterator[Row]:
        if setting.tokens is None:
            raise Skipped("no --tokens; make_tokens.py makes them")
        seconds = seconds_for(self.place, self.sizes, setting.left())
        if seconds is None:
            raise Skipped(f"fewer than {LEAST_SECONDS:g} s are left; try --only ladder")
        begin = time.monotonic()
        train, validation = (part.to(setting.device) for part in read_tokens(setting.tokens))
        vocab = int(max(train.max(), validation.max())) + 1
        arms = [_Arm(name, self.preset, vocab, setting) for name in MATRIX_LR]
        weights = arms[0].model.config.linear_parameter_count
        batch, length = _shape(setting)
        steps = CHUNKS
        if not setting.tiny:
            wanted = TOKENS_PER_WEIGHT * weights // (batch * length)
            spent = time.monotonic() - begin
            per_step = self._seconds_per_step(train, vocab, setting)
            # A tenth of the time goes into evaluations.
            affordable = int(0.85 * (seconds - spent - 2) / per_step)
            steps = max(CHUNKS, min(wanted, affordable))
        text = models.batches(train, batch, length, seed=0)
        held_out = models.some(models.batches(validation, batch, length, seed=1), 8)
        done = 0
        for chunk in range(1, CHUNKS + 1):
            batches = models.some(text, steps * chunk // CHUNKS - done)
            done += len(batches)
            for arm in arms:
                arm.train(batches, steps)
                yield {
                    "arm": arm.name,
                    "step": done,
                    "of": steps,
                    "hidden_weights": weights,
                    "tokens": done * batch * length,
                    "val_loss": round(arm.evaluate(held_out), 4),
                    "train_seconds": round(arm.seconds, 2),
                }

    def _seconds_per_step(self, train: Tensor, vocab: int, setting: Setting) -> float:
        """Return how long a step of all arms takes, estimated from a few steps of each."""
        text = models.batches(train, BATCH, TIME, seed=2)
        seconds = 0.0
        for name in MATRIX_LR:
            arm = _Arm(name, self.preset, vocab, setting)
            for count in TRIAL_STEPS:
                arm.seconds = 0.0
                arm.train(models.some(text, count), sum(TRIAL_STEPS))
            seconds += arm.seconds / TRIAL_STEPS[-1]
        return seconds


def _shape(setting: Setting) -> tuple[int, int]:
    return (2, 32) if setting.tiny else (BATCH, TIME)
