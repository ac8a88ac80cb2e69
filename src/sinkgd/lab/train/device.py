"""Where and in what arithmetic a run computes."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from sinkgd.lab.train.config import ConfigError, Device, Precision

_MOST_THREADS_PER_CORE = 16


def select_device(device: Device, *, option: str = "training.device") -> torch.device:
    """Return the device to compute on; ``auto`` takes CUDA where there is one.

    Of several CUDA devices each rank that torchrun starts has its own.

    Args:
        device: As it was asked for.
        option: By which, for the error.

    Raises:
        ConfigError: If CUDA was asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"{option} is 'cuda', but torch finds no CUDA device here; use --{option} cpu or auto"
        )
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if "LOCAL_RANK" not in os.environ:
        return torch.device("cuda")
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own


def check_threads(threads: int | None, *, option: str = "training.threads") -> None:
    """Refuse so many CPU threads that the system may not start them.

    Args:
        threads: As they were asked for.
        option: By which, for the error.

    Raises:
        ConfigError: With the most that may be.
    """
    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= _MOST_THREADS_PER_CORE * cores:
        raise ConfigError(
            f"{option} is {threads}; this machine has {cores} cores, so give from 1 to "
            f"{_MOST_THREADS_PER_CORE * cores}"
        )


def set_threads(threads: int | None) -> None:
    """Let torch use ``threads`` CPU threads; None leaves its choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def weight_dtype(precision: Precision) -> torch.dtype:
    """Return the type in which ``precision`` keeps the weights."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def arithmetic(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Return the context in which the model runs."""
    if precision != "bf16-autocast":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
