"""Models on a device, their loss on tokens, and the optimizers that train them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import sinkgd
from sinkgd.lab.models import LanguageModel, build_model

# From the study table1: AdamW's rate at batches of this project's size, and the ``matrix_lr_scale``
# of SinkGD without deflation.
ADAMW_LR, PLAIN_MATRIX_LR_SCALE = 6e-3, 0.05
BETAS = (0.9, 0.95)


def small_model(device: torch.device) -> LanguageModel:
    """Return the smallest preset with a small vocabulary, and equal weights on every device."""
    return build_model("llama-nano-64", vocab_size=256, max_sequence_length=64).to(device)


def small_tokens(device: torch.device, seed: int = 0) -> Tensor:
    """Return random tokens for `small_model`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (4, 65), generator=generator, device="cpu").to(device)


def random_model(
    preset: str, dtype: torch.dtype, device: torch.device, *, max_sequence_length: int
) -> LanguageModel:
    """Return a model whose weights are drawn on the device, which is fast even for 7b."""
    with torch.device("meta"):
        model = build_model(preset, max_sequence_length=max_sequence_length)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.fill_(1.0)
            else:
                param.normal_(0.0, 0.02, generator=generator)
    return model


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean loss of each next token; ``tokens`` has shape (batch, time + 1)."""
    logits: Tensor = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


class Trainer(NamedTuple):
    """What updates a model after backward."""

    step: Callable[[], object]
    optimizers: tuple[torch.optim.Optimizer, ...]

    def set_factor(self, factor: float) -> None:
        """Set every group's learning rate to ``factor`` times its first value."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("first_lr", group["lr"]) * factor

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def adamw(model: nn.Module, backend: str = "auto") -> Trainer:
    """Return AdamW, fused, for all parameters; ``backend`` has no effect."""
    del backend
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=ADAMW_LR, betas=BETAS, weight_decay=0.0, fused=True
    )
    return Trainer(optimizer.step, (optimizer,))


def plain(model: nn.Module, backend: str = "auto") -> Trainer:
    """Return the paper's method: SinkGD for hidden matrices, AdamW for the rest."""
    groups = sinkgd.param_groups(
        model, matrix_lr_scale=PLAIN_MATRIX_LR_SCALE, betas=BETAS, deflated_rank=0
    )
    optimizer = sinkgd.SinkGD(groups, backend=backend)
    return Trainer(optimizer.step, (optimizer,))


def deflated(model: nn.Module, backend: str = "auto") -> Trainer:
    """Return the default recipe."""
    optimizer = sinkgd.SinkGD(sinkgd.param_groups(model), backend=backend)
    return Trainer(optimizer.step, (optimizer,))


def muon(model: nn.Module) -> Trainer:
    """Return Muon for hidden matrices and fused AdamW for the rest."""
    groups = [group for group in sinkgd.param_groups(model) if group["algorithm"] == "sinkgd"]
    matrices = [param for group in groups for _, param in group["params"]]
    own = {*matrices}
    rest = [param for param in model.parameters() if param not in own]
    first = torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    second = torch.optim.AdamW(rest, lr=ADAMW_LR, betas=BETAS, weight_decay=0.0, fused=True)

    return both(first, second)


def both(first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> Trainer:
    """Return a trainer that steps with one optimizer after the other."""

    def step() -> None:
        first.step()
        second.step()

    return Trainer(step, (first, second))


def released(model: nn.Module) -> Trainer:
    """Return the default recipe, stepping inside backward."""
    trainer = deflated(model)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, sinkgd.SinkGD)
    sinkgd.GradientRelease(optimizer)
    return trainer


def some(batches: Iterator[Tensor], count: int) -> list[Tensor]:
    """Return the next batches."""
    return [next(batches) for _ in range(count)]


def batches(tokens: Tensor, batch: int, time: int, seed: int) -> Iterator[Tensor]:
    """Yield windows of a long text at random places, the same for equal seeds, without end."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(time + 1, device=tokens.device)
    while True:
        starts = torch.randint(0, len(tokens) - time - 1, (batch, 1), generator=generator)
        yield tokens[starts.to(tokens.device) + offsets].long()
