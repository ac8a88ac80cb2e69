"""Losses: float32 steps of the nano model compared with a CPU's, and llama-9m on a text."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from contact import models
from contact.items import Item, Row, Section, Setting, Skipped
from contact.measure import synchronize
from sinkgd.lab.models import LanguageModel, build_model

Make = Callable[[nn.Module, str], models.Trainer]
ARMS: dict[str, Make] = {
    "adamw": models.adamw,
    "plain": models.plain,
    "deflated": models.deflated,
}
BATCH, TIME = 64, 256  # of llama-9m: 16,384 tokens a step
WARM_UP, CHUNKS = 0.1, 10  # share of the steps for the warm-up; number of evaluations
TRIAL_STEPS = (4, 8)  # steps that try each arm's speed: to warm up, and timed


def nano_section(*, tiny: bool) -> Section:
    """Return the section that compares with the CPU."""
    preset, steps = ("llama-nano-64", 3) if tiny else ("llama-nano", 20)
    items = [Item(name, _AgainstCpu(preset, steps, make)) for name, make in ARMS.items()]
    return Section("nano", 20, tuple(items))


def text_section() -> Section:
    """Return the section that trains on a text; it takes whatever time is left."""
    return Section("text", 20, (Item("llama-9m", on_text, 600),))


class _AgainstCpu:
    """Trains one model on the device and on the CPU, on the same tokens, in float32."""

    def __init__(self, preset: str, steps: int, make: Make) -> None:
        self.preset, self.steps, self.make = preset, steps, make

    def __call__(self, setting: Setting) -> Iterator[Row]:
        # The CPU takes the eager backend, since the compiled one would take a while to compile.
        here = self._losses(torch.device("cpu"), "eager")
        there = self._losses(setting.device, "auto")
        worst = max(abs(a - b) for a, b in zip(here, there, strict=True))
        yield {
            "status": "ok" if worst <= 0.02 else "wrong",
            "worst_difference": worst,
            "first_difference": abs(here[0] - there[0]),
            "cpu": here,
            "device": there,
        }

    def _losses(self, device: torch.device, backend: str) -> list[float]:
        model = build_model(self.preset, vocab_size=512, max_sequence_length=64).to(device)
        trainer = self.make(model, backend)
        generator = torch.Generator().manual_seed(1)
        # A text of few words, so that there is something to learn.
        text = torch.randint(0, 512, (4096,), generator=generator).square() % 61
        losses = []
        for tokens in _some(models.batches(text.to(device), 8, 64, 0), self.steps):
            loss = models.loss_of(model, tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            trainer.step()
            trainer.zero_grad()
            losses.append(loss.item())
        return losses


def _some(batches: Iterator[Tensor], count: int) -> list[Tensor]:
    return [next(batches) for _ in range(count)]


def read_tokens(path: Path) -> tuple[Tensor, Tensor]:
    """Return training and validation tokens of a file that ``make_tokens.py`` wrote."""
    with np.load(path) as arrays:
        train, validation = (
            torch.from_numpy(arrays[name].astype(np.int32)) for name in ("train", "validation")
        )
    return train, validation


class _Arm:
    """A model that trains on the text, and the seconds that its training has taken."""

    def __init__(self, name: str, make: Make, vocab: int, setting: Setting) -> None:
        preset = "llama-nano-64" if setting.tiny else "llama-9m"
        self.name, self.device = name, setting.device
        self.shape = (2, 32) if setting.tiny else (BATCH, TIME)
        self.model: LanguageModel = build_model(
            preset, vocab_size=vocab, max_sequence_length=self.shape[1]
        ).to(setting.device)
        self.trainer = make(self.model, "auto")
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
    """Train every arm on the same tokens, in turns, for as many steps as the time left allows."""
    if setting.tokens is None:
        raise Skipped("no --tokens; make_tokens.py makes them")
    train, validation = (part.to(setting.device) for part in read_tokens(setting.tokens))
    vocab = int(max(train.max(), validation.max())) + 1
    steps = _steps(train, vocab, setting)
    arms = [_Arm(name, make, vocab, setting) for name, make in ARMS.items()]
    text = models.batches(train, *arms[0].shape, seed=0)
    held_out = _some(models.batches(validation, *arms[0].shape, seed=1), 8)
    done = 0
    for chunk in range(1, CHUNKS + 1):
        batches = _some(text, steps * chunk // CHUNKS - done)
        done += len(batches)
        for arm in arms:
            arm.train(batches, steps)
            yield {
                "arm": arm.name,
                "step": done,
                "of": steps,
                "tokens": done * arms[0].shape[0] * arms[0].shape[1],
                "val_loss": round(arm.evaluate(held_out), 4),
                "train_seconds": round(arm.seconds, 2),
            }


def _steps(train: Tensor, vocab: int, setting: Setting) -> int:
    """Return how many steps each arm may take, estimated from the speed of a few steps."""
    if setting.tiny:
        return CHUNKS
    text = models.batches(train, BATCH, TIME, seed=2)
    seconds = 0.0
    for name, make in ARMS.items():
        arm = _Arm(name, make, vocab, setting)
        for count in TRIAL_STEPS:
            arm.seconds = 0.0
            arm.train(_some(text, count), sum(TRIAL_STEPS))
        seconds += arm.seconds / TRIAL_STEPS[-1]
    # A tenth of the time goes into evaluations.
    return max(CHUNKS, int(0.85 * (setting.left() - 2) / seconds))
