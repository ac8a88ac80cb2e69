"""The memory that a training step holds at each moment, for any number of blocks.

Blocks are identical, so each further block adds a fixed number of bytes at each moment. Therefore
steps are run with `FEW` blocks and with one more, and extrapolated linearly to deeper models.
Memory changes linearly from block to block, so the maximum is at the first or the last blocks of a
pass. In the forward pass it only grows. So moments are named from the end of the forward pass, and
from both ends of the backward pass.

The steps run on fake tensors, which have shapes, types and a device, here a CPU, but no memory. A
storage counts from the creation of its first tensor until its last tensor is freed. Operators
choose the kernels of a CPU, so autograd saves the same tensors as in training on a CPU. Weights,
optimizer state and what a kernel allocates internally are not counted.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sinkgd.lab.models import Llama, add_adapters
from sinkgd.lab.plan.architecture import Architecture
from sinkgd.lab.plan.rank_model import rank_model
from sinkgd.lab.train.config import Precision
from sinkgd.lab.train.machine import arithmetic, weight_dtype
from sinkgd.lab.train.training_step import loss_of


@dataclass(frozen=True)
class Live:
    """Bytes held at one moment, besides weights and optimizer state."""

    activations: int = 0
    loss: int = 0  # logits and everything computed from them
    gradients: int = 0  # unsharded gradients of parameters

    @property
    def total(self) -> int:
        """All parts together."""
        return self.activations + self.loss + self.gradients

    def extrapolate(self, other: "Live", times: int) -> "Live":
        """Return ``other`` plus ``times`` times the difference between ``other`` and this one."""
        return Live(
            *(
                getattr(other, f.name) + times * (getattr(other, f.name) - getattr(self, f.name))
                for f in fields(self)
            )
        )


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the storages that operators create, and find the peak of each moment.

    Args:
        known: Tensors that existed before; they are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peaks: dict[str, Live] = {}
        self.part = "activations"  # the part of `Live` to which new storages are added
        self._moment = ""
        self._held = {field.name: 0 for field in fields(Live)}
        self._storages: dict[int, tuple[Any, str, int]] = {}  # a weak reference, part, bytes
        self._known = [x.untyped_storage() for x in known]
        self._ignored = {id(storage) for storage in self._known}

    def enter(self, moment: str) -> None:
        """Begin a moment; existing storages still count."""
        self._moment = moment
        self._note()

    def mark_gradient(self, gradient: Tensor) -> None:
        """Count a tensor as a gradient of a parameter from now on."""
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
        """Run an operator and count the storages of its results."""
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


FEW = 4  # number of blocks: two at each end of the backward pass
_CPU = torch.device("cpu")
LOSS, EMBEDDING = "the loss", "the embedding"
UPDATE = "the update"  # the moment after backward, when gradients are applied


@dataclass(frozen=True)
class Work:
    """What one rank computes in a step."""

    architecture: Architecture
    batch_size: int = 1  # sequences in a micro-batch
    micro_batches: int = 1  # number of micro-batches whose gradients are accumulated
    sequence_length: int = 2048  # tokens
    precision: Precision = "bf16"
    release: bool = False  # whether the last micro-batch frees each gradient once it is complete
    recompute: bool = False  # whether blocks run again in backward
    loss_chunk_tokens: int | None = None  # targets whose logits exist at once; None for all
    tp: int = 1  # ranks of a tensor-parallel group
    adapter_rank: int = 0  # of LoRA adapters; above 0, only they are trained; at 0, all weights


@lru_cache(maxsize=256)
def trace(work: Work) -> dict[str, Live]:
    """Return what the rank holds at the peak of each moment of its step."""
    layers = work.architecture.num_layers
    if layers <= FEW + 1:
        return run_on_fake_tensors(work, layers)
    fewer, more = run_on_fake_tensors(work, FEW), run_on_fake_tensors(work, FEW + 1)
    return {moment: fewer[moment].extrapolate(more[moment], layers - FEW - 1) for moment in fewer}


def run_on_fake_tensors(work: Work, layers: int) -> dict[str, Live]:
    """Run a step on fake tensors; return the peak of each moment.

    Args:
        work: The step to run.
        layers: Number of blocks.
    """
    model = rank_model(work.architecture, tokens=work.sequence_length, tp=work.tp, layers=layers)
    if work.adapter_rank:
        add_adapters(model, work.adapter_rank)
    with FakeTensorMode():
        _make_fake(model, weight_dtype(work.precision))
        model.model.recompute = work.recompute
        shape = (work.batch_size, work.sequence_length)
        tokens = torch.zeros(shape, dtype=torch.int64, device=_CPU)
        live = LiveStorages([*model.parameters(), *model.buffers(), tokens])
        step = _Step(model, live, work)
        with live:
            # All micro-batches from the second on hold the same memory, except that the last one
            # frees gradients if they are released.
            for number in range(min(work.micro_batches, 3 if work.release else 2), 0, -1):
                step.last = number == 1
                step.forward_and_backward(tokens)
            live.enter(UPDATE)
    return _named_from_ends(live.peaks, layers)


def _make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace weights and buffers on the meta device by fake CPU tensors; ties are kept."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if weight not in made:
                fake = torch.empty(weight.shape, dtype=dtype, device=_CPU)
                made[weight] = nn.Parameter(fake, requires_grad=weight.requires_grad)
            setattr(module, name, made[weight])
        for name, table in list(module.named_buffers(recurse=False)):
            fake = torch.empty(table.shape, dtype=table.dtype, device=_CPU)
            module.register_buffer(name, fake, persistent=False)


class _Step:
    """Runs a step, with hooks that tell `LiveStorages` which moment it is."""

    def __init__(self, model: Llama, live: LiveStorages, work: Work) -> None:
        self.last = True  # whether this is the last micro-batch
        self._model, self._live, self._work = model, live, work
        self._backward = False
        body = model.model
        for number, block in enumerate(body.layers):
            block.register_forward_pre_hook(lambda *_, n=number: self._begin(f"forward {n}"))
            block.register_forward_hook(
                lambda _, __, x, n=number: self._begin_at_gradient(x, f"backward {n}")
            )
        body.embed_tokens.register_forward_hook(
            lambda _, __, x: self._begin_at_gradient(x, EMBEDDING)
        )
        model.lm_head.register_forward_pre_hook(lambda *_: self._begin(LOSS, "loss"))
        for param in filter(lambda param: param.requires_grad, model.parameters()):
            param.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]

    def forward_and_backward(self, tokens: Tensor) -> None:
        self._backward = False
        self._live.part = "activations"
        self._live.enter(EMBEDDING)
        with arithmetic(self._work.precision, _CPU):
            summed = loss_of(self._model, tokens, tokens, self._work.loss_chunk_tokens)
        loss = summed / tokens.numel()
        self._backward = True
        torch.autograd.backward(loss)

    def _begin(self, moment: str, part: str = "activations") -> None:
        if not self._backward:  # recomputed blocks do not begin a moment
            self._live.part = part
            self._live.enter(moment)

    def _begin_at_gradient(self, x: Tensor, moment: str) -> None:
        """Begin a moment when the gradient of ``x`` is complete."""
        if self._backward or not x.requires_grad:
            return

        def arrived(_: Tensor) -> None:
            self._live.part = "activations"
            self._live.enter(moment)

        x.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _take(self, param: Tensor) -> None:
        assert param.grad is not None, "it was just accumulated"
        self._live.mark_gradient(param.grad)
        if self._work.release and self.last:
            param.grad = None


def _named_from_ends(peaks: dict[str, Live], layers: int) -> dict[str, Live]:
    if layers < FEW:
        return peaks
    named = {moment: peaks[moment] for moment in (LOSS, EMBEDDING, UPDATE)}
    for back in (1, 2):
        named[f"forward, block {back} from the end"] = peaks[f"forward {layers - back}"]
        named[f"backward, block {back} from the end"] = peaks[f"backward {layers - back}"]
        named[f"backward, block {back}"] = peaks[f"backward {back - 1}"]
    return named
