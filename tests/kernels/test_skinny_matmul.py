"""Deflation by triton's kernels: numbers, readings, calls of torch, copies, bits.

Kernels run in triton's interpreter on CPU tensors, program after program.
"""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sinkgd
from layouts import gapped, turned
from sinkgd.kernels import Scales, Shared, backends
from sinkgd.kernels.eager import EagerBackend
from sinkgd.kernels.layout import dense_layout
from sinkgd.kernels.triton import TritonBackend, launch
from sinkgd.kernels.triton import backend as triton_backend
from sinkgd.lab.bench.gpu.interpreted import readings

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLOSE = 3e-6  # of the definition; 25 roundings of float32


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


ONE_FAST = (slow(torch.float32), torch.bfloat16, slow(torch.float16))


def normal(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def odd(x):
    """In rows an odd number of entries apart."""
    *batch, m, n = x.shape
    return torch.full((*batch, m, n + 1 + n % 2), torch.nan).to(x.dtype)[..., :n].copy_(x)


LAYOUTS = [torch.clone, turned, odd, gapped, lambda x: odd(x.mT).mT]


@pytest.fixture
def backend(interpreter):
    pytest.importorskip("triton")
    return next(one for one in backends() if isinstance(one, TritonBackend))


def leading(shape, seed, dtype=torch.float32):
    """A gradient with three directions that stand out."""
    *batch, m, n = shape
    peaks = normal((*batch, m, 3), seed + 100) @ normal((*batch, 3, n), seed + 200)
    return (normal(shape, seed) + 2 * peaks).to(dtype)


def step(grads, *args, **options):
    """Return minus what a deflated step of rate 1 writes to zeros."""
    params, optimizer = prepared(grads, *args, **options)
    optimizer.step()
    return [-param.detach() for param in params]


def prepared(grads, backend="triton", dtype=torch.float32, rank=15, nonfinite="raise", **options):
    """Return parameters of zeros that have these gradients, and the optimizer of `step`."""
    params = []
    for grad in grads:
        zeros = torch.zeros(grad.shape, dtype=dtype)
        params.append(nn.Parameter(turned(zeros) if dense_layout(grad).transposed else zeros))
        params[-1].grad_dtype = None
        params[-1].grad = grad
    group = {"params": params, "algorithm": "sinkgd", "backend": backend, **options}
    return params, sinkgd.SinkGD([group], lr=1.0, deflated_rank=rank, nonfinite=nonfinite)


def error(found, expected):
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def definition(grads, rank=15, **options):
    wide = [grad.double() for grad in grads]
    return step(wide, "eager", dtype=torch.float64, rank=rank, **options)


class TestNumbers:
    @pytest.mark.parametrize("dtype", ONE_FAST, ids=str)
    def test_a_step_is_that_of_float64_whatever_the_shape_and_the_layout(self, backend, dtype):
        shapes = [(67, 131), (131, 67), (2, 40, 48), (129, 65), (70, 20)]
        grads = [
            layout(leading(shape, i, dtype))
            for i, (shape, layout) in enumerate(zip(shapes, LAYOUTS, strict=True))
        ]
        for found, expected in zip(step(grads), definition(grads), strict=True):
            assert error(found, expected) <= CLOSE

    def test_narrow_matrices_have_fewer_directions(self, backend):
        grads = [leading(shape, i) for i, shape in enumerate([(5, 40), (40, 2), (1, 9), (9, 1)])]
        for found, expected in zip(step(grads), definition(grads), strict=True):
            assert error(found, expected) <= CLOSE

    @pytest.mark.parametrize("rank", [1, slow(20), 31, slow(32)])
    def test_any_number_of_directions(self, backend, rank):
        grads = [leading((70, 50), 1, torch.bfloat16)]
        found, expected = step(grads, rank=rank), definition(grads, rank=rank)
        assert error(found[0], expected[0]) <= CLOSE

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    @pytest.mark.parametrize("size", [1e-30, 1e30, None])
    def test_gradients_of_any_size_and_of_rows_and_columns_that_differ(self, backend, dtype, size):
        grad = leading((60, 40), 1).double()
        if size is None:
            grad *= torch.logspace(-18, 18, 60).double()[:, None]
            grad *= torch.logspace(15, -15, 40).double()
        else:
            grad *= size
        (found,), (expected,) = step([grad.to(dtype)]), definition([grad.to(dtype)])
        # Row sums of terms that differ as much are less exact, in the plain step as well.
        assert error(found, expected) <= (1e-5 if size is None else CLOSE)

    @pytest.mark.parametrize("options", [{"last": "row"}, {"operator_norm": "muon"}], ids=str)
    def test_rows_come_last_and_operator_norms(self, backend, options):
        grads = [leading((50, 70), 1)]
        expected = definition(grads, **options)
        assert error(step(grads, **options)[0], expected[0]) <= 1e-5

    def test_weights_of_bfloat16_are_those_of_the_former_way_but_for_roundings(
        self, backend, monkeypatch
    ):
        grads = [leading((70, 130), 1, torch.bfloat16)]
        (found,) = step(grads, dtype=torch.bfloat16)
        monkeypatch.setattr(backend, "products_by_dot", False)
        (former,) = step(grads, dtype=torch.bfloat16)
        assert (found != former).float().mean() < 1e-3
        assert error(found, former) < 1e-4


class TestBits:
    @pytest.mark.slow
    def test_they_do_not_depend_on_other_matrices_or_on_the_buckets(self, backend, monkeypatch):
        shapes = [(20, 131), (2, 12, 16), (24, 10), (131, 20)]
        grads = [leading(shape, i, torch.bfloat16) for i, shape in enumerate(shapes)]
        grads[3] = turned(grads[3])
        together = step(grads)
        for found, again in zip(together, step(grads[::-1])[::-1], strict=True):
            assert torch.equal(found, again)
        assert torch.equal(step(grads[:1])[0], together[0])
        monkeypatch.setattr(triton_backend, "INTERPRETER_BYTES", 1)
        for found, again in zip(together, step(grads), strict=True):
            assert torch.equal(found, again)

    def test_what_is_not_finite_keeps_its_parameter_alone(self, backend):
        grads = [leading((40, 30), i) for i in range(3)]
        expected = step(grads)
        grads[1][3, 5] = torch.nan
        found = step(grads, nonfinite="skip")
        assert torch.equal(found[1], torch.zeros(40, 30))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[2], expected[2])


class Made(TorchDispatchMode):
    """Counts calls of torch, apart from the interpreter's, and how often what they return is large.

    Args:
        monkeypatch: For `launch`, in which the interpreter has calls of its own.
        entries: What counts as large.
    """

    def __init__(self, monkeypatch, entries=0):
        super().__init__()
        self.calls, self.entries, self.large, self.is_launching = Counter(), entries, [], False
        start = launch.launch

        def started(*args, **options):
            self.is_launching = True
            start(*args, **options)
            self.is_launching = False

        monkeypatch.setattr(launch, "launch", started)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if not self.is_launching:
            self.calls[str(func)] += 1
            if isinstance(found, torch.Tensor) and not found.is_meta:
                is_new = not found._is_view() and not any(found is x for x in args)
                self.large += [str(func)] * (is_new and found.numel() >= self.entries)
        return found


class TestWork:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float32)], ids=str)
    def test_a_step_of_five_iterations_reads_a_gradient_ten_times(self, backend, dtype):
        grad = leading((140, 136), 1, dtype)
        _, optimizer = prepared([grad], dtype=dtype)
        with readings([grad]) as found:
            optimizer.step()
        assert found.by_kernels == 10 * grad.numel()

    @pytest.mark.slow
    def test_no_gradient_is_copied(self, backend, monkeypatch):
        """All that is made has fewer entries than a gradient."""
        grad = leading((300, 420), 1, torch.bfloat16)
        param = nn.Parameter(torch.zeros(grad.shape, dtype=torch.bfloat16))
        param.grad = grad
        group = {"params": [param], "algorithm": "sinkgd", "backend": "triton"}
        optimizer = sinkgd.SinkGD([group], lr=1.0, deflated_rank=3)
        with Made(monkeypatch, grad.numel() // 3) as made:
            optimizer.step()
        assert made.large == []

    def test_calls_of_torch_do_not_grow_with_matrices_of_any_shapes(self, backend, monkeypatch):
        few, many = (self.calls(backend, monkeypatch, count) for count in (4, 12))
        assert (many - few).total() <= 0.2 * 8, many - few
        assert many.total() <= 180, many

    @staticmethod
    def calls(backend, monkeypatch, count):
        grads = [leading((17 + i, 60 - i), i) for i in range(count)]
        params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        group = {"params": params, "algorithm": "sinkgd", "backend": "triton"}
        optimizer = sinkgd.SinkGD([group], lr=1.0, deflated_rank=3)
        scales = EagerBackend().scales(grads, 5)  # another test counts their calls
        with monkeypatch.context() as patch:
            patch.setattr(backend, "scales", lambda *args, **options: scales)
            optimizer.step()
            with Made(patch) as made:
                optimizer.step()
        return made.calls

    def test_what_kernels_do_not_read_has_no_packed_products(self, backend):
        grads = [normal((5, 7))]
        scales = [Scales(torch.ones(5, 1), torch.ones(1, 7))]
        shared = Shared(torch.ones(7, 2, dtype=torch.float64), (0,))
        assert backend.packed_products(grads, scales, shared) is not None
        wide = [grad.double() for grad in grads]
        assert backend.packed_products(wide, scales, shared) is None
        many = shared._replace(vectors=torch.ones(7, 33, dtype=torch.float64))
        assert backend.packed_products(grads, scales, many) is None
        for other in backends():
            if other is not backend:
                assert other.packed_products(grads, scales, shared) is None
