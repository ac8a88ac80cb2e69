"""Powers of two that bring every row and column of a matrix to one size, and change no rounding."""

import torch
from torch import Tensor


def level_(S: Tensor) -> tuple[Tensor, Tensor]:
    """Divide ``S`` by powers of two, s a row ``(..., m, 1)`` and t a column; return them.

    ``S`` is not negative. Then every row and column that is not zero has an entry of 1 or more, and
    none has one of 2 or more.
    """
    s = _power_of_two_below(S.amax(dim=-1, keepdim=True))
    S /= s
    t = _power_of_two_below(S.amax(dim=-2, keepdim=True))
    S /= t
    return s, t


def _power_of_two_below(peak: Tensor) -> Tensor:
    # The mantissa lies in [1/2, 1), so this is a power of two, exactly; ldexp goes through pow and
    # promises less.
    power = peak / (2 * torch.frexp(peak).mantissa)
    return torch.where(peak == 0, 1, power).clamp(min=torch.finfo(peak.dtype).tiny)
