"""LoRA: a frozen model, with a trained low-rank correction for each matrix of its blocks.

The modules have PEFT's names, ``base_layer``, ``lora_A`` and ``lora_B``, by which
`sinkgd.param_groups` recognizes adapters.

References:
    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from sinkgd.lab.models.gpt2 import Conv1D
from sinkgd.lab.models.language_model import LanguageModel, ModelError, set_weight

_SCALE = 2.0  # of the correction: PEFT's lora_alpha / r, with alpha = 2 r, as is common

Model = TypeVar("Model", bound=LanguageModel)


class LoRA(nn.Module):
    r"""A frozen linear layer plus a correction :math:`2 B A x` of low rank.

    Args:
        base_layer: The layer, from ``n`` to ``m`` features; its weights are frozen.
        rank: Rows of ``A``, at least 1.
    """

    def __init__(self, base_layer: nn.Linear | Conv1D, rank: int) -> None:
        super().__init__()
        rows, columns = base_layer.weight.shape
        m, n = (columns, rows) if isinstance(base_layer, Conv1D) else (rows, columns)
        self.base_layer = base_layer.requires_grad_(False)
        dtype, device = base_layer.weight.dtype, base_layer.weight.device
        self.lora_A = nn.Linear(n, rank, bias=False, dtype=dtype, device=device)
        self.lora_B = nn.Linear(rank, m, bias=False, dtype=dtype, device=device)

    def draw(self, generator: torch.Generator) -> None:
        """Draw A uniformly between ±1/√n, as PEFT does, and set B to 0."""
        A = self.lora_A.weight
        drawn = torch.empty(A.shape, dtype=torch.float32, device="cpu")
        bound = A.shape[1] ** -0.5
        set_weight(A, drawn.uniform_(-bound, bound, generator=generator).to(A.dtype))
        with torch.no_grad():
            self.lora_B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., n)`` to ``(..., m)``."""
        correction: Tensor = self.lora_B(self.lora_A(x))
        plain: Tensor = self.base_layer(x)
        return plain + _SCALE * correction


def add_adapters(model: Model, rank: int) -> Model:
    """Freeze a model, and give each linear layer of its blocks an adapter, in place.

    Args:
        model: A model on any device, including meta; the adapters are made on the same device.
        rank: Rank of the adapters, at least 1.

    Raises:
        ModelError: If ``rank`` is below 1, or a block has no linear layer.
    """
    if rank < 1:
        raise ModelError(f"the rank of adapters must be at least 1, got {rank}")
    model.requires_grad_(False)
    for block in model.blocks:
        places = [
            (parent, name, child)
            for parent in block.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.Linear | Conv1D)
        ]
        if not places:
            raise ModelError(
                f"a block of a {type(model).__name__} has no linear layer to adapt; train all its "
                "weights"
            )
        for parent, name, child in places:
            setattr(parent, name, LoRA(child, rank))
    return model


def draw_adapters(model: LanguageModel, seed: int) -> None:
    """Draw the adapters of a model, so that they change no output yet."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoRA):
            module.draw(generator)


def base_name(name: str) -> str | None:
    """Return a parameter's name in the model without adapters; None for a weight of an adapter.

    Examples:
        >>> base_name("model.layers.0.mlp.up_proj.base_layer.weight")
        'model.layers.0.mlp.up_proj.weight'
        >>> base_name("model.layers.0.mlp.up_proj.lora_A.weight") is None
        True
    """
    if ".lora_A." in name or ".lora_B." in name:
        return None
    return name.replace(".base_layer.", ".")
