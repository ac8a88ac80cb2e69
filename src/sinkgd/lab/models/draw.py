"""Initial weights: the same numbers for a seed, on every device and however they lie on a mesh."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

_PIECE = 1 << 22  # entries, a multiple of 16


def draw_normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill a weight with normal numbers of mean 0.

    One in bfloat16 gets the float32 draw, rounded; of one that lies in pieces on several devices,
    each has its piece of the whole draw.

    Args:
        weight: Of any shape, dtype and device; filled in place.
        std: Standard deviation.
        generator: On the CPU.
    """
    if isinstance(weight, DTensor):
        whole = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
        _draw_in_pieces(whole, std, generator)
        set_whole(weight, whole)
    else:
        _draw_in_pieces(weight, std, generator)


def set_whole(weight: Tensor, whole: Tensor) -> None:
    """Copy a tensor into a weight, or each rank's piece of it where the weight lies in pieces."""
    if isinstance(weight, DTensor):
        lie = weight.device_mesh, weight.placements
        whole = distribute_tensor(whole.to(weight.dtype), *lie, src_data_rank=None)
    with torch.no_grad():
        weight.copy_(whole)


def _draw_in_pieces(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill a weight, in float32 pieces of 16 MiB: the numbers are those of one draw."""
    # torch draws by sixteens; fewer entries, or the last sixteen of an uneven draw, come otherwise,
    # so the last piece takes them along
    flat = weight.view(-1)
    starts = range(0, max(1, len(flat) - 15), _PIECE)
    for start, end in zip(starts, (*starts[1:], len(flat)), strict=True):
        draw = torch.empty(end - start, dtype=torch.float32, device="cpu")
        flat[start:end].copy_(draw.normal_(0.0, std, generator=generator))
