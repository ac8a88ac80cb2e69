"""The recipes of `speedrun`: what trains the hidden matrices, at which rate, for how many steps.

In all recipes, AdamW trains embedding, head, norms and biases with the values of the track's
baseline, which is result 36 of the track.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from track_model import GPT

import sinkgd

# For parameters that are not hidden matrices: rates by name patterns, and AdamW's options.
OTHER_RATES = {r"^embed\.weight$": 0.7, r"^head\.weight$": 0.004, r"norm\.weight$|bias$": 0.015}
OTHERS: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.001}

# (model, rate of the hidden matrices, their weight decay) -> optimizers of all parameters
Build = Callable[[GPT, float, float], list[Optimizer]]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        optimizers: Makes the optimizers.
        steps: The number of steps.
        warmup: The share of the steps in which rates rise linearly.
        matrix_lr: Rate of the hidden matrices.
        matrix_decay: Their decoupled weight decay, which the rate multiplies.
    """

    optimizers: Build
    steps: int
    warmup: float
    matrix_lr: float
    matrix_decay: float


def sinkgd_optimizers(
    model: GPT, lr: float, decay: float, *, deflated_rank: int
) -> list[Optimizer]:
    """Return SinkGD, which also runs the AdamW of the other parameters."""
    groups = sinkgd.param_groups(
        model,
        lr=lr,
        matrix_lr_scale=1.0,
        deflated_rank=deflated_rank,
        weight_decay=decay,
        overrides={pattern: {"lr": rate, **OTHERS} for pattern, rate in OTHER_RATES.items()},
    )
    return [sinkgd.SinkGD(groups)]


def adamw_optimizers(model: GPT, lr: float, decay: float) -> list[Optimizer]:
    """Return torch's AdamW for the hidden matrices, and another AdamW for the rest."""
    matrices, others = _split(model)
    own = AdamW(matrices, lr=lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=decay, fused=True)
    return [own, others]


def muon_optimizers(model: GPT, lr: float, decay: float) -> list[Optimizer]:
    """Return torch's Muon with the track's iteration, and AdamW for the rest.

    Raises:
        SystemExit: If torch has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise SystemExit(
            f"--recipe muon needs torch 2.9, and this is {torch.__version__}; upgrade torch, or "
            "choose another recipe"
        )
    matrices, others = _split(model)
    own = torch.optim.Muon(
        matrices,
        lr=lr,
        weight_decay=decay,
        momentum=0.95,
        ns_coefficients=(2.0, -1.5, 0.5),
        eps=1e-7,
        ns_steps=12,
        adjust_lr_fn="original",
    )
    return [own, others]


def _split(model: GPT) -> tuple[list[Tensor], AdamW]:
    """Return the hidden matrices, and the AdamW of all other parameters."""
    matrices: list[Tensor] = []
    others: dict[float, list[Tensor]] = {rate: [] for rate in OTHER_RATES.values()}
    for name, param in model.named_parameters():
        rate = next((r for pattern, r in OTHER_RATES.items() if re.search(pattern, name)), None)
        (matrices if rate is None else others[rate]).append(param)
    groups = [{"params": params, "lr": rate} for rate, params in others.items()]
    return matrices, AdamW(groups, **OTHERS, fused=True)


# muon has the values of the track's result 36, and adamw those of its result 2. SinkGD's values are
# not tuned for this track: rate and warmup are the paper's for 60M to 1.3B parameters, there is no
# decay, as in the paper, and the number of steps is that of adamw.
RECIPES: Mapping[str, Recipe] = {
    "sinkgd": Recipe(partial(sinkgd_optimizers, deflated_rank=15), 5625, 0.1, 0.001, 0.0),
    "sinkgd-paper": Recipe(partial(sinkgd_optimizers, deflated_rank=0), 5625, 0.1, 0.001, 0.0),
    "adamw": Recipe(adamw_optimizers, 5625, 250 / 5625, 0.0015, 0.1),
    "muon": Recipe(muon_optimizers, 3250, 0.0, 0.025, 0.05),
}
