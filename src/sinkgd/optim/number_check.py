"""Numbers among the arguments: what is none is refused where it is passed, by its name."""

from numbers import Real
from typing import Any

from torch import Tensor


def is_number(value: object) -> bool:
    """Whether a value is a real number or a tensor; True and False are none."""
    return not isinstance(value, bool) and isinstance(value, Real | Tensor)


def check_number(name: str, value: Any, *, least: float = 0.0) -> None:
    """Refuse what is no number, or is below ``least``; a tensor of one element is a number.

    Raises:
        TypeError: With the argument's name and its value.
        ValueError: The same.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")
    if not value >= least:
        raise ValueError(f"{name} must be at least {least:g}, got {value}")


def check_betas(betas: Any) -> None:
    """Refuse what is no pair of decay rates.

    Raises:
        TypeError: With the value.
        ValueError: The same.
    """
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers such as (0.9, 0.95), got {betas!r}")
    if not all(map(is_number, betas)):
        raise TypeError(f"betas must be two numbers, got {betas!r}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must lie in [0, 1), got {betas}")
