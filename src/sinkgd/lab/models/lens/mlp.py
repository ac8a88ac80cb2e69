"""An MLP whose inner features are in part made from what attention brought."""

import torch
from torch import Tensor, nn

from sinkgd.lab.models.gpt2.conv1d import Conv1D
from sinkgd.lab.models.gpt2.frame import FrameConfig
from sinkgd.lab.models.lens.factors import Factors

_SHARE = 0.1


class LensMLP(nn.Module):
    r"""A GELU MLP that also reads the output of attention, through a map of low rank.

    .. math::
        h = (1 - a)\, \mathrm{GELU}(W_1 y) + a\, W_u W_d\, \mathrm{stopgrad}(\text{attention}),
        \qquad \text{out} = W_2 h

    a is learned, starts at 0.1 and is clamped to [0, 1]. Beyond these bounds no gradient reaches
    it: an optimizer that takes it there leaves it there. Attention learns nothing by this way.

    Args:
        config: The sizes.
        rank: Of the map from the output of attention.
    """

    def __init__(self, config: FrameConfig, rank: int) -> None:
        super().__init__()
        h, inner, std = config.hidden_size, config.intermediate_size, config.initializer_std
        self.c_fc = Conv1D(inner, h, std)
        self.context = Factors(inner, h, rank, std, from_svd=False)
        # One number in a vector, as FSDP divides no scalars.
        self.context_share = nn.Parameter(torch.empty(1, dtype=torch.float32))
        self.c_proj = Conv1D(h, inner, config.residual_std)

    def draw(self, generator: torch.Generator) -> None:
        """Set the share of the context; the other weights are their modules' own."""
        del generator
        self.context_share.fill_(_SHARE)

    def share(self) -> Tensor:
        """Return a, ``(1,)``."""
        return self.context_share.clamp(0.0, 1.0)

    def forward(self, y: Tensor, attention: Tensor) -> Tensor:
        """Return ``(b, t, h)``.

        Args:
            y: Normalized hidden states, ``(b, t, h)``.
            attention: The output of attention, ``(b, t, h)``; no gradient flows to it.
        """
        own = nn.functional.gelu(self.c_fc(y), approximate="tanh")
        context = self.context(attention.detach())
        out: Tensor = self.c_proj(torch.lerp(own, context, self.share().to(own.dtype)))
        return out
