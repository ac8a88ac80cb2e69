"""Whether tensors hold finite numbers alone: of gradients, and of the scales found of them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return ``(len(tensors),)`` bool: whether each holds finite numbers alone.

    The largest magnitude decides. It is exact in every dtype, and NaN where an entry is NaN. On a
    GPU it takes a few kernels for all tensors of one dtype.
    """
    zero = tensors[0].new_zeros(())
    peaks = [zero] * len(tensors)  # an empty tensor has no entry that is not finite
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(tensors):
        if x.numel() > 0:
            by_dtype.setdefault(x.dtype, []).append(i)
    with torch.no_grad():
        for own in by_dtype.values():
            found = torch._foreach_norm([tensors[i] for i in own], ord=torch.inf)
            for i, peak in zip(own, found, strict=True):
                peaks[i] = peak
        return torch.stack(peaks).isfinite()
