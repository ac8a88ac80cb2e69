"""A warning where a whole model trains without state, at a rate that nobody chose."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any


def warn_unrouted(
    optimizer: str,
    lr: float,
    given: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Warn if matrices and vectors are given no algorithm and no rate.

    So it is with ``SinkGD(model.parameters())``, and where a trainer builds the optimizer from
    groups of its own, which set the weight decay alone.

    Args:
        optimizer: The name of its class, which was given no ``lr``.
        lr: What it takes instead.
        given: The groups as the caller gave them.
        groups: The groups of the optimizer, in the same order.
    """
    dims = {
        param.ndim
        for own, group in zip(given, groups, strict=True)
        if "algorithm" not in own and "lr" not in own
        for param in group["params"]
    }
    if dims and min(dims) < 2 <= max(dims):
        warnings.warn(
            f"{optimizer} got matrices and vectors without an algorithm or lr, and trains all of "
            f"them without state at lr={lr}, embeddings and output head included. In study pareto "
            "this ended at a higher loss than AdamW. For the recommended recipe write "
            f"{optimizer}(sinkgd.param_groups(model)); with the Hugging Face Trainer, "
            "optimizer_cls_and_kwargs=(sinkgd.integrations.transformers.SinkGDFactory, {}). To "
            "train without state, pass lr",
            UserWarning,
            stacklevel=_level_of_caller(),
        )


def _level_of_caller() -> int:
    """Return the ``stacklevel`` of the first function outside of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("sinkgd."):
        level, frame = level + 1, frame.f_back
    return level
