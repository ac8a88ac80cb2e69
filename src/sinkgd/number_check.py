"""Checks of numeric arguments: errors give the name of the argument and its value."""

from numbers import Integral, Real
from typing import Any

from torch import Tensor


def is_number(value: object) -> bool:
    """Whether a value is a real number or a tensor of real numbers; True and False are not."""
    if isinstance(value, Tensor):
        return not value.is_complex() and not value.is_quantized
    return not isinstance(value, bool) and isinstance(value, Real)


def is_one_number(value: object) -> bool:
    """Whether a value is a number, or a tensor of one number."""
    return is_number(value) and not (isinstance(value, Tensor) and value.numel() != 1)


def is_whole_number(value: object) -> bool:
    """Whether a value is an integer; True and False are not."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def check_number(name: str, value: Any, *, least: float | None = 0.0) -> None:
    """Refuse a value that is not a number or is below ``least``.

    A tensor of one element counts as a number.

    Raises:
        TypeError: If ``value`` is not a number; the message gives the argument's name and value.
        ValueError: If ``value`` is NaN or below ``least``, or a tensor of several elements. If
            ``least`` is None, every number is accepted.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")
    if least is not None and not value >= least:
        raise ValueError(f"{name} must be at least {least:g}, got {value}")


def check_whole_number(name: str, value: Any) -> None:
    """Refuse a value that is not an integer.

    Raises:
        TypeError: If ``value`` is not an integer; the message gives the argument's name and value.
    """
    if not is_whole_number(value):
        raise TypeError(f"{name} must be a whole number, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Refuse a value that is neither True nor False.

    Raises:
        TypeError: If ``value`` is not a bool; the message gives the argument's name and value.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_decay_rate(name: str, value: Any) -> None:
    """Refuse a value that is not a number in [0, 1).

    Raises:
        TypeError: If ``value`` is not a number; the message gives the argument's name and value.
        ValueError: If ``value`` is not in [0, 1), or is a tensor of several elements.
    """
    check_number(name, value, least=None)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def check_betas(name: str, value: Any) -> None:
    """Refuse a value that is not a pair of decay rates.

    Raises:
        TypeError: If ``value`` is not a pair of numbers; the message gives the argument's name and
            value.
        ValueError: If one of the numbers is not in [0, 1), or is a tensor of several elements.
    """
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise TypeError(f"{name} must be a pair of numbers such as (0.9, 0.95), got {value!r}")
    if not all(map(is_number, value)):
        raise TypeError(f"{name} must be two numbers, got {value!r}")
    for beta in value:
        check_number(name, beta, least=None)
    if not all(0 <= beta < 1 for beta in value):
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def check_num_iters(num_iters: int, argument: str = "num_iters") -> None:
    """Refuse all but integers from 1 on; ``argument`` is the caller's name for ``num_iters``."""
    check_whole_number(argument, num_iters)
    if num_iters < 1:
        raise ValueError(f"{argument} must be at least 1, got {num_iters}")


def check_tol(tol: float | None) -> None:
    """Refuse a tolerance that is neither None nor a number of at least 0."""
    if tol is not None:
        check_number("tol", tol)
