"""Bytes by part: weights, gradients, optimizer state, and the peak of them all."""

import ctypes
import resource
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sinkgd.distributed.shards import local
from sinkgd.lab.results import Memory

_STATUS = Path("/proc/self/status")
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4

_NEVER = (1 << 31) - 1  # mallopt takes an int
_GROWTH = 64 << 20  # bytes
_KEPT_BLOCK = 1 << 20  # bytes


def measure_memory(model: nn.Module, optimizer: Optimizer, device: torch.device) -> Memory:
    """Count the bytes that this rank holds now; gradients count while they are there."""
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return Memory(
        _bytes(parameters),
        _bytes(gradients),
        _bytes(state_tensors(optimizer)),
        peak_bytes(device),
    )


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """List the tensors that an optimizer keeps, those in lists of its state, too."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    found: list[Tensor] = []
    while values:
        value = values.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list):
            values.extend(value)
    return found


def peak_bytes(device: torch.device) -> int:
    """Return the allocator's peak on a GPU, else the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux ru_maxrss survives exec, so a child would report its parent's peak. VmHWM does not.
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    largest_resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest_resident if sys.platform == "darwin" else largest_resident * 1024


def return_freed_memory() -> None:
    """Let glibc, where it is there, return freed gradients to the system at once.

    By itself it learns to keep freed blocks of up to 32 MiB for later, in pieces that the next
    gradient does not fit into: a step of llama-1b then held half its weights again. Blocks from
    1 MiB go back at once here; were those of up to 4 MiB kept, whose places the inputs of the
    blocks break up, it would hold a twentieth more. It costs the system's work of handing out
    clean pages.
    """
    _set_malloc({_M_MMAP_THRESHOLD: _KEPT_BLOCK})


def keep_freed_memory() -> None:
    """Let glibc, where it is there, keep all freed blocks for the next step.

    By itself it returns blocks of more than 32 MiB to the system, as the logits are, and the system
    clears their pages when the next step asks for them. That took half the time of a step of
    llama-nano with 4,096 tokens on two cores of an AMD EPYC.
    """
    _set_malloc({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER, _M_TOP_PAD: _GROWTH})


def _set_malloc(options: Mapping[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)
