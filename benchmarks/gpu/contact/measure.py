"""Timers that mean the same on a GPU and a CPU, and counts of launches and bytes.

A duration is the time between two CUDA events on a GPU, and between two readings of a clock on a
CPU.
"""

import statistics
import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], object]


class Mark:
    """A moment in the stream of the device's work."""

    def __init__(self, device: torch.device) -> None:
        self._event: Any = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()
        self._clock = time.perf_counter()

    def seconds_since(self, earlier: "Mark") -> float:
        """Return the time from ``earlier`` to this mark; the device must have passed both."""
        if self._event is None or earlier._event is None:
            return self._clock - earlier._clock
        return float(earlier._event.elapsed_time(self._event)) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timing(NamedTuple):
    """Durations of repeated work, in milliseconds."""

    median: float
    fastest: float
    slowest: float
    repeats: int

    def row(self, prefix: str = "") -> dict[str, float]:
        """Return the timing as values of a row."""
        return {
            f"{prefix}ms": round(self.median, 5),
            f"{prefix}ms_fastest": round(self.fastest, 5),
            f"{prefix}ms_slowest": round(self.slowest, 5),
            f"{prefix}repeats": self.repeats,
        }


def _timing(durations: list[float]) -> Timing:
    ms = [1e3 * duration for duration in durations]
    return Timing(statistics.median(ms), min(ms), max(ms), len(ms))


def time_work(
    work: Work, device: torch.device, *, seconds: float = 0.25, most: int = 30, warm: int = 3
) -> Timing:
    """Return how long the device takes for ``work``, repeated for about ``seconds``."""
    for _ in range(warm):
        work()
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    once = max(time.perf_counter() - begin, 1e-6)
    repeats = max(3, min(most, int(seconds / once)))
    marks = [Mark(device)]
    for _ in range(repeats):
        work()
        marks.append(Mark(device))
    synchronize(device)
    return _timing([b.seconds_since(a) for a, b in pairwise(marks)])


def time_each(work: Work, device: torch.device, *, calls: int = 20) -> Timing:
    """Return how long the device takes for ``work`` if it need not wait for the host.

    On a GPU, ``calls`` calls become one graph: otherwise, work of a few microseconds would end
    before the host has launched the next call.
    """
    if device.type != "cuda":
        return time_work(work, device)

    def several() -> None:
        for _ in range(calls):
            work()

    timing = time_work(capture(several, device).replay, device)
    median, fastest, slowest = (ms / calls for ms in timing[:3])
    return Timing(median, fastest, slowest, timing.repeats)


def time_host(work: Work, device: torch.device, *, repeats: int = 5) -> Timing:
    """Return how long the host is busy with ``work``; the device may still work afterwards."""
    durations = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        work()
        durations.append(time.perf_counter() - begin)
    synchronize(device)
    return _timing(durations)


def capture(work: Work, device: torch.device) -> torch.cuda.CUDAGraph:
    """Return ``work`` as a CUDA graph; before, it runs once on the stream of the capture."""
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    settle(work)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        work()
    return graph


def settle(work: Work) -> None:
    """Let an optimizer of the library read the flags of its last step.

    An item of `hazards` tries a capture while these flags are pending.
    """
    skipped = getattr(getattr(work, "__self__", None), "skipped", None)
    if skipped is not None:
        skipped()


class Launch(NamedTuple):
    """What one kernel did in a profile."""

    name: str
    calls: int
    ms: float


def profile_kernels(work: Work, device: torch.device) -> list[Launch]:
    """Return the kernels of ``work`` (operators, on a CPU) with their time, the slowest first."""
    _start_profiler(device)
    synchronize(device)
    on_gpu = device.type == "cuda"
    with profile(activities=_activities(device)) as seen:
        work()
        synchronize(device)
    found: dict[str, tuple[int, float]] = {}
    events: Any = seen.events()
    for event in events:
        if on_gpu != (event.device_type.name == "CUDA") or _is_label(event):
            continue
        calls, micros = found.get(event.name, (0, 0.0))
        took = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        found[event.name] = calls + 1, micros + took
    launches = [Launch(name, calls, micros / 1e3) for name, (calls, micros) in found.items()]
    return sorted(launches, key=lambda launch: -launch.ms)


def _is_label(event: Any) -> bool:
    """Whether an event only names a range of other events, as ``Optimizer.step`` does."""
    marked = bool(getattr(event, "is_user_annotation", False))
    return marked or event.name.startswith(("Optimizer.", "ProfilerStep"))


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]


@cache
def _start_profiler(device: torch.device) -> None:
    """Profile next to nothing: the first profile of a process may miss kernels."""
    with profile(activities=_activities(device)):
        torch.zeros(8, dtype=torch.float32, device=device).add_(1.0)
        synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes that tensors on a GPU held since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def held_bytes(device: torch.device) -> int:
    """Return the bytes that tensors on a GPU hold, and reset the peak."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
