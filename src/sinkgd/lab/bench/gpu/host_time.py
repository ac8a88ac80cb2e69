"""The host's time for a step on a GPU, measured without one.

The optimizer, the backend ``triton`` and triton's launcher run as they do with a GPU. Made up are
the device, whose memory nobody touches, the compiler, and the driver's launch, which does nothing.
CPU tensors stand for those of the device: what CUDA's allocator, its streams and its driver add is
not in the figures; a step calls them as often for one matrix as for all.

    python -m sinkgd.lab.bench.gpu.host_time
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sinkgd import SinkGD
from sinkgd.kernels import registry
from sinkgd.kernels.triton import TritonBackend, backend, descent, launch, launches, tables
from sinkgd.lab.bench.workloads import matrix_shapes

MODELS = ("llama-60m", "llama-1b", "llama-7b")
CACHE = 50 << 20  # bytes of an H100's L2
TARGET = ("cuda", 90, 32)
SPACES = 64  # places at which gradients may lie, 16 bytes apart


class HostTime(NamedTuple):
    """What the host does in one step."""

    model: str
    matrices: int
    launches: int
    milliseconds: float  # the median of some steps
    backend_milliseconds: float  # of it, inside the backend
    calls: int  # of Python functions
    torch_calls: int  # operations that torch dispatches
    copies: int  # of tables to the device
    dispatched: int  # launches that went through triton's dispatcher
    compiled: int  # kernels

    @property
    def microseconds(self) -> float:
        """Those of a launch."""
        return 1e3 * self.milliseconds / self.launches


class Gpu:
    """A GPU that is made up: what the driver would do is counted."""

    def __init__(self) -> None:
        self.backend = TritonBackend()
        self.launches = 0
        self.compiled = 0
        self.dispatched = 0
        self.copies = 0

    def launch(self, *_: object) -> None:
        """Stand for the driver's launch."""
        self.launches += 1


@contextmanager
def made_up_gpu() -> Iterator[Gpu]:
    """Make triton see a GPU, and the backend take CPU tensors for tensors of it.

    Raises:
        RuntimeError: If triton's interpreter is on in this process.
    """
    if backend.interpreting():
        raise RuntimeError("triton's interpreter is on; measure in a process without it")
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.runtime import driver

    gpu = Gpu()
    device = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget(*TARGET),
        allocate_default_profile_scratch=lambda *_: None,
    )

    def compiled(*_: object, **__: object) -> SimpleNamespace:
        gpu.compiled += 1
        start = CudaLauncher.__new__(CudaLauncher)
        vars(start).update(
            launch=gpu.launch,
            gsan_enabled=False,
            num_ctas=1,
            global_scratch_size=0,
            global_scratch_align=1,
            profile_scratch_size=0,
            profile_scratch_align=1,
            launch_cooperative_grid=False,
            launch_pdl=False,
            arg_annotations=[],
            kernel_signature=b"",
        )
        return SimpleNamespace(
            run=start, function=1, packed_metadata=(8, 1, 0), launch_metadata=lambda *_: None
        )

    def dispatched(kernel: Any, *arguments: Any, **constants: Any) -> Any:
        gpu.dispatched += 1
        return dispatch(kernel, *arguments, **constants)

    def copied(own: tables.Tables, *arguments: Any) -> Tensor:
        gpu.copies += 1
        return copy(own, *arguments)

    def options(_: torch.device, threads: int, **kinds: bool) -> dict[str, object]:
        found = {"wide": False, "bare": False, "lean": False, **kinds}
        return descent.options_of("cuda", TARGET[2], threads, **found)

    dispatch, copy = launch.launch, tables.Tables._copy
    modules = launch.sweep(), launch.finish(), launch.loops(), launch.step()
    kernels = {
        id(value): value
        for module in modules
        for value in vars(module).values()
        if hasattr(value, "create_binder")
    }
    with ExitStack() as stack:
        stack.enter_context(patch.object(driver, "_active", device))
        for kernel in kernels.values():
            caches: dict[int, Any] = defaultdict(kernel.create_binder)
            stack.enter_context(patch.object(kernel, "device_caches", caches))
        for place, name, value in [
            ("triton.compiler", "compile", compiled),
            (launch.__name__, "launch", dispatched),
            (launches.__name__, "_variants", {}),
            (descent.__name__, "panel_options", options),
            (backend.__name__, "_cached_bytes", lambda _: CACHE // 2),
        ]:
            stack.enter_context(patch(f"{place}.{name}", value))
        stack.enter_context(patch.object(tables.Tables, "_copy", copied))
        stack.enter_context(patch.object(TritonBackend, "supports", lambda *_: True))
        stack.enter_context(patch.object(registry, "BACKENDS", (gpu.backend,)))
        _forget()
        stack.callback(_forget)
        yield gpu


def _forget() -> None:
    """Drop what was found out for another device."""
    descent.sweep_constants.cache_clear()
    descent.finish_constants.cache_clear()


class Step:
    """An optimizer's step on the matrices of a model, in bfloat16; gradients move every time."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.params = [nn.Parameter(_empty(shape)) for shape in shapes]
        self.memory = [_empty((param.numel() + 8 * SPACES,)) for param in self.params]
        self.taken = 0
        self.optimizer = SinkGD(self.params, lr=1e-3, deflated_rank=0, backend="triton")

    def move_gradients(self) -> None:
        """Let gradients lie where no earlier ones did."""
        at = 8 * (self.taken % SPACES)
        self.taken += 1
        for param, memory in zip(self.params, self.memory, strict=True):
            param.grad = memory[at : at + param.numel()].view(param.shape)

    def __call__(self) -> None:
        """Take it."""
        self.optimizer.step()


def _empty(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cpu")


def measure(model: str, steps: int = 21, layers: int | None = None) -> HostTime:
    """Measure the steady steps of a model's matrices.

    Args:
        model: A preset of `sinkgd.lab.models`.
        steps: How many.
        layers: Of the model; all by default.
    """
    shapes = matrix_shapes(model, layers)
    with made_up_gpu() as gpu, torch.no_grad():
        step = Step(shapes)
        for _ in range(3):
            step.move_gradients()
            step()
        inside = _Inside(gpu.backend)
        times, within = [], []
        for _ in range(steps):
            step.move_gradients()
            inside.seconds = 0.0
            begin = perf_counter()
            step()
            times.append(perf_counter() - begin)
            within.append(inside.seconds)
        inside.leave()
        step.move_gradients()
        gpu.launches = gpu.copies = gpu.dispatched = gpu.compiled = 0
        calls = _python_calls(step)
        counted = gpu.launches, gpu.copies, gpu.dispatched, gpu.compiled
        step.move_gradients()
        with _Operations() as operations:  # type: ignore[no-untyped-call]
            step()
    return HostTime(
        model,
        len(shapes),
        counted[0],
        1e3 * median(times),
        1e3 * median(within),
        calls,
        operations.count,
        *counted[1:],
    )


class _Inside:
    """Adds up the time inside a backend's `descend_`."""

    def __init__(self, taken: TritonBackend) -> None:
        self.seconds, self.taken = 0.0, taken
        found = taken.descend_

        def timed(*arguments: Any, **options: Any) -> Any:
            begin = perf_counter()
            try:
                return found(*arguments, **options)
            finally:
                self.seconds += perf_counter() - begin

        vars(taken)["descend_"] = timed

    def leave(self) -> None:
        """Let the backend be as it was."""
        del vars(self.taken)["descend_"]


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that torch dispatches."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _python_calls(step: Callable[[], None]) -> int:
    """Count the Python functions that a step calls, but for the made-up launch."""
    count = 0

    def note(frame: Any, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code is not Gpu.launch.__code__

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def write_milliseconds() -> None:
    """Write the milliseconds of each model as JSON."""
    sys.stdout.write(json.dumps({model: measure(model).milliseconds for model in MODELS}))


def main() -> None:
    """Print a line a model."""
    sys.stdout.write(
        f"{'model':10}{'matrices':>9}{'launches':>9}{'ms':>8}{'backend':>8}{'µs/launch':>10}"
        f"{'calls':>7}{'torch':>6}{'copies':>7}\n"
    )
    for model in MODELS:
        found = measure(model)
        sys.stdout.write(
            f"{found.model:10}{found.matrices:9}{found.launches:9}{found.milliseconds:8.2f}"
            f"{found.backend_milliseconds:8.2f}{found.microseconds:10.2f}{found.calls:7}"
            f"{found.torch_calls:6}{found.copies:7}\n"
        )


if __name__ == "__main__":
    main()
