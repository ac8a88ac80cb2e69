"""The host's time for a step on a GPU, measured without a GPU.

The optimizer, the backend ``triton`` and triton's launcher run as they do with a GPU. The device,
the compiler and the driver are fakes: nothing touches the device's memory, and a launch does
nothing. CPU tensors stand in for those of the device. The figures leave out the time in CUDA's
allocator, streams and driver, which are called for each step or launch, not for each matrix.

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

from sinkgd import SinkGD
from sinkgd.kernels import registry
from sinkgd.kernels.triton import TritonBackend, backend, launch, support
from sinkgd.kernels.triton.tables import DeviceTables
from sinkgd.lab.bench.gpu.cases import CACHE_BYTES, LLAMAS, TARGETS
from sinkgd.lab.bench.gpu.recorded import TorchCalls, lost_updates_allowed
from sinkgd.lab.bench.workloads import matrix_shapes

TARGET = TARGETS["sm_90"]
SPACES = 64  # number of addresses that a gradient may have, 16 bytes apart


class HostTime(NamedTuple):
    """What the host does in one step."""

    model: str
    matrices: int
    launches: int
    milliseconds: float  # the median of several steps
    backend_milliseconds: float  # the part of `milliseconds` inside the backend
    calls: int  # calls of Python functions
    torch_calls: int  # operations that torch dispatches
    copies: int  # copies of tables to the device
    dispatched: int  # launches that went through triton's dispatcher
    compiled: int  # number of kernels that were compiled

    @property
    def microseconds(self) -> float:
        """The host's time per launch."""
        return 1e3 * self.milliseconds / self.launches


class FakeGpu:
    """A fake GPU that counts what the driver would do."""

    def __init__(self) -> None:
        self.backend = TritonBackend()
        self.launches = 0
        self.compiled = 0
        self.dispatched = 0
        self.copies = 0

    def launch(self, *_: object) -> None:
        """Stand in for the driver's launch."""
        self.launches += 1

    def compile(self, *_: object, **__: object) -> SimpleNamespace:
        """Stand in for triton's compiler: return a kernel whose launcher does nothing."""
        from triton.backends.nvidia.driver import CudaLauncher

        self.compiled += 1
        start = CudaLauncher.__new__(CudaLauncher)
        vars(start).update(
            launch=self.launch,
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


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Make triton see a GPU, and make the backend treat CPU tensors as the GPU's.

    Raises:
        RuntimeError: If triton's interpreter is on in this process.
    """
    if support.interpreting():
        raise RuntimeError("triton's interpreter is on; measure in a process without it")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    gpu = FakeGpu()
    device = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget(TARGET.backend, TARGET.architecture, TARGET.warp),
        allocate_default_profile_scratch=lambda *_: None,
    )

    def dispatched(kernel: Any, *arguments: Any, **constants: Any) -> Any:
        gpu.dispatched += 1
        return through_dispatcher(kernel, *arguments, **constants)

    def copied(own: DeviceTables, *arguments: Any) -> Tensor:
        gpu.copies += 1
        return copy(own, *arguments)

    through_dispatcher, copy = launch.dispatch, DeviceTables._copy
    kernels = {
        id(value): value
        for module in launch.KERNEL_MODULES
        for value in vars(launch.kernels(module)).values()
        if hasattr(value, "create_binder")
    }
    own_target = launch.GpuTarget(TARGET.backend, TARGET.warp)
    replaced: list[tuple[Any, str, Any]] = [
        (launch, "dispatch", dispatched),
        (launch, "_variants", {}),
        (launch, "target_of", lambda _: own_target),
        (backend, "_cached_bytes", lambda _: CACHE_BYTES),
        (DeviceTables, "_copy", copied),
        (TritonBackend, "supports", lambda *_: True),
        (registry, "backends", lambda: (gpu.backend,)),
    ]
    with ExitStack() as stack:
        stack.enter_context(patch.object(driver, "_active", device))
        for kernel in kernels.values():
            caches: dict[int, Any] = defaultdict(kernel.create_binder)
            stack.enter_context(patch.object(kernel, "device_caches", caches))
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(patch("triton.compiler.compile", gpu.compile))
        yield gpu


class Step:
    """A step on the matrices of a model, in bfloat16, whose gradients can move in memory."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], deflated_rank: int = 0) -> None:
        self.params = [nn.Parameter(_empty(shape)) for shape in shapes]
        self.memory = [_empty((param.numel() + 8 * SPACES,)) for param in self.params]
        self.taken = 0
        with lost_updates_allowed():
            self.optimizer = SinkGD(
                self.params, lr=1e-3, deflated_rank=deflated_rank, backend="triton"
            )

    def move_gradients(self) -> None:
        """Give gradients addresses that no gradients of the last ``SPACES - 1`` steps had."""
        at = 8 * (self.taken % SPACES)
        self.taken += 1
        for param, memory in zip(self.params, self.memory, strict=True):
            param.grad = memory[at : at + param.numel()].view(param.shape)

    def __call__(self) -> None:
        """Take one step."""
        self.optimizer.step()


def _empty(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cpu")


def measure(model: str, steps: int = 21, layers: int | None = None) -> HostTime:
    """Measure steps on a model's matrices, after three steps of warm-up.

    Args:
        model: A LLaMA in `sinkgd.lab.models.PRESETS`.
        steps: Number of timed steps.
        layers: Number of the model's layers to take; all by default.
    """
    shapes = matrix_shapes(model, layers)
    with fake_gpu() as gpu, torch.no_grad():
        step = Step(shapes)
        for _ in range(3):
            step.move_gradients()
            step()
        inside = _BackendTime(gpu.backend)
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
        with TorchCalls() as torch_calls:
            step()
    return HostTime(
        model,
        len(shapes),
        counted[0],
        1e3 * median(times),
        1e3 * median(within),
        calls,
        torch_calls.counts.total(),
        *counted[1:],
    )


class _BackendTime:
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
        """Restore the backend."""
        del vars(self.taken)["descend_"]


def _python_calls(step: Callable[[], None]) -> int:
    """Count the calls of Python functions in a step, except calls of the fake launch."""
    count = 0

    def note(frame: Any, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code is not FakeGpu.launch.__code__

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def write_milliseconds() -> None:
    """Write the milliseconds of each model as JSON."""
    sys.stdout.write(json.dumps({model: measure(model).milliseconds for model in LLAMAS}))


def main() -> None:
    """Print a line for each model."""
    sys.stdout.write(
        f"{'model':10}{'matrices':>9}{'launches':>9}{'ms':>8}{'backend':>8}{'µs/launch':>10}"
        f"{'calls':>7}{'torch':>6}{'copies':>7}\n"
    )
    for model in LLAMAS:
        found = measure(model)
        sys.stdout.write(
            f"{found.model:10}{found.matrices:9}{found.launches:9}{found.milliseconds:8.2f}"
            f"{found.backend_milliseconds:8.2f}{found.microseconds:10.2f}{found.calls:7}"
            f"{found.torch_calls:6}{found.copies:7}\n"
        )


if __name__ == "__main__":
    main()
