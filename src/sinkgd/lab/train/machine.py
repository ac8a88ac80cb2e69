"""The machine that a run uses: device, threads, precision, memory of the process, environment."""

import ctypes
import hashlib
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import sinkgd
from sinkgd.lab.train.config import ConfigError, Device, Precision

_MOST_THREADS_PER_CORE = 16
# Folders of the package whose code cannot change the losses of a run with a given configuration.
_NOT_OF_RUNS = (
    *(f"lab/{name}" for name in ("bench", "commands", "experiments", "plan", "report")),
    "integrations",
)
_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")  # as /proc/cpuinfo lists them


def select_device(device: Device, *, option: str = "training.device") -> torch.device:
    """Return the device to compute on; ``auto`` selects CUDA if it is available.

    Each rank that torchrun starts has a CUDA device of its own.

    Args:
        device: The requested device.
        option: Name of the option, for error messages.

    Raises:
        ConfigError: If CUDA was asked for and is absent.
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
    """Refuse numbers of CPU threads that the system may be unable to start.

    Args:
        threads: The requested number.
        option: Name of the option, for error messages.

    Raises:
        ConfigError: If the number is out of range; the message gives the range.
    """
    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= _MOST_THREADS_PER_CORE * cores:
        raise ConfigError(
            f"{option} is {threads}; this machine has {cores} cores, so give from 1 to "
            f"{_MOST_THREADS_PER_CORE * cores}"
        )


def set_threads(threads: int | None) -> None:
    """Let torch use ``threads`` CPU threads; None keeps torch's choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def weight_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of the weights of a model that is trained in ``precision``."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def arithmetic(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Return the context, with or without autocast, in which to run the model."""
    if precision != "bf16-autocast":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def synchronize(device: torch.device) -> None:
    """Wait for the device; call it before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


PACKAGES = ("torch", "numpy", "tokenizers", "numba", "transformers")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Describe everything that another machine must match to repeat a run's figures."""
    return {
        "sinkgd": sinkgd.__version__,
        "commit": commit(),
        "source": source_hash(),
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := installed_version(name)) is not None},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the processor's model and the vector instructions that torch finds on it.

    The model alone is not enough: virtual machines call different processors "AMD EPYC", on which
    losses differ in their last bits, and products in bfloat16 in their speed.
    """
    found = {"model name": "", "flags": ""}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in found:
                found[key.strip()] = value.strip()
    model = found["model name"] or platform.processor() or platform.machine()
    further = [name for name in _BFLOAT16_INSTRUCTIONS if name in found["flags"].split()]
    return ", ".join([model, torch.backends.cpu.get_cpu_capability(), *further])


def device_name(device: torch.device) -> str:
    """Return the name of the device that trains."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "cpu"


def commit() -> str | None:
    """Return the commit of this package's repository, with ``-dirty`` if tracked files differ.

    None if the package is not run from its repository, or there is no git.
    """
    source = Path(sinkgd.__file__)
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    return _git(source.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


@cache
def source_hash(package: Path | None = None) -> str:
    """Return a hash of the code on which the losses of a run depend, 12 hexadecimal digits.

    Unlike a commit, it also tells two changed working trees apart, and stays the same if only
    documents, tests or the code of reports and studies change.

    Args:
        package: Folder of the package; by default the one that is running.
    """
    root = package or Path(sinkgd.__file__).parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(tuple(f"{folder}/" for folder in _NOT_OF_RUNS)):
            found.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:12]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments],  # noqa: S607  the user's git, wherever it is
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


_STATUS = Path("/proc/self/status")
# Constants of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4

_NEVER = (1 << 31) - 1  # a threshold that is never reached; mallopt takes an int
_GROWTH = 64 << 20  # bytes requested from the system beyond what is needed
_KEPT_BLOCK = 1 << 20  # bytes; only smaller blocks are kept


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
    """Make glibc, if it is in use, return freed blocks of at least 1 MiB to the system immediately.

    By default glibc keeps freed blocks of up to 32 MiB, in fragments that the next gradient does
    not fit into. In a step of llama-1b, this wasted half as much memory as the weights take. If
    blocks of up to 4 MiB were kept, a step would take 5 % more memory, because the inputs of
    transformer blocks fragment the kept memory. The cost of the setting is that the system clears
    returned pages before it supplies them again.
    """
    _set_malloc({_M_MMAP_THRESHOLD: _KEPT_BLOCK})


def keep_freed_memory() -> None:
    """Make glibc, if it is in use, keep all freed blocks for the next step.

    By default glibc returns blocks of more than 32 MiB to the system, such as the logits, and the
    system clears their pages when the next step asks for them. That took half the time of a step
    of llama-nano with 4,096 tokens on two cores of an AMD EPYC.
    """
    _set_malloc({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER, _M_TOP_PAD: _GROWTH})


def _set_malloc(options: Mapping[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)
