"""What a step holds at once: storages counted from their first tensor to their last.

Tensors are fake: they have shapes, types and a device, and no memory. Operators choose the kernels
of that device, so that what autograd keeps is what it keeps in training; only what a kernel
allocates inside itself is not seen.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Live:
    """Bytes that are held at one moment, besides weights and optimizer state."""

    activations: int = 0
    loss: int = 0  # logits and what is made of them
    gradients: int = 0  # of parameters, whole

    @property
    def total(self) -> int:
        """All of them."""
        return self.activations + self.loss + self.gradients

    def further(self, other: "Live", times: int) -> "Live":
        """Go on along the line from here to ``other``, ``times`` as far again."""
        return Live(
            *(
                getattr(other, f.name) + times * (getattr(other, f.name) - getattr(self, f.name))
                for f in fields(self)
            )
        )


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operators make, and finds the peak of each moment.

    Args:
        known: Tensors that were there before, which do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peaks: dict[str, Live] = {}
        self.part = "activations"  # that new storages belong to
        self._moment = ""
        self._held = {field.name: 0 for field in fields(Live)}
        self._storages: dict[int, tuple[Any, str, int]] = {}  # a weak reference, part, bytes
        self._known = [x.untyped_storage() for x in known]
        self._ignored = {id(storage) for storage in self._known}

    def enter(self, moment: str) -> None:
        """Begin a moment; what is held goes on to be."""
        self._moment = moment
        self._note()

    def is_gradient(self, gradient: Tensor) -> None:
        """Count a tensor among the gradients of parameters from now on."""
        key = id(gradient.untyped_storage())
        reference, part, size = self._storages[key]
        self._storages[key] = reference, "gradients", size
        self._held[part] -= size
        self._held["gradients"] += size

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator and count what it made."""
        del types
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        self._note()
        return out

    def _see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = id(storage)
        if key in self._storages or key in self._ignored:
            return

        def gone(_: object) -> None:
            _, part, size = self._storages.pop(key)
            self._held[part] -= size

        size = storage.nbytes()
        self._storages[key] = weakref.ref(storage, gone), self.part, size
        self._held[self.part] += size

    def _note(self) -> None:
        now = Live(**self._held)
        if now.total >= self.peaks.get(self._moment, Live()).total:
            self.peaks[self._moment] = now
