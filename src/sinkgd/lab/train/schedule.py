"""The learning rate: a linear warm-up to the peak, then a cosine down to a part of it."""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sinkgd.lab.train.config import TrainingConfig


def lr_factor(
    step: int, *, steps: int, warmup_fraction: float = 0.1, final_lr_fraction: float = 0.1
) -> float:
    r"""Return the learning rate of the step after ``step`` others, as a part of the peak.

    With w = round(``warmup_fraction`` · ``steps``) and k = ``step`` + 1, step k has k/w during the
    warm-up, so that no step is lost at rate 0; then

    .. math::
        f + (1 - f) \frac{1 + \cos \pi t}{2}, \qquad t = \frac{k - w}{steps - w}

    with f = ``final_lr_fraction``, which step number ``steps`` reaches exactly.

    Args:
        step: Steps already taken; 0 before the first.
        steps: Steps of the whole run.
        warmup_fraction: Part of the steps with a rising rate, 0 to 1.
        final_lr_fraction: The last step's part of the peak, 0 to 1.

    Examples:
        >>> [round(lr_factor(step, steps=10, warmup_fraction=0.2), 3) for step in (0, 1, 5, 9)]
        [0.5, 1.0, 0.55, 0.1]
    """
    number = step + 1
    warmup = round(warmup_fraction * steps)
    if number <= warmup:
        return number / warmup
    if number >= steps:
        return final_lr_fraction
    progress = (number - warmup) / (steps - warmup)
    cosine = (1.0 + math.cos(math.pi * progress)) / 2.0
    return final_lr_fraction + (1.0 - final_lr_fraction) * cosine


def schedule(optimizer: Optimizer, training: TrainingConfig, *, step: int = 0) -> LambdaLR:
    """Set the learning rate of every group for the step after ``step`` others.

    Args:
        optimizer: Its groups hold their peak as ``initial_lr``, or, at step 0, as ``lr``.
        training: Steps and fractions.
        step: Steps already taken; 0 before the first.

    Returns:
        A scheduler to be stepped after every step of the optimizer. It need not be saved.
    """
    factor = partial(
        lr_factor,
        steps=training.steps,
        warmup_fraction=training.warmup_fraction,
        final_lr_fraction=training.final_lr_fraction,
    )
    return LambdaLR(optimizer, factor, last_epoch=step - 1)
