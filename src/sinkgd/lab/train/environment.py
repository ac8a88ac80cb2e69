"""What a run ran on: versions, the code's commit, the device."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import sinkgd

PACKAGES = ("torch", "numpy", "tokenizers", "numba", "transformers")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return what another machine would have to match to repeat a run's figures."""
    return {
        "sinkgd": sinkgd.__version__,
        "commit": commit(),
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
    """Return the processor's model."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Return the name of the device that trains."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "cpu"


def commit() -> str | None:
    """Return the commit of this package's source, with ``-dirty`` where it was changed.

    None where the package is installed and not run from its repository, or there is no git.
    """
    source = Path(sinkgd.__file__)
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    return _git(source.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


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
