"""Stochastic rounding to bfloat16: up or down at random, so that the mean is the number itself.

A bfloat16 is the upper half of a float32. The float32 is read as an integer, sixteen random bits
are added, and the lower half is cut off. The probability of rounding up is then the lower half of
the float32, as a fraction. The random bits are a function of a key and of the entry's index. They
do not depend on threads, blocks or the device, and a repeated step gives the same result.

References:
    The hash function is "lowbias32" by Chris Wellons, the least biased one that his search found:
    https://nullprogram.com/blog/2018/07/31/
"""

import torch
from torch import Tensor

# lowbias32: shift, multiply, shift, multiply, shift.
SHIFTS = (16, 15, 16)
FACTORS = (0x7FEB352D, 0x846CA68B)
_WORD = 0xFFFFFFFF
# SplitMix64.
_INCREMENT = 0x9E3779B97F4A7C15
_SHIFTS64 = (30, 27, 31)
_FACTORS64 = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_WORD64 = 0xFFFFFFFFFFFFFFFF


def random_bits(shape: torch.Size, key: Tensor) -> Tensor:
    """Return sixteen random bits per entry, int32 in [0, 65536).

    Entry k, counted row by row over ``shape``, gets the upper half of
    ``lowbias32((k + low) xor high)``, where ``low`` and ``high`` are the halves of ``key``.

    Args:
        shape: Shape of the parameter.
        key: 0-dim int64, on the parameter's device.
    """
    indices = torch.arange(shape.numel(), dtype=torch.int64, device=key.device)
    word = ((indices + (key & _WORD)) & _WORD) ^ ((key >> 32) & _WORD)
    for shift, factor in zip(SHIFTS, FACTORS, strict=False):
        word = ((word ^ (word >> shift)) * factor) & _WORD  # int64 wraps; its low half is right
    word ^= word >> SHIFTS[2]
    return (word >> 16).to(torch.int32).view(shape)


def round_to_bfloat16(x: Tensor, key: Tensor) -> Tensor:
    """Round a float32 tensor stochastically. NaN and infinity are preserved."""
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + random_bits(x.shape, key)) & ~0xFFFF
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).to(torch.bfloat16)


def keys_of_step(seed: int, step: Tensor, count: int, *, first: int = 0) -> Tensor:
    """Return ``count`` keys, int64 ``(count,)`` on the device of ``step``.

    Args:
        seed: The run's seed.
        step: Number of the step, 0-dim int64. Nothing waits for its device.
        count: Number of keys, one for each parameter.
        first: Number of the first key.
    """
    number = torch.arange(first, first + count, dtype=torch.int64, device=step.device)
    return _mix(_mix(step + _signed(_mixed(seed))) + number)


def _mixed(x: int) -> int:
    """`_mix` of one number, without torch."""
    x = (x + _INCREMENT) & _WORD64
    for shift, factor in zip(_SHIFTS64, _FACTORS64, strict=False):
        x = ((x ^ (x >> shift)) * factor) & _WORD64
    return x ^ (x >> _SHIFTS64[2])


def _mix(x: Tensor) -> Tensor:
    """One step of SplitMix64 (Steele et al. 2014), in int64 that wraps."""
    x = x + _signed(_INCREMENT)
    for shift, factor in zip(_SHIFTS64, _FACTORS64, strict=False):
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    return x ^ _shift_right(x, _SHIFTS64[2])


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # shifts in zeros, not the sign
