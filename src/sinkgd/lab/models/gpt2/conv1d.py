"""GPT-2's linear layer, whose weight is stored (in, out)."""

import torch
from torch import Tensor, nn

from sinkgd.lab.models.draw import draw_normal


class Conv1D(nn.Module):
    """A linear layer with a bias, stored as GPT-2 was published: ``x @ weight + bias``.

    Its name and ``nf`` are those of the class in `transformers`, by which `sinkgd.param_groups`
    knows that rows and columns change places, and that one three times as wide as its input is a
    fused query, key and value.

    Args:
        nf: Output features.
        nx: Input features.
        std: Standard deviation of the initial weight.
    """

    def __init__(self, nf: int, nx: int, std: float) -> None:
        super().__init__()
        self.nf, self.nx, self.std = nf, nx, std
        self.weight = nn.Parameter(torch.empty(nx, nf, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(nf, dtype=torch.float32))

    def draw(self, generator: torch.Generator) -> None:
        """Draw the weight; the bias is 0."""
        draw_normal(self.weight, self.std, generator)
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., nf)`` of ``(..., nx)``."""
        return nn.functional.linear(x, self.weight.mT, self.bias)
