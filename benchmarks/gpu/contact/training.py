"""Whole training steps on random tokens: tokens a second, peak memory, the optimizer's share."""

from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

from contact import models
from contact.items import Item, Row, Section, Setting
from contact.measure import Mark, held_bytes, peak_bytes, synchronize

Make = Callable[[nn.Module], models.Trainer]

TRAINERS: dict[str, Make] = {
    "adamw": models.adamw,
    "plain": models.plain,
    "deflated": models.deflated,
    "muon": models.muon,
    "released": models.released,
}


class Size(NamedTuple):
    """A model and the tokens of a step."""

    preset: str
    batch: int
    time: int
    steps: int
    trainers: tuple[str, ...]
    recompute: bool = False


# 7b comes before the remaining sizes, as its two steps show whether it fits.
SIZES = (
    Size("llama-60m", 32, 512, 8, ("adamw", "plain", "deflated", "muon", "released")),
    Size("llama-1b", 8, 512, 6, ("adamw", "plain", "deflated", "released")),
    Size("llama-7b", 1, 512, 2, ("released",), recompute=True),
    Size("llama-350m", 16, 512, 6, ("adamw", "plain", "deflated", "muon", "released")),
    Size("llama-1b", 8, 512, 4, ("muon",)),
)
TINY = (Size("llama-nano-64", 2, 16, 2, tuple(TRAINERS), recompute=True),)


def section(*, tiny: bool) -> Section:
    """Return the section."""
    items = [
        Item(f"{size.preset}: {name}", _Train(size, name), 60)
        for size in (TINY if tiny else SIZES)
        for name in size.trainers
    ]
    return Section("training", 100, tuple(items))


class _Train:
    """Trains one model with one optimizer, after two warm-up steps (none for 7b)."""

    def __init__(self, size: Size, trainer: str) -> None:
        self.size, self.trainer = size, trainer

    def __call__(self, setting: Setting) -> Iterator[Row]:
        size, device = self.size, setting.device
        held_bytes(device)
        model = models.random_model(
            size.preset, torch.bfloat16, device, max_sequence_length=size.time
        )
        model.recompute = size.recompute
        trainer = TRAINERS[self.trainer](model)
        generator = torch.Generator(device=device).manual_seed(0)
        whole, own = [], []
        warm = 0 if size.preset == "llama-7b" else 2
        for number in range(warm + size.steps):
            tokens = torch.randint(
                model.config.vocab_size,
                (size.batch, size.time + 1),
                generator=generator,
                device=device,
            )
            begin = Mark(device)
            models.loss_of(model, tokens).backward()  # type: ignore[no-untyped-call]
            middle = Mark(device)
            trainer.step()
            end = Mark(device)
            trainer.zero_grad()
            synchronize(device)
            if number >= warm:
                whole.append(end.seconds_since(begin))
                own.append(end.seconds_since(middle))
        seconds = min(whole) if warm == 0 else median(whole)
        yield {
            "preset": size.preset,
            "trainer": self.trainer,
            "tokens_a_step": size.batch * size.time,
            "recompute": size.recompute,
            "step_ms": round(1e3 * seconds, 3),
            "tokens_per_second": round(size.batch * size.time / seconds),
            "optimizer_ms": round(1e3 * median(own), 3),
            "optimizer_share": round(median(own) / seconds, 4),
            "peak_bytes": peak_bytes(device),
            "weight_bytes": sum(param.nbytes for param in model.parameters()),
        }
