"""A fake GPU: its tensors are on the CPU and say that they are elsewhere.

The library runs as it does with a GPU. Whatever would make the host wait for the device, or is not
allowed while a CUDA graph is captured, is an error.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch._dynamo  # an optimizer imports it, and would find the fake GPU
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from sinkgd.kernels.triton import TritonBackend, launch

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
# What shows the host a tensor's entries.
READS = {
    f"torch.Tensor.{name}"
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
} | {"torch.equal", "torch.is_nonzero", "torch.allclose", "torch.nonzero", "torch.Tensor.nonzero"}


# What attributes say, by whether a tensor is the host's.
PLACES = {
    "torch.Tensor.device.__get__": lambda is_host: CPU if is_host else DEVICE,
    "torch.Tensor.is_cpu.__get__": lambda is_host: is_host,
    "torch.Tensor.is_cuda.__get__": lambda is_host: not is_host,
}


class HostReadsError(AssertionError):
    """The host reads the device's memory, or waits for a copy of it."""


class FakeGpu(TorchFunctionMode):
    """Tensors are on the GPU, except those that are made with ``device="cpu"`` or from such."""

    def __init__(self):
        super().__init__()
        self.capturing = False
        self.hides = True  # whether the host may not read the device's memory
        self.stream = 1
        self.pinned = 0  # tensors in pinned memory that were allocated
        self._pinned = []  # these tensors
        self.sent = []  # tensors that were filled from the host while a graph was captured
        self.launched = Counter()
        self._hosts = []  # tensors on the CPU, kept so that no other one has their ids

    def is_host(self, x):
        return any(x is host for host in self._hosts)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = resolve_name(func) or getattr(func, "__qualname__", "")
        if name in PLACES:
            return PLACES[name](self.is_host(args[0]))
        kwargs = dict(kwargs or {})
        pins = bool(kwargs.pop("pin_memory", False))
        self.pinned += pins
        tensors = [x for x in args if isinstance(x, Tensor)]
        from_host = all(map(self.is_host, tensors))
        places = [torch.device(x) for x in (kwargs.get("device"), *args) if is_place(x)]
        to_host = places == [CPU] or (not places and bool(tensors) and from_host)
        if self.hides and not from_host and (name in READS or to_host):
            raise HostReadsError(name)
        if "device" in kwargs:
            kwargs["device"] = CPU
        args = [CPU if isinstance(x, torch.device) else x for x in args]
        result = func(*args, **kwargs)
        if pins:
            self._pinned.append(result)
        if to_host and isinstance(result, Tensor):
            self.keep(result)
        elif name == "torch.Tensor.to" and from_host:
            result = self._sent(result, waits=not kwargs.get("non_blocking"))
        return result

    def _is_pinned(self, x):
        """Whether a tensor, as torch itself sees it, lies in pinned memory."""
        with torch._C.DisableTorchFunction():
            at = x.untyped_storage().data_ptr()
            return any(own.untyped_storage().data_ptr() == at for own in self._pinned)

    def keep(self, x):
        """Remember that a tensor is on the host, and return it."""
        self._hosts.append(x)
        return x

    def _sent(self, x, *, waits):
        """Return a copy of a tensor on the host."""
        if not self.capturing:
            return x.clone()
        assert not waits, "to wait for a copy would end the capture"
        assert self._is_pinned(x), "torch captures no copy from memory that is not pinned"
        self.sent.append(x.clone())
        return self.sent[-1]


def is_place(x):
    return isinstance(x, torch.device) or (isinstance(x, str) and x in ("cpu", "cuda"))


class Event:
    """What the host may wait for."""

    def __init__(self, device):
        self.device = device

    def record(self, stream):
        """Take note of the work so far."""

    def synchronize(self):
        """Wait for it."""


@contextmanager
def fake_gpu():
    """Provide a GPU whose kernels run in triton's interpreter."""
    gpu = FakeGpu()
    start = launch.launch

    def started(kernel, *arguments, **options):
        gpu.launched[kernel.__name__] += 1
        options = {k: v for k, v in options.items() if k in kernel.arg_names}
        with torch._C.DisableTorchFunction():
            start(kernel, *arguments, **options)

    properties = SimpleNamespace(multi_processor_count=132, L2_cache_size=50 << 20, warp_size=32)
    replaced = {
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: gpu.capturing,
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=gpu.stream),
        "get_device_properties": lambda device=None: properties,
        "device": lambda device: nullcontext(),
    }
    group = torch.optim.Optimizer._group_tensors_by_device_and_dtype

    def grouped(*arguments, **options):
        found = group(*arguments, **options)  # torch tells it where tensors are
        return {(DEVICE, dtype): tensors for (_, dtype), tensors in found.items()}

    with ExitStack() as stack:
        stack.enter_context(
            patch.object(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", grouped)
        )
        for name, value in replaced.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch, "Event", Event))
        read = torch.frombuffer  # modes do not see it
        stack.enter_context(
            patch.object(torch, "frombuffer", lambda *args, **how: gpu.keep(read(*args, **how)))
        )
        stack.enter_context(patch.object(torch.accelerator, "current_stream", lambda device: None))
        stack.enter_context(patch.object(launch, "launch", started))
        stack.enter_context(patch.object(TritonBackend, "supports", lambda *_: True))
        stack.enter_context(gpu)
        yield gpu
