"""Steps that a CUDA graph captures: nothing waits, nothing is looked at, graphs own their tables.

The GPU is made up, and so is the capture; kernels run in triton's interpreter.
"""

import pytest
import torch
from torch import nn

import sinkgd
from fake_gpu import DEVICE, HostReadsError, fake_gpu
from sinkgd import kernels
from sinkgd.kernels.triton import TritonBackend, tables

# Said by torch of itself, on importing its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")

KINDS = {
    "plain": {"deflated_rank": 0},
    "deflated": {"deflated_rank": 2},
    "stochastic": {"deflated_rank": 0, "rounding": "stochastic"},
}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@pytest.fixture
def gpu(interpreter, monkeypatch):
    backend = TritonBackend()
    with fake_gpu() as found:
        monkeypatch.setattr(kernels, "select", lambda name, device: backend)
        found.backend = backend
        yield found


def normal(shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def hybrid(gpu, options):
    """A hybrid optimizer whose rates lie on the GPU, and its parameters."""
    dtype = torch.bfloat16 if "rounding" in options else torch.float32
    matrices = [nn.Parameter(normal(shape, 1, dtype)) for shape in [(12, 16), (16, 12), (12, 16)]]
    vectors = [nn.Parameter(normal((16,), 2))]
    lr = torch.full((), 0.1, device=DEVICE)
    groups = [
        {"params": matrices, "algorithm": "sinkgd", "lr": lr, **options},
        {"params": vectors, "algorithm": "adamw", "lr": lr.clone(), "weight_decay": 0.1},
    ]
    gpu.hides = False  # rates are checked
    optimizer = sinkgd.SinkGD(groups, nonfinite="skip")
    gpu.hides = True
    return optimizer, [*matrices, *vectors]


def give_gradients(params, seed):
    for i, param in enumerate(params):
        param.grad = normal(param.shape, 10 * seed + i, param.dtype)


def test_a_look_at_the_gpu_is_an_error(gpu):
    x = torch.ones(3, device=DEVICE)
    for look in (lambda: bool(x.all()), x.tolist, lambda: float(x.sum()), x.cpu, x[0].item):
        with pytest.raises(HostReadsError):
            look()
    assert torch.ones(3, device="cpu").tolist() == [1, 1, 1]


@kinds
def test_a_captured_step_neither_looks_nor_waits_nor_allocates_on_the_host(gpu, options):
    optimizer, params = hybrid(gpu, options)
    give_gradients(params, 1)
    optimizer.step()  # as is asked for before a capture: it compiles, and makes states and tables
    gpu.launched.clear()
    optimizer.step()
    steady = dict(gpu.launched)
    gpu.launched.clear()
    gpu.pinned, gpu.capturing, gpu.stream = 0, True, 2
    optimizer.step()
    assert gpu.pinned == 0
    assert dict(gpu.launched) == steady
    if options == KINDS["plain"]:  # others make tensors, which may lie anywhere
        assert gpu.sent == []


@kinds
def test_it_writes_what_another_step_would(gpu, options):
    results = []
    for captured in (False, True):
        optimizer, params = hybrid(gpu, options)
        for seed in (1, 2):
            give_gradients(params, seed)
            gpu.capturing = captured and seed == 2
            optimizer.step()
        gpu.capturing = False
        results.append([param.detach().clone() for param in params])
    for one, other in zip(*results, strict=True):
        with torch._C.DisableTorchFunction():
            assert torch.equal(one, other)


@kinds
def test_gradients_that_a_capture_allocates_need_no_new_pinned_memory(gpu, options):
    optimizer, params = hybrid(gpu, options)
    give_gradients(params, 1)
    optimizer.step()
    kept = [param.grad for param in params]
    gpu.pinned, gpu.capturing, gpu.stream = 0, True, 2
    give_gradients(params, 2)
    optimizer.step()
    assert gpu.pinned == 0
    assert gpu.sent
    assert kept


def test_two_captures_own_their_tables(gpu):
    optimizer, params = hybrid(gpu, KINDS["plain"])
    give_gradients(params, 1)
    optimizer.step()
    filled = []
    kept = []
    for _ in range(2):
        give_gradients(params, 2)
        kept.append([param.grad for param in params])
        gpu.capturing, gpu.sent = True, []
        optimizer.step()
        gpu.capturing = False
        filled.append({x.data_ptr() for x in gpu.sent})
    assert filled[0]
    assert filled[1]
    assert not filled[0] & filled[1]


def test_many_captures_find_pinned_memory_if_steps_lie_between_them(gpu, monkeypatch):
    monkeypatch.setattr(tables, "RESERVED", 4096)
    optimizer, params = hybrid(gpu, KINDS["plain"])
    for seed in range(40):
        kept = [param.grad for param in params]
        give_gradients(params, seed)
        gpu.capturing = seed % 2 == 1
        optimizer.step()
        gpu.capturing = False
        assert seed == 0 or kept
    own = gpu.backend._tables
    assert len({copy.host.untyped_storage().data_ptr() for copy in own._captured}) > 1


def test_flags_of_a_captured_step_are_left_where_they_are(gpu):
    optimizer, params = hybrid(gpu, KINDS["plain"])
    give_gradients(params, 1)
    optimizer.step()
    before = params[0].detach().clone()
    params[0].grad[3, 4] = torch.nan
    gpu.capturing = True
    optimizer.step()
    gpu.capturing = False
    with torch._C.DisableTorchFunction():
        assert torch.equal(params[0], before)
        assert all(param.isfinite().all() for param in params)
