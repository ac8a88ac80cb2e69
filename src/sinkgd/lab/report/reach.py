"""Where a run first reached a loss: between two evaluations, on the straight line through them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sinkgd.lab.results import Evaluation


@dataclass(frozen=True)
class Reach:
    """A point of a run, between its evaluations."""

    step: float
    tokens: float
    seconds: float  # of training


def first_reach(evaluations: Sequence[Evaluation], target: float) -> Reach | None:
    """Find the first point at which the validation loss is at or below ``target``.

    The loss is taken as linear between two evaluations. Where there is no finite evaluation
    before the one at or below the target, that one is the answer: an upper bound.

    Args:
        evaluations: In the order of their steps.
        target: Nats per token.

    Returns:
        The point, or None if no evaluation is at or below the target.

    Examples:
        >>> before = Evaluation(10, 100, 1.0, 5.0, 148.4, 1.8, 64)
        >>> after = Evaluation(20, 200, 3.0, 4.0, 54.6, 1.4, 64)
        >>> first_reach([before, after], 4.25)
        Reach(step=17.5, tokens=175.0, seconds=2.5)
        >>> first_reach([before, after], 3.9) is None
        True
    """
    previous: Evaluation | None = None
    for current in evaluations:
        if current.val_loss <= target:
            return _between(previous, current, target)
        previous = current if math.isfinite(current.val_loss) else None
    return None


def _between(before: Evaluation | None, after: Evaluation, target: float) -> Reach:
    if before is None:
        return Reach(after.step, after.tokens, after.seconds)
    way = (before.val_loss - target) / (before.val_loss - after.val_loss)
    return Reach(
        step=before.step + way * (after.step - before.step),
        tokens=before.tokens + way * (after.tokens - before.tokens),
        seconds=before.seconds + way * (after.seconds - before.seconds),
    )
