"""The step inside backward: each gradient is applied as soon as it is there, and freed.

What training then holds is weights, activations and the one gradient that is being made. A step
along normalized gradients needs no other gradient than its own: clipping by a global norm and loss
scaling would change nothing for it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from sinkgd.optim.algorithms.contract import local, on_mesh
from sinkgd.optim.grouped import GroupedOptimizer


class GradientRelease:
    """Let ``loss.backward()`` update the parameters of an optimizer, and free their gradients.

    The training loop stays as it is. ``optimizer.step()`` then ends the step: it updates what is
    left, and raises what was found. Learning rates are read while backward runs, so a scheduler
    that steps after the optimizer works as ever. The result is that of the ordinary step, bit for
    bit; a non-finite gradient holds back its own parameter alone, in an AdamW group, too.

    Under FSDP2 gradients come here after they were reduced, so all of it works there as well. On a
    mesh every bucket costs its own messages; larger buckets need fewer.

    Args:
        optimizer: One of this package; not one with groups of ``"adamw-spam"``, whose step needs
            the norm of all gradients.
        bucket_bytes: Gradients wait until there are so many bytes of them, on this rank, and are
            then taken together. 0 waits for none.
        averaged: Whether gradients of plain tensors are the same on all ranks when backward has
            made them, as under tensor parallelism. DistributedDataParallel averages them later.

    Raises:
        TypeError: If ``optimizer`` is none of ours, needs all gradients at once, or holds plain
            tensors on several ranks and ``averaged`` is False.

    Examples:
        >>> import torch, sinkgd
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = sinkgd.SinkGD(model.parameters(), lr=1e-3)
        >>> release = sinkgd.GradientRelease(optimizer)
        >>> inputs = torch.randn(8, 4)
        >>> with release.accumulate():  # all micro-batches but the last
        ...     model(inputs[:4]).sum().backward()
        >>> model(inputs[4:]).sum().backward()
        >>> model.weight.grad is None
        True
        >>> optimizer.step()
    """

    def __init__(
        self, optimizer: GroupedOptimizer, *, bucket_bytes: int = 0, averaged: bool = False
    ) -> None:
        if not isinstance(optimizer, GroupedOptimizer):
            raise TypeError(
                f"gradients can be released to SinkGD, SWAN and MNGD; {type(optimizer).__name__} "
                "is none of them"
            )
        if bucket_bytes < 0:
            raise ValueError(f"bucket_bytes must be at least 0, got {bucket_bytes}")
        optimizer.check_one_by_one()
        named = optimizer.named_parameters()
        names = {param: name for name, param in named if param.requires_grad}
        if _ranks() > 1 and not averaged:
            for param, name in names.items():
                if not on_mesh(param):
                    raise TypeError(
                        f"{name!r} is a plain tensor on one of {_ranks()} ranks; "
                        "DistributedDataParallel averages its gradient only after it would be "
                        "applied here. Use fully_shard (FSDP2), or pass averaged=True if every "
                        "rank has the same gradient, as under tensor parallelism"
                    )
        self._optimizer = optimizer
        self._names = names
        self._bucket_bytes = bucket_bytes
        self._accumulating = False
        self._lock = threading.Lock()
        self._waiting: list[Tensor] = []
        self._waiting_bytes = 0
        self._taken: set[Tensor] = set()
        hooks = [
            param.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
            for param in names
        ]
        self._hooks = [
            *hooks,
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let gradients add up inside: for every micro-batch of a step but the last."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def remove(self) -> None:
        """Leave backward alone again, after what waits."""
        self._flush()
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave backward alone again."""
        self.remove()

    def _take(self, param: Tensor) -> None:
        if self._accumulating or param.grad is None:
            return
        with self._lock:  # backward has a thread for each device
            if param in self._taken:
                raise RuntimeError(
                    f"{self._names[param]!r} got a second gradient in one step, after the first "
                    "was applied: backward ran twice. Run all micro-batches but the last inside "
                    "`with release.accumulate():`, and do not retain the graph"
                )
            self._taken.add(param)
            self._waiting.append(param)
            self._waiting_bytes += local(param.grad).nbytes
            if self._waiting_bytes >= self._bucket_bytes:
                self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        self._optimizer.update(self._waiting)
        for param in self._waiting:
            param.grad = None
        self._waiting, self._waiting_bytes = [], 0

    def _before_step(self, optimizer: Any, args: object, kwargs: object) -> None:
        del args, kwargs
        if getattr(optimizer, "grad_scale", None) is not None:
            raise TypeError(
                "a GradScaler looks at all gradients after backward, and they are gone by then; "
                "train in bfloat16, or without GradientRelease"
            )
        self._after_step()

    def _after_step(self, *_: object) -> None:
        self._flush()
        self._taken = set()


def _ranks() -> int:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()
