"""The machine: versions, rates of copying and reading, what a launch costs."""

import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from contact.items import Item, Row, Section, Setting, need_gpu
from contact.measure import capture, time_each, time_host, time_work

PACKAGES = ("triton", "numba", "pytest", "hypothesis", "pytest_timeout", "transformers")
COMMANDS = ("ncu", "nvcc", "nvidia-smi", "cc", "gcc", "compute-sanitizer")


def section() -> Section:
    """Return the section."""
    items = (
        Item("machine", machine),
        Item("copy", copy_rate),
        Item("read", read_rate),
        Item("product", product_rate),
        Item("launch", launch_cost),
        Item("backends", backends),
    )
    return Section("environment", 20, items)


def machine(setting: Setting) -> Iterator[Row]:
    """Name the device, the versions and the tools."""
    row: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: importlib.util.find_spec(name) is not None for name in PACKAGES},
        "commands": {name: shutil.which(name) for name in COMMANDS},
        "cores": os.cpu_count(),
        "processor": _processor(),
    }
    if setting.on_gpu:
        properties = torch.cuda.get_device_properties(setting.device)
        row |= {
            "device": properties.name,
            "devices": torch.cuda.device_count(),
            "capability": list(torch.cuda.get_device_capability(setting.device)),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "clocks": _clocks(),
        }
    yield row


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _clocks() -> str:
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return (answer.stdout or answer.stderr).strip()


def _sizes(setting: Setting) -> list[int]:
    """Return the bytes of buffers, some of which fit the L2 cache of a GPU."""
    if setting.tiny:
        return [1 << 16, 1 << 18]
    return [4 << 20, 8 << 20, 16 << 20, 24 << 20, 1 << 30, 4 << 30]


def copy_rate(setting: Setting) -> Iterator[Row]:
    """Copy one buffer to another; bytes read and bytes written count."""
    for size in _sizes(setting):
        source = torch.randn(size // 4, dtype=torch.float32, device=setting.device)
        target = torch.empty_like(source)
        timing = time_each(lambda a=target, b=source: a.copy_(b), setting.device)  # type: ignore[misc]
        rate = 2 * size / timing.median / 1e9
        yield {"bytes": size, "tb_per_second": round(rate, 3), **timing.row()}


def read_rate(setting: Setting) -> Iterator[Row]:
    """Add up one buffer; a small one is read from the L2 cache again and again."""
    for size in _sizes(setting):
        source = torch.randn(size // 4, dtype=torch.float32, device=setting.device)
        timing = time_each(lambda a=source: a.sum(), setting.device)  # type: ignore[misc]
        yield {
            "bytes": size,
            "tb_per_second": round(size / timing.median / 1e9, 3),
            **timing.row(),
        }


def product_rate(setting: Setting) -> Iterator[Row]:
    """Multiply two square matrices."""
    side = 128 if setting.tiny else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, dtype=dtype, device=setting.device) for _ in range(2))
        timing = time_work(lambda x=a, y=b: x @ y, setting.device, most=8)  # type: ignore[misc]
        rate = 2 * side**3 / timing.median / 1e9
        yield {"dtype": str(dtype), "side": side, "tflops": round(rate, 1), **timing.row()}


def launch_cost(setting: Setting) -> Iterator[Row]:
    """Launch a kernel that does next to nothing many times: by the host, and from a graph."""
    small = torch.zeros(32, dtype=torch.float32, device=setting.device)
    count = 20 if setting.tiny else 1000

    def work() -> None:
        for _ in range(count):
            small.add_(1.0)

    yield {
        "of": "host",
        "launches": count,
        **time_host(work, setting.device).row("host_"),
        **time_work(work, setting.device).row(),
    }
    need_gpu(setting)
    graph = capture(work, setting.device)
    yield {"of": "graph", "launches": count, **time_work(graph.replay, setting.device).row()}


def backends(setting: Setting) -> Iterator[Row]:
    """Say which backend ``auto`` takes, and why it does not take the others."""
    from sinkgd.kernels import describe, select  # noqa: PLC0415 - its failure is this item's

    yield {
        "auto": select("auto", setting.device).name,
        "all": [list(row) for row in describe(setting.device)],
    }
