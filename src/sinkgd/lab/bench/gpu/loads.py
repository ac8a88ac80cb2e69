"""How often a step reads its gradients, counted while triton's interpreter runs the kernels.

Kernels' loads are counted by address, entry by entry. Torch's own readings are counted by the
tensors that its calls are given; float32 copies of gradients are watched like gradients.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Calls that are given a tensor for its shape alone.
_SHAPES = ("empty_like", "zeros_like", "ones_like", "full_like", "new_")


@dataclass
class Readings:
    """What was read of gradients and of their copies, and what was copied: entries."""

    gradients: int  # entries of all of them
    by_kernels: int = 0
    by_torch: int = 0
    copied: int = 0
    _ranges: list[tuple[int, int]] = field(default_factory=list)

    def watch(self, x: Tensor) -> None:
        """Count what is read of a tensor from now on."""
        self._ranges.append((x.data_ptr(), x.data_ptr() + x.nbytes))

    def is_watched(self, x: Tensor) -> bool:
        """Whether a tensor lies in one that is watched."""
        return any(begin <= x.data_ptr() < end for begin, end in self._ranges)

    def load(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        """Count the loads of one instruction of one program."""
        for begin, end in self._ranges:
            self.by_kernels += int(np.count_nonzero((pointers >= begin) & (pointers < end) & mask))

    @property
    def an_entry(self) -> float:
        """Readings of each entry of a gradient, on an average."""
        return (self.by_kernels + self.by_torch) / self.gradients

    @property
    def copies(self) -> float:
        """Float32 copies of each gradient, on an average."""
        return self.copied / self.gradients


@contextmanager
def readings(grads: Sequence[Tensor]) -> Iterator[Readings]:
    """Count what is read of gradients, by kernels in triton's interpreter and by torch."""
    from triton.runtime.interpreter import interpreter_builder as builder

    found = Readings(sum(grad.numel() for grad in grads))
    for grad in grads:
        found.watch(grad)
    masked = builder.create_masked_load

    def load(pointers: Any, mask: Any, *others: Any) -> Any:
        found.load(pointers.data, mask.data)
        return masked(pointers, mask, *others)

    sides = {_sides(grad) for grad in grads}
    with patch.object(builder, "create_masked_load", load), _OfTorch(found, sides):
        yield found


class _OfTorch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts readings by torch, and copies: new float32 matrices with a gradient's sides."""

    def __init__(self, found: Readings, sides: set[tuple[int, ...]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found, self.sides = found, sides
        self.kept: list[Tensor] = []  # so that no other tensor comes to lie where a copy was

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        if not _is_view(func) and not any(name in str(func) for name in _SHAPES):
            read = _tensors([*args, *(x for name, x in given.items() if name != "out")])
            self.found.by_torch += sum(x.numel() for x in read if self.found.is_watched(x))
        for x in _tensors(result):
            is_copy = x.dtype == torch.float32 and _sides(x) in self.sides
            if is_copy and not self.found.is_watched(x):
                self.found.copied += x.numel()
                self.found.watch(x)
                self.kept.append(x)
        return result


def _sides(x: Tensor) -> tuple[int, ...]:
    return tuple(sorted(x.shape[-2:]))


def _is_view(func: Any) -> bool:
    aliases = [one.alias_info for one in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, tuple | list):
        for x in found:
            yield from _tensors(x)
