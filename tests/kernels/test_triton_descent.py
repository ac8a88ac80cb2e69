"""The descent that reads a gradient once an iteration: numbers, readings, launches, bits.

Kernels run in triton's interpreter on CPU tensors, program after program.
"""

import pytest
import torch
from torch.testing import assert_close

from layouts import gapped, turned
from reference import sinkhorn_knopp, square_root_sinkhorn
from sinkgd.kernels import Matrices
from sinkgd.kernels.eager import EagerBackend
from sinkgd.kernels.layout import dense_layout
from sinkgd.kernels.rounding import keys_of_step, round_to_bfloat16
from sinkgd.kernels.triton import TritonBackend, launch, schedule
from sinkgd.kernels.triton import backend as triton_backend
from sinkgd.kernels.triton.schedule import panel_of, row_programs, schedule_of
from sinkgd.kernels.triton.tables import Operand
from sinkgd.lab.bench.gpu.interpreted import readings

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

# 25 roundings of 1.2e-7: five iterations of two sums, a root and the products of r, c and G
FLOAT32 = {"rtol": 3e-6, "atol": 0}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROCESSORS, CACHE = 132, 50 << 20  # of an H100


def normal(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sliced(x):
    """In the middle of a larger matrix."""
    *batch, m, n = x.shape
    return torch.full((*batch, m + 3, n + 8), torch.nan).to(x.dtype)[..., 1:-2, 8:].copy_(x)


def odd(x):
    """In rows an odd number of entries apart."""
    *batch, m, n = x.shape
    return torch.full((*batch, m, n + 1 + n % 2), torch.nan).to(x.dtype)[..., :n].copy_(x)


LAYOUTS = [torch.clone, turned, sliced, odd, gapped, lambda x: odd(x.mT).mT]
LAYOUT_IDS = ["plain", "turned", "sliced", "odd", "gapped", "turned odd"]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
orders = pytest.mark.parametrize("order", [torch.clone, turned], ids=["plain", "turned"])


@pytest.fixture
def backend(interpreter):
    pytest.importorskip("triton")
    return TritonBackend()


@pytest.fixture
def small_panels(monkeypatch):
    """Panels of a few rows, a program each: many programs, and sums in several levels."""
    monkeypatch.setattr(schedule, "AREA", 512)
    monkeypatch.setattr(schedule, "FEWEST_ROWS", 1)
    monkeypatch.setattr(schedule, "PROGRAMS", 1 << 20)
    schedule_of.cache_clear()
    yield
    schedule_of.cache_clear()


def alone(grads):
    return [range(i, i + 1) for i in range(len(grads))]


def beside(grad, dtype=torch.float32):
    """Zeros for a parameter that lies as a gradient does."""
    zeros = torch.zeros(grad.shape, dtype=dtype)
    return turned(zeros) if dense_layout(grad).transposed else zeros


def descend(backend, grads, num_iters, **options):
    """Return minus the updates that a descent writes, and what it says."""
    params = [beside(grad) for grad in grads]
    matrices = Matrices(params, grads, alone(grads), options.pop("starts", None))
    found = backend.descend_(matrices, num_iters, keep=1.0, step=1.0, **options)
    return params, found


def expected_update(grad, num_iters):
    return sinkhorn_knopp(grad.double() ** 2, num_iters).sqrt() * grad.double().sign()


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class TestNumbers:
    @layouts
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_type_and_layout(self, backend, launches, layout, dtype):
        num_iters = 3
        grads = [layout(normal((37, 53), 1, dtype)), layout(normal((2, 8, 16), 2, dtype))]
        params, found = descend(backend, grads, num_iters)
        for param, grad, scales in zip(params, grads, found.scales, strict=True):
            expected = torch.stack(
                [expected_update(one, num_iters) for one in grad.reshape(-1, *grad.shape[-2:])]
            ).view_as(grad)
            assert_close(param.double(), expected, **FLOAT32)
            assert_close(grad.double() * scales.row * scales.col, expected, **FLOAT32)
        assert found.finite.all()
        assert "half_iteration" not in launches

    @orders
    @pytest.mark.parametrize(
        "shape",
        [(1, 1), (1, 8191), (8191, 1), (3, 4099), (4099, 3), (127, 131), (7, 5461), (5461, 7)],
        ids=str,
    )
    def test_shapes(self, backend, shape, order):
        grad = order(normal(shape))
        (param,), _ = descend(backend, [grad], 2)
        assert_close(param.double(), square_root_sinkhorn(grad, 2), **FLOAT32)

    @orders
    def test_many_programs_add_up_in_levels(self, backend, small_panels, monkeypatch, order):
        monkeypatch.setattr(schedule, "AREA", 16)
        assert programs_of((66, 24)) > 64
        grad = order(normal((66, 24)) ** 3)
        (param,), _ = descend(backend, [grad], 3)
        assert_close(param.double(), expected_update(grad, 3), **FLOAT32)

    def test_small_matrices_by_the_hundred(self, backend, launches):
        grads = [normal((64, 64), seed, torch.bfloat16) for seed in range(100)]
        params, _ = descend(backend, grads, 1)
        assert launches == ["full_iteration", "finish"]
        for param, grad in zip(params, grads, strict=True):
            assert_close(param.double(), expected_update(grad, 1), **FLOAT32)

    @orders
    def test_a_matrix_larger_than_a_bucket(self, backend, launches, monkeypatch, order):
        monkeypatch.setattr(triton_backend, "INTERPRETER_BYTES", 1000)
        grads = [order(normal((60, 40), seed)) for seed in range(2)]
        params, _ = descend(backend, grads, 3)
        assert launches == (["full_iteration"] * 3 + ["finish"]) * 2
        for param, grad in zip(params, grads, strict=True):
            assert_close(param.double(), expected_update(grad, 3), **FLOAT32)

    def test_rows_too_long_for_registers_take_half_iterations(self, backend, launches):
        grads = [normal((3, schedule.LONGEST + 1)), normal((5, 7))]
        params, found = descend(backend, grads, 2)
        for param, grad in zip(params, grads, strict=True):
            assert_close(param.double(), square_root_sinkhorn(grad, 2), **FLOAT32)
        assert found.finite.tolist() == [True, True]
        assert launches.count("half_iteration") == 5
        assert launches.count("full_iteration") == 2

    @orders
    @pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
    def test_any_size(self, backend, small_panels, order, size):
        grad = order(size * normal((67, 31)))
        (param,), _ = descend(backend, [grad], 5)
        assert_close(param.double(), expected_update(grad, 5), **FLOAT32)

    @orders
    def test_rows_and_columns_far_apart(self, backend, small_panels, order):
        rows = torch.logspace(-12.5, 12.5, 67, dtype=torch.float64)[:, None]
        cols = torch.logspace(12.5, -12.5, 31, dtype=torch.float64)
        for factors in (rows, cols, rows * cols):
            grad = order((normal((67, 31)).double() * factors).float())
            (param,), _ = descend(backend, [grad], 5)
            assert_close(param.double(), expected_update(grad, 5), rtol=1e-5, atol=0)

    @orders
    @pytest.mark.parametrize("num_iters", [1, 5])
    def test_zero_rows_and_columns(self, backend, small_panels, order, num_iters):
        grad = normal((60, 40))
        grad[::3] = 0
        grad[:, ::4] = 0
        (param,), found = descend(backend, [order(grad)], num_iters)
        assert_close(param.double(), square_root_sinkhorn(grad, num_iters), rtol=2e-5, atol=0)
        row, col = found.scales[0]
        assert torch.equal(row.eq(0).flatten(), grad.eq(0).all(1))
        assert torch.equal(col.eq(0).flatten(), grad.eq(0).all(0))

    @orders
    def test_all_zero(self, backend, order):
        (param,), found = descend(backend, [order(torch.zeros(9, 5))], 3)
        assert param.eq(0).all()
        assert found.finite.all()

    @orders
    def test_starts_are_where_it_begins(self, backend, small_panels, order):
        grad, start = order(normal((19, 53))), normal((1, 53), 1).abs().clamp(1e-3, 1)
        for num_iters in (1, 3):
            params, _ = descend(backend, [grad, grad], num_iters, starts=[start, None])
            expected = expected_update(grad.double() * start, num_iters)
            assert_close(params[0].double(), expected, rtol=1e-5, atol=0)
            assert same_bits(params[1:], descend(backend, [grad], num_iters)[0])


class TestNotFinite:
    @orders
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
    def test_the_parameter_stays_and_is_named(self, backend, small_panels, order, value):
        grads = [order(normal((30, 20), seed)) for seed in range(3)]
        grads[1][17, 5] = value
        params, found = descend(backend, grads, 3)
        assert found.finite.tolist() == [True, False, True]
        assert params[1].eq(0).all()
        assert not found.scales[1].col.isfinite().any()
        for i in (0, 2):
            assert_close(params[i].double(), expected_update(grads[i], 3), **FLOAT32)

    @orders
    @pytest.mark.parametrize("room", [1 << 20, 3000], ids=["together", "in several buckets"])
    def test_matrices_of_one_owner_are_written_together(self, backend, monkeypatch, order, room):
        monkeypatch.setattr(triton_backend, "INTERPRETER_BYTES", room)
        grads = [order(normal((3, 12, 20), 1)), order(normal((12, 20), 2)), order(normal((7, 5)))]
        params = [beside(grad) for grad in grads]
        matrices = Matrices(params, grads, [range(2), range(2, 3)])
        expected = descend(backend, grads, 3)[0]
        backend.descend_(matrices, 3, keep=1.0, step=1.0)
        assert same_bits(params, expected)
        grads[0][2, 5, 6] = torch.nan
        before = [param.clone() for param in params[:2]]
        found = backend.descend_(matrices, 3, keep=1.0, step=1.0)
        assert found.finite.tolist() == [False, True]
        assert same_bits(params[:2], before)


class TestBits:
    @orders
    def test_they_are_those_beside_other_matrices_and_of_another_run(self, backend, order):
        grads = [order(normal(shape, 3)) for shape in [(37, 53), (80, 33), (64, 64), (5, 7)]]
        together, _ = descend(backend, grads, 4, tol=1e-3)
        again, _ = descend(backend, grads, 4, tol=1e-3)
        single = [descend(backend, [grad], 4, tol=1e-3)[0][0] for grad in grads]
        assert same_bits(together, again)
        assert same_bits(together, single)

    @orders
    def test_the_order_of_arrival_changes_none(self, backend, small_panels, monkeypatch, order):
        grad = order(normal((80, 40)))
        expected, _ = descend(backend, [grad], 2)
        start = launch.launch

        def reversed_programs(kernel, programs, *arguments, **constants):
            place = kernel.arg_names.index("flip")
            arguments = [*arguments]
            arguments[place] = 1 - arguments[place]
            start(kernel, programs, *arguments, **constants)

        monkeypatch.setattr(launch, "launch", reversed_programs)
        assert same_bits(descend(backend, [grad], 2)[0], expected)

    @orders
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_stochastic_rounding_draws_those_of_the_definition(self, backend, order, dtype):
        grad = order(normal((3, 20, 30), dtype=dtype))
        param = order(normal((3, 20, 30), 1, torch.bfloat16))
        wide = param.float()
        keys = keys_of_step(3, torch.tensor(5), 1).unbind()
        factors = {"keep": 0.875, "step": -0.01}
        backend.descend_(Matrices([wide], [grad], [range(1)]), 2, **factors)
        backend.descend_(Matrices([param], [grad], [range(1)], keys=keys), 2, **factors)
        assert torch.equal(param, round_to_bfloat16(wide, keys[0]))


class TestTolerance:
    @orders
    @pytest.mark.parametrize("zeros", [pytest.param(False, marks=pytest.mark.slow), True])
    def test_each_matrix_stops_where_the_definition_does(self, backend, small_panels, order, zeros):
        grads = [normal((19, 33)) ** 5, normal((20, 30))]
        if zeros:
            for grad in grads:
                grad[::5] = 0
                grad[:, ::7] = 0
        lying = [order(grad) for grad in grads]
        of_count = {i: descend(backend, lying, i)[0] for i in range(2, 5)}
        stops = []
        for tol in (1.0, 0.03):
            exact = EagerBackend().scales([grad.double() for grad in grads], 4, tol=tol)
            params, _ = descend(backend, lying, 4, tol=tol)
            for k, (grad, scales) in enumerate(zip(grads, exact, strict=True)):
                expected = grad.double() * scales.row * scales.col
                assert_close(params[k].double(), expected, rtol=2e-5, atol=0)
                bits = [i for i, counted in of_count.items() if torch.equal(counted[k], params[k])]
                assert len(bits) == 1
                stops += bits
        assert len(set(stops)) >= 3


class TestReadings:
    @orders
    @pytest.mark.parametrize("shape", [(67, 40), (2, 5461)], ids=str)
    @pytest.mark.parametrize("num_iters", [1, 5])
    def test_a_step_reads_a_gradient_once_an_iteration_and_once_more(
        self, backend, launches, order, shape, num_iters
    ):
        grad = order(normal(shape, dtype=torch.bfloat16))
        matrices = Matrices([beside(grad)], [grad], alone([grad]))
        with readings([grad]) as found:
            backend.descend_(matrices, num_iters, keep=1.0, step=1.0)
        assert found.by_kernels == (num_iters + 1) * grad.numel()
        assert found.by_torch == found.copied == 0
        assert launches == ["full_iteration"] * num_iters + ["finish"]

    @pytest.mark.parametrize("order", [torch.clone, turned], ids=["plain", "turned"])
    def test_scales_alone_are_found_by_as_few(self, backend, launches, order):
        backend.scales([order(normal((67, 40)))], 5)
        more = ["finish"] if order is turned else []
        assert launches == ["full_iteration"] * 5 + more

    def test_launches_do_not_depend_on_the_number_of_matrices(self, backend, launches):
        descend(backend, [normal((7, 5), seed) for seed in range(9)], 2)
        assert launches == ["full_iteration", "full_iteration", "finish"]


# The hidden and the inner size of a model.
MODELS = {"llama-60m": (512, 1376), "llama-1b": (2048, 5461), "llama-7b": (4096, 11008)}


def programs_of(shape):
    return len(row_programs(0, shape[0], panel_of(*shape)))


class TestSchedule:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_partial_sums_are_small_and_programs_many(self, name, dtype):
        h, inner = MODELS[name]
        for shape in [(h, h), (inner, h), (h, inner)]:
            shapes = (torch.Size(shape),) * (1 + CACHE // 2 // (h * h * dtype.itemsize))
            layout = dense_layout(torch.empty(shape, device="meta"))
            operands = (Operand(dtype, layout, aligned=True),) * len(shapes)
            room = max(CACHE // 2, h * inner * dtype.itemsize)
            found = schedule_of(operands, operands, shapes, tuple(range(len(shapes))), room)
            fullest = max(found.buckets, key=lambda bucket: bucket.program_count)
            count = -(-fullest.program_count // programs_of(shape))
            size = count * shape[0] * shape[1] * dtype.itemsize
            assert found.partial_sums * 4 <= 0.127 * size
            assert fullest.program_count >= 0.75 * PROCESSORS

    @pytest.mark.parametrize(
        "shape", [(1_000_000, 3), (4096, 4096), (32_000, 2048), (4096, 11008)], ids=str
    )
    def test_every_processor_of_a_gpu_has_a_part_of_a_large_matrix(self, shape):
        assert programs_of(shape) > PROCESSORS

    @pytest.mark.parametrize("Q", [1, 3, 5, 64, 1376, 2049, 5461, 11008, 20_000, 32_768])
    def test_two_tiles_hold_a_row(self, Q):
        BM, A, B = panel_of(4096, Q)
        assert A + B >= Q
        assert max(1.5 * Q, 8) >= A + B
        assert B == 0 or Q > A
        assert max(schedule.AREA, A + B) >= BM * (A + B)
