"""The backend ``triton``: launches, buckets, tables, and what it leaves to `EagerBackend`.

Kernels run in triton's interpreter on CPU tensors; the last tests need a GPU and no interpreter.
"""

import pytest
import torch
from torch.testing import assert_close

from reference import sinkhorn_knopp, square_root_sinkhorn
from sinkgd.kernels import Matrices, Scales
from sinkgd.kernels.eager import EagerBackend
from sinkgd.kernels.layout import dense_layout
from sinkgd.kernels.triton import TritonBackend, support, tables
from sinkgd.kernels.triton import backend as triton_backend
from sinkgd.kernels.triton.half_iterations import plan_of_scales
from sinkgd.kernels.triton.tables import DeviceTables, Operand

FLOAT32 = {"rtol": 3e-6, "atol": 0}
PROCESSORS = 132  # of an H100


def normal(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def update_of(grad, scales):
    return grad.double() * scales.row.double() * scales.col.double()


def expected_update(grad, num_iters):
    return sinkhorn_knopp(grad.double() ** 2, num_iters).sqrt() * grad.double().sign()


def same_bits(one, other):
    return all(
        torch.equal(a, b)
        for pair in zip(one, other, strict=True)
        for a, b in zip(*pair, strict=True)
    )


@pytest.fixture
def backend(interpreter):
    pytest.importorskip("triton")
    return TritonBackend()


@pytest.fixture(params=[True, False], ids=["whole rows", "halves"])
def either(request, backend):
    """The backend in both of its ways."""
    backend.whole_rows = request.param
    return backend


@pytest.fixture
def halves(backend):
    backend.whole_rows = False
    return backend


class TestLaunches:
    @pytest.mark.parametrize("num_iters", [1, 5])
    @pytest.mark.parametrize("count", [1, 12])
    def test_their_number_is_that_of_half_iterations(self, halves, launches, count, num_iters):
        grads = [normal((3, 5), seed) for seed in range(count)]
        scales = halves.scales(grads, num_iters)
        assert launches == ["half_iteration"] * (2 * num_iters + 1)
        launches.clear()
        halves.update_([grad.clone() for grad in grads], grads, scales, keep=1.0, step=-0.1)
        assert launches == ["update"]

    def test_a_batch_is_in_one_launch(self, halves, launches):
        halves.scales([normal((2, 7, 3, 5))], 2)
        assert len(launches) == 5

    def test_a_bucket_holds_what_the_cache_keeps(self, halves, launches, monkeypatch):
        grads = [normal((16, 16), seed) for seed in range(6)]
        together = halves.scales(grads, 2)
        assert len(launches) == 5
        monkeypatch.setattr(triton_backend, "INTERPRETER_BYTES", 2 * 16 * 16 * 4)
        assert same_bits(halves.scales(grads, 2), together)
        assert len(launches) == 5 + 3 * 5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "shape", [(1_000_000, 3), (3, 1_000_000), (4096, 4096), (32_000, 2048)], ids=str
    )
    def test_every_processor_of_a_gpu_has_a_part(self, shape, dtype):
        shape = torch.Size(shape)
        layout = dense_layout(torch.empty(shape, device="meta"))
        operand = Operand(dtype, layout, aligned=True)
        (bucket,) = plan_of_scales((operand,), (shape,), bucket_bytes=1).buckets
        assert bucket.for_rows.rows > PROCESSORS
        assert bucket.for_cols.rows > PROCESSORS


class TestTables:
    @pytest.fixture
    def copies(self, monkeypatch):
        made, copy = [], DeviceTables._copy

        def counted(self, key, host, device):
            made.append(host)
            return copy(self, key, host, device)

        monkeypatch.setattr(DeviceTables, "_copy", counted)
        return made

    def test_a_steady_step_copies_none(self, backend, copies):
        grad, param = normal((5, 7)), normal((5, 7), 1)
        kept = [backend.scales([grad], 1)]  # so that the next scales lie elsewhere, or do not
        for _ in range(2):
            backend.update_([param], [grad], kept[0], keep=1.0, step=-0.1)
        made = len(copies)
        assert made <= 5
        kept += [backend.scales([grad], 1)]
        backend.update_([param], [grad], kept[0], keep=0.9, step=-0.2)
        assert len(copies) == made

    def test_gradients_elsewhere_copy_their_addresses_alone(self, backend, copies):
        grads = [normal((5, 7), seed) for seed in range(2)]
        backend.scales([grads[0]], 1)
        copies.clear()
        backend.scales([grads[1]], 1)
        # Lists of addresses are as long as those of two tensors, for 16 bytes.
        assert [table.tolist() for table in copies] == [[grads[1].data_ptr(), 0]]


class TestTablesOfGraphs:
    CPU = torch.device("cpu")

    @pytest.fixture
    def capture(self, monkeypatch):
        """Switch what `capturing` says."""
        return lambda on: monkeypatch.setattr(tables, "capturing", lambda device: on)

    def ask(self, kept, kind, host):
        if kind == "table":
            return kept.table(host, self.CPU)
        return kept.addresses(tuple(host.tolist()), self.CPU)

    @pytest.mark.parametrize("kind", ["table", "addresses"])
    def test_no_graph_reads_what_the_replay_of_another_fills(self, capture, monkeypatch, kind):
        copied = []
        copy = DeviceTables._copy
        monkeypatch.setattr(DeviceTables, "_copy", lambda *args: copied.append(args) or copy(*args))
        kept, host = DeviceTables(), torch.tensor([1, 2])
        kept._reserved = torch.empty(64, dtype=torch.uint8)
        for made in (1, 2):
            capture(True)
            self.ask(kept, kind, host)
            assert len(copied) == made
        capture(False)
        self.ask(kept, kind, host)
        assert len(copied) == 3

    @pytest.mark.parametrize("kind", ["table", "addresses"])
    def test_a_graph_reads_a_copy_from_before_it_and_keeps_it(self, capture, monkeypatch, kind):
        monkeypatch.setattr(tables, "MAX_COPIES", 1)
        kept, host = DeviceTables(), torch.tensor([1, 2])
        capture(False)
        before = self.ask(kept, kind, host)
        capture(True)
        assert self.ask(kept, kind, host) is before
        capture(False)
        self.ask(kept, kind, torch.tensor([3, 4]))
        assert any(copy.on_device is before for copy in kept._captured)

    def test_a_graph_reads_memory_that_no_other_copy_takes(self, capture):
        kept, memory = DeviceTables(), torch.empty(64, dtype=torch.uint8)
        kept._reserved = memory
        capture(True)
        for values in ((1, 2, 3), (4, 5)):
            kept.addresses(values, self.CPU)
        assert memory.view(torch.int64)[[0, 1, 2, 4, 5]].tolist() == [1, 2, 3, 4, 5]
        with pytest.raises(RuntimeError, match=r"needs 24 bytes of pinned memory, and 16 are left"):
            kept.addresses((6, 7, 8), self.CPU)

    def test_a_capture_needs_a_step_before_it(self, capture):
        capture(True)
        with pytest.raises(RuntimeError, match="at least one step before the capture"):
            DeviceTables().addresses((1, 2), self.CPU)


class TestNumbers:
    def test_scales_of_a_matrix_with_one_live_row_do_not_drift_apart(self, either):
        grad = torch.zeros(3000, 16)
        grad[1234] = normal((16,))
        row, col = either.scales([grad], 40)[0]
        assert row.isfinite().all()
        assert col.isfinite().all()
        expected = torch.zeros(3000, 16, dtype=torch.float64)
        expected[1234] = 3000**0.5 * grad[1234].double().sign()
        assert_close(update_of(grad, Scales(row, col)), expected, rtol=1e-5, atol=0)

    def test_live_rows_and_columns_of_every_share(self, either):
        grad = normal((60, 40))
        grad[::3] = 0
        grad[:, ::2] = 0
        scales = either.scales([grad], 4)[0]
        assert_close(update_of(grad, scales), square_root_sinkhorn(grad, 4), rtol=1e-5, atol=0)

    def test_rows_and_columns_may_differ_by_sixty_powers_of_ten(self, either):
        grad = normal((40, 30)).double()
        rows = torch.logspace(-18, 18, 40, dtype=torch.float64)[:, None]
        cols = torch.logspace(12, -12, 30, dtype=torch.float64)
        grad = (rows * grad * cols).float()
        scales = either.scales([grad], 5)[0]
        assert_close(update_of(grad, scales), expected_update(grad, 5), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("value", [3.4e38, 1e-37], ids=str)
    def test_the_ends_of_float32(self, either, value):
        grad = value * normal((20, 30)).sign()
        scales = either.scales([grad], 3)[0]
        assert_close(update_of(grad, scales), grad.double().sign(), **FLOAT32)

    @pytest.mark.parametrize("shape", [(1, 9001), (9001, 1), (3, 9001), (9001, 3), (30, 1500)])
    def test_long_and_narrow_matrices(self, either, shape):
        grad = normal(shape)
        scales = either.scales([grad], 3)[0]
        assert_close(update_of(grad, scales), square_root_sinkhorn(grad, 3), **FLOAT32)

    def test_entries_more_than_an_int32_apart(self, backend):
        far = 1 << 31
        storage = torch.empty(far + 64, dtype=torch.bfloat16)  # of which a few pages are touched
        grad = storage.as_strided((2, 64), (far, 1)).copy_(normal((2, 64)))
        scales = backend.scales([grad], 2)[0]
        assert_close(update_of(grad, scales), expected_update(grad.clone(), 2), **FLOAT32)
        kept = grad.clone()
        backend.update_([grad], [kept], [scales], keep=0.5, step=0.0)
        assert torch.equal(grad, 0.5 * kept)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_aligned_and_unaligned_matrices_agree(self, backend, dtype):
        whole = normal((24 * 40 + 1,), dtype=dtype)
        aligned, shifted = whole[:-1].view(24, 40).clone(), whole[1:].view(24, 40)
        shifted.copy_(aligned)
        assert shifted.data_ptr() % 16 != 0
        assert aligned.data_ptr() % 16 == 0
        one, other = (backend.scales([grad], 3)[0] for grad in (aligned, shifted))
        assert_close(update_of(aligned, one), update_of(aligned, other), **FLOAT32)

    def test_a_learning_rate_of_any_type_may_be_a_tensor(self, backend):
        grad, scales = normal((5, 7)), Scales(torch.ones(5, 1), torch.ones(1, 7))
        plain = torch.ones(5, 7)
        backend.update_([plain], [grad], [scales], keep=1.0, step=-0.25)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            param = torch.ones(5, 7)
            step = torch.tensor(-0.25, dtype=dtype)
            backend.update_([param], [grad], [scales], keep=1.0, step=step)
            assert torch.equal(param, plain)


class TestOthers:
    """What the kernels do not take, `EagerBackend` does."""

    def check(self, backend, launches, grad):
        found = backend.scales([grad], 3)
        assert same_bits(found, EagerBackend().scales([grad], 3))
        assert launches == []

    def test_float64(self, backend, launches):
        self.check(backend, launches, normal((5, 7), dtype=torch.float64))

    def test_subclasses(self, backend, launches):
        class Wrapped(torch.Tensor):
            pass

        self.check(backend, launches, normal((5, 7)).as_subclass(Wrapped))

    def test_gradients_that_autograd_follows(self, backend, launches):
        row, _ = backend.scales([normal((5, 7)).requires_grad_()], 1)[0]
        assert row.requires_grad
        assert launches == []

    def test_parameters_that_overlap_themselves(self, backend, launches):
        grad, scales = normal((5, 7)), [Scales(torch.ones(5, 1), torch.ones(1, 7))]
        param = torch.ones(1, 7).expand(5, 7)
        with pytest.raises(RuntimeError, match="more than one element"):
            backend.update_([param], [grad], scales, keep=1.0, step=-0.1)
        assert launches == []


class TestWhereItRuns:
    def test_the_interpreter_runs_on_cpus_alone(self, backend):
        assert backend.supports(torch.device("cpu"))
        assert not backend.supports(torch.device("cuda"))

    def test_without_it_cpus_are_refused(self, monkeypatch):
        monkeypatch.setattr(support, "interpreting", lambda: False)
        assert not TritonBackend().supports(torch.device("cpu"))

    @pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((9, 0), True)])
    def test_gpus_it_was_compiled_for_are_taken(self, monkeypatch, capability, runs):
        monkeypatch.setattr(support, "interpreting", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert TritonBackend().supports(torch.device("cuda")) is runs


@pytest.fixture
def gpu():
    """A backend that compiles; run these tests by ``pytest -m gpu``, without the interpreter."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device")
    if support.interpreting():
        pytest.skip("triton's interpreter is on in this process; run pytest -m gpu by itself")
    return TritonBackend()


def on_gpu(shapes, dtype, seed=0):
    return [normal(shape, seed + i, dtype).cuda() for i, shape in enumerate(shapes)]


SHAPES = [(1, 19), (19, 1), (263, 257), (257, 263), (3, 96, 128), (4096, 3), (3, 4096), (512, 1376)]


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_a_step_is_that_of_the_definition(self, gpu, dtype):
        grads = on_gpu(SHAPES, dtype)
        grads += [grad.mT.contiguous().mT for grad in grads]
        params, expected = (on_gpu(SHAPES * 2, dtype, 100) for _ in range(2))
        found, defined = gpu.scales(grads, 5), EagerBackend().scales(grads, 5)
        for grad, ours, theirs in zip(grads, found, defined, strict=True):
            assert_close(update_of(grad, ours), update_of(grad, theirs), rtol=2e-5, atol=0)
        gpu.update_(params, grads, found, keep=0.9, step=-0.1)
        EagerBackend().update_(expected, grads, defined, keep=0.9, step=-0.1)
        for ours, theirs in zip(params, expected, strict=True):
            assert_close(ours, theirs, rtol=max(2e-5, torch.finfo(dtype).eps), atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("whole_rows", [True, False])
    def test_a_descent_is_that_of_the_definition_and_has_the_same_bits_again(
        self, gpu, dtype, whole_rows
    ):
        gpu.whole_rows = whole_rows
        grads = on_gpu([*SHAPES, (2048, 5461), (64, 64)], dtype)
        grads += [grad.mT.contiguous().mT for grad in grads]
        owners = [range(i, i + 1) for i in range(len(grads))]
        runs = []
        for backend in (gpu, gpu, EagerBackend()):
            params = [torch.zeros_like(grad, dtype=torch.float32) for grad in grads]
            found = backend.descend_(Matrices(params, grads, owners), 5, keep=1.0, step=1.0)
            assert found.finite.all()
            runs.append(params)
        for one, again, defined in zip(*runs, strict=True):
            assert torch.equal(one, again)
            assert_close(one, defined, rtol=2e-5, atol=0)

    def test_the_same_bits_again(self, gpu):
        grads = on_gpu(SHAPES, torch.float32)
        first = gpu.scales(grads, 5, tol=1e-3)
        assert same_bits(gpu.scales(grads, 5, tol=1e-3), first)
        alone = [gpu.scales([grad], 5, tol=1e-3)[0] for grad in grads]
        assert same_bits(alone, first)

    def test_a_captured_step_replays_with_new_gradients_and_a_new_learning_rate(self, gpu):
        grads = on_gpu(SHAPES, torch.float32)
        params, expected = (on_gpu(SHAPES, torch.float32, 100) for _ in range(2))
        step = torch.tensor(0.0, device="cuda")

        def take(backend, targets):
            scales = backend.scales(grads, 5)
            backend.update_(targets, grads, scales, keep=1.0, step=step)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            take(gpu, params)  # compiles; a step of 0 moves nothing
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            take(gpu, params)
        for i in range(3):
            for grad, other in zip(grads, on_gpu(SHAPES, torch.float32, 7 * i), strict=True):
                grad.copy_(other)
            step.fill_(-0.1 / (i + 1))
            graph.replay()
            take(EagerBackend(), expected)
            for ours, theirs in zip(params, expected, strict=True):
                assert_close(ours, theirs, rtol=2e-5, atol=1e-4)
