"""Losses of float32 steps of the nano model, compared with those of a CPU."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from contact import models
from contact.items import Item, Row, Section, Setting
from sinkgd.lab.models import build_model

Make = Callable[[nn.Module, str], models.Trainer]
ARMS: dict[str, Make] = {
    "adamw": models.adamw,
    "plain": models.plain,
    "deflated": models.deflated,
}


def section(*, tiny: bool) -> Section:
    """Return the section that compares with the CPU."""
    preset, steps = ("llama-nano-64", 3) if tiny else ("llama-nano", 20)
    items = [Item(name, _AgainstCpu(preset, steps, make)) for name, make in ARMS.items()]
    return Section("nano", 20, tuple(items))


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
        for tokens in models.some(models.batches(text.to(device), 8, 64, 0), self.steps):
            loss = models.loss_of(model, tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            trainer.step()
            trainer.zero_grad()
            losses.append(loss.item())
        return losses
