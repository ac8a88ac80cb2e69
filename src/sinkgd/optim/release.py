"""The step inside backward: each gradient is applied as soon as it is complete, and freed.

By default, memory then holds only small gradients and the one that is being computed. A normalized
step of a parameter needs no other gradients: clipping by a global norm and loss scaling would not
change the step.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from sinkgd.distributed.shards import is_dtensor, largest_shard_size
from sinkgd.number_check import check_flag, check_number
from sinkgd.optim.arguments import suggest_names
from sinkgd.optim.grouped import GroupedOptimizer

# Smaller gradients, such as those of norms and biases, wait for others: calling their step takes
# longer than the step itself. Not measured.
SMALL_BYTES = 64 << 10

# The keys are the parameters whose gradients are released.
_RELEASED = WeakIdKeyDictionary()


class GradientRelease:
    """Let ``loss.backward()`` update the parameters of an optimizer, and free their gradients.

    The training loop does not change. ``optimizer.step()`` ends the step: it updates the
    parameters whose gradients remain, frees these gradients, and reports non-finite gradients as an
    ordinary step does. Learning rates are read while backward runs, so a scheduler that steps after
    the optimizer works as usual. If all gradients are finite, the result is that of the ordinary
    step, bit for bit. A parameter with a non-finite gradient is left unchanged; in an AdamW group,
    so are the parameters that are updated together with it.

    Parameters of the optimizer may be frozen or unfrozen at any time, and others may be added. A
    new parameter keeps its gradient until the next ``step()``; from then on, its gradient is
    released, too.

    FSDP2 reduces gradients before they arrive here, so it works as well. On a mesh the gradients
    that are applied together (see ``bucket_bytes``) have messages of their own: the more are
    applied together, the fewer messages are sent.

    Args:
        optimizer: An optimizer of this package. Groups of ``"adamw-spam"`` are refused, since their
            step needs the norm of all gradients.
        bucket_bytes: Gradients wait until their bytes reach this number, and are then applied
            together; the last gradients wait for ``step()``. Under FSDP2 the largest shard on any
            rank counts. With 0, every gradient is applied immediately, except those below 64 KiB:
            they wait for the next gradient of 64 KiB or more, until there are 64 KiB of them, or
            until backward ends.
        averaged: Whether plain tensors have the same gradient on all ranks as soon as backward has
            computed it, as under tensor parallelism. DistributedDataParallel averages gradients
            later.

    Raises:
        TypeError: If ``optimizer`` is not an optimizer of this package, needs all gradients at
            once, or has plain tensors on several ranks while ``averaged`` is False; or if another
            argument has the wrong type.
        ValueError: If ``bucket_bytes`` is negative, or another `GradientRelease` already handles a
            parameter of ``optimizer``.

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

    @suggest_names({})
    def __init__(
        self, optimizer: GroupedOptimizer, *, bucket_bytes: int = 0, averaged: bool = False
    ) -> None:
        if not isinstance(optimizer, GroupedOptimizer):
            raise TypeError(
                "GradientRelease takes an optimizer of this package, such as SinkGD, SWAN or MNGD; "
                f"got {type(optimizer).__name__}"
            )
        check_number("bucket_bytes", bucket_bytes)
        check_flag("averaged", averaged)
        optimizer.check_one_by_one()
        self._optimizer = optimizer
        self._bucket_bytes = bucket_bytes
        self._averaged = averaged
        self._accumulating = False
        self._lock = threading.Lock()
        self._names: dict[Tensor, str] = {}
        self._param_hooks: dict[Tensor, RemovableHandle] = {}
        self._waiting: dict[Tensor, None] = {}  # in the order in which gradients arrived
        self._waiting_bytes = 0
        self._applied: set[Tensor] = set()  # parameters that were updated in this step
        self._running: set[int] = set()  # calls that applied a gradient and have not ended
        self._watched: set[int] = set()  # calls of backward that will report their end
        self._follow_parameters()
        self._step_hook = optimizer.register_step_pre_hook(self._before_step)
        # So that GradScaler.step is refused by `_before_step`, and not by an assertion of torch.
        self._supported_scaling = getattr(optimizer, "_step_supports_amp_scaling", False)
        optimizer._step_supports_amp_scaling = True

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let backward only accumulate gradients; for every micro-batch of a step but the last."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def reset(self) -> None:
        """Abandon the current step, after an exception in backward, and free all gradients.

        Updates that backward has already applied remain.
        """
        self._begin_step()
        for param in self._names:
            param.grad = None
        self._optimizer.zero_grad()

    def remove(self) -> None:
        """Apply the waiting gradients, and do not handle those of later backward calls."""
        self._flush()
        self._remove_hooks()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop handling gradients; after an exception, do not apply the waiting gradients."""
        if error is None:
            self.remove()
        else:
            self._remove_hooks()

    def _remove_hooks(self) -> None:
        self._step_hook.remove()
        for param in [*self._param_hooks]:
            self._unwatch(param)
        self._optimizer._step_supports_amp_scaling = self._supported_scaling

    def _follow_parameters(self) -> None:
        """Watch the parameters that the optimizer has now, and no others."""
        names = {param: name for name, param in self._optimizer.named_parameters()}
        for param, name in names.items():
            if param.requires_grad and param not in self._param_hooks:
                self._check(param, name)
        for param in self._param_hooks.keys() - names.keys():
            self._unwatch(param)
        for param in names:
            if param.requires_grad and param not in self._param_hooks:
                hook = param.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
                self._param_hooks[param] = hook
                _RELEASED[param] = True
        self._names = names

    def _unwatch(self, param: Tensor) -> None:
        self._param_hooks.pop(param).remove()
        del _RELEASED[param]

    def _check(self, param: Tensor, name: str) -> None:
        if param in _RELEASED:
            raise ValueError(
                f"the gradient of {name!r} is released by another GradientRelease, and can be "
                "applied and freed only once; call remove() of the other one first"
            )
        if _ranks() > 1 and not self._averaged and not is_dtensor(param):
            raise TypeError(
                f"{name!r} is a plain tensor, and there are {_ranks()} ranks; "
                "DistributedDataParallel averages its gradient only after it would be "
                "applied here. Use fully_shard (FSDP2), or pass averaged=True if every "
                "rank has the same gradient, as under tensor parallelism"
            )

    def _take(self, param: Tensor) -> None:
        """Apply a gradient that backward has completed, or keep it until others are complete."""
        if param.grad is None:
            return
        with self._lock:  # backward has a thread for each device
            if param in self._applied:
                raise RuntimeError(self._second_gradient(param))
            if self._accumulating:
                return
            if param not in self._waiting:
                self._waiting[param] = None
                # All ranks count the same bytes, and so flush the same gradients.
                self._waiting_bytes += largest_shard_size(param.grad) * param.grad.element_size()
            task = self._watch_backward()
            if self._waiting_bytes >= (self._bucket_bytes or SMALL_BYTES):
                self._running.add(task)
                self._flush()

    def _watch_backward(self) -> int:
        """Ask to be called at the end of the current backward, and return its number.

        After an exception in backward, the call does not come.
        """
        task = torch._C._current_graph_task_id()
        if task not in self._watched:
            self._watched.add(task)
            engine = Variable._execution_engine
            engine.queue_callback(lambda: self._end_of_backward(task))
        return task

    def _end_of_backward(self, task: int) -> None:
        with self._lock:
            if not self._bucket_bytes:
                self._flush()
            self._watched.discard(task)
            self._running.discard(task)

    def _flush(self) -> None:
        """Apply the waiting gradients."""
        waiting = list(self._waiting)
        self._waiting, self._waiting_bytes = {}, 0
        if waiting:
            self._apply(waiting)

    def _apply(self, params: list[Tensor]) -> None:
        """Update parameters and free their gradients; skip those that have left the optimizer."""
        updated = self._optimizer.update(params)
        self._applied.update(updated)
        for param in updated:
            param.grad = None

    def _before_step(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if hasattr(optimizer, "found_inf") or getattr(optimizer, "grad_scale", None) is not None:
            optimizer.__dict__.pop("found_inf", None)  # else later steps would be refused, too
            optimizer.__dict__.pop("grad_scale", None)
            raise TypeError(
                "a GradScaler looks at all gradients after backward, when they are already freed; "
                "train in bfloat16, or without GradientRelease"
            )
        if optimizer.is_probed():  # a probe only creates state
            return None
        self._follow_parameters()
        self._check_backward_ended()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._end_backward()
            return None
        if self._applied:
            raise RuntimeError(
                f"the gradient of {self._name(next(iter(self._applied)))} was applied before "
                "step(closure) was called, and the closure would apply a second one in the same "
                "step. Call backward only in the closure, or call step() without a closure"
            )

        def and_end_backward() -> Any:
            loss = closure()
            self._check_backward_ended()
            self._end_backward()
            return loss

        return (args[0], and_end_backward), {}

    @torch.no_grad()
    def _end_backward(self) -> None:
        """Apply all remaining gradients: waiting, accumulated, or of new parameters."""
        remaining = [p for _, p in self._optimizer.named_parameters() if p.grad is not None]
        for param in remaining:
            if param in self._applied:
                raise RuntimeError(self._second_gradient(param))
        if remaining:
            self._apply(remaining)
        self._begin_step()

    def _begin_step(self) -> None:
        self._waiting, self._waiting_bytes = {}, 0
        self._applied, self._running, self._watched = set(), set(), set()

    def _check_backward_ended(self) -> None:
        if self._running:
            some = f", such as {self._name(next(iter(self._applied)))}" if self._applied else ""
            raise RuntimeError(
                f"backward raised an exception after it had updated {len(self._applied)} "
                f"parameters{some}. Call release.reset() to abandon this step and keep these "
                "updates, or load a checkpoint to undo them"
            )

    def _second_gradient(self, param: Tensor) -> str:
        said = f"{self._name(param)} got a second gradient in one step, after the first was applied"
        if self._running - {torch._C._current_graph_task_id()}:
            return (
                f"{said}: another backward has not ended. If it raised an exception, call "
                "release.reset() to abandon its step; if it belongs to activation checkpointing, "
                "pass use_reentrant=False"
            )
        return (
            f"{said}: backward ran twice. Run all micro-batches but the last inside "
            "`with release.accumulate():`, do not retain the graph, and detach tensors by which "
            "the loss of another model reaches this one"
        )

    def _name(self, param: Tensor) -> str:
        name = self._names.get(param)
        return "a removed parameter" if name is None else repr(name)


def _ranks() -> int:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()
