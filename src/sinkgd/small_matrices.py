"""One call of torch for many small matrices, such as those of all parameters of a step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def at_once(
    function: Callable[..., tuple[Tensor, Tensor]], *numbers: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Apply a function of small matrices to those of lists, to all of one width in one call.

    Args:
        function: Of tensors ``(..., a, b)``, one of each list; so are its two results.
        numbers: Lists of one length, whose first one decides on the width b.
    """
    kinds: dict[int, list[int]] = {}
    for i, x in enumerate(numbers[0]):
        kinds.setdefault(x.shape[-1], []).append(i)
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for own in kinds.values():
        if len(own) == 1:
            results[own[0]] = function(*(x[own[0]] for x in numbers))
            continue
        batches = [numbers[0][i].shape[:-2] for i in own]
        found = function(*(torch.cat([_one_batch(x[i]) for i in own]) for x in numbers))
        counts = [batch.numel() for batch in batches]
        parts = zip(*(torch.split(x, counts) for x in found), strict=True)
        for i, batch, (one, other) in zip(own, batches, parts, strict=True):
            results[i] = _in_batches(one, batch), _in_batches(other, batch)
    return [results[i] for i in range(len(numbers[0]))]


def _one_batch(x: Tensor) -> Tensor:
    return x if x.ndim == 3 else x.reshape(-1, *x.shape[-2:])


def _in_batches(x: Tensor, batch: torch.Size) -> Tensor:
    return x if len(batch) == 1 else x.view(*batch, *x.shape[-2:])
