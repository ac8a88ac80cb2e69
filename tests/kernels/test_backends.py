"""Every backend gives the paper's scales and the same step, row by row of one table."""

import importlib.util
import math
import shutil
import subprocess
import sys
import threading
import warnings
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from layouts import gapped, scattered, turned
from reference import sinkhorn_knopp, square_root_sinkhorn
from sinkgd import kernels, sr_sinkhorn
from sinkgd.deflation import LowRank
from sinkgd.kernels import CorrectedScales, Scales, backends, registry
from sinkgd.kernels.cpu import CpuBackend
from sinkgd.kernels.rounding import keys_of_step, round_to_bfloat16
from sinkgd.kernels.triton import TritonBackend
from sinkgd.kernels.triton import support as triton_support
from sinkgd.lab.plan.trace import LiveStorages

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

# primes, one row, one column, narrow, a whole vector of 16, more than one, shared by the threads
SHAPES = [(37, 53), (1, 19), (19, 1), (1, 1), (7, 3), (8, 16), (64, 48), (263, 257), (257, 263)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# 25 roundings of 1.2e-7: five iterations of two sums, a root and the products of r, c and G
FLOAT32 = {"rtol": 3e-6, "atol": 0}

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def pytest_generate_tests(metafunc):
    """Each backend in its turn; by two numbers of threads, where it has threads."""
    names = [backend.name for backend in backends()]
    if "threads" in metafunc.fixturenames:
        counts = {"triton": (1,)}
        runs = [(name, count) for name in names for count in counts.get(name, (1, 2))]
        metafunc.parametrize(("backend", "threads"), runs, indirect=True)
    elif "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request):
    found = next(backend for backend in backends() if backend.name == request.param)
    if (reason := found.missing()) is not None:
        pytest.skip(f"backend {found.name!r}: {reason}")
    if found.name == "triton":
        request.getfixturevalue("interpreter")
    return found


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def normal(shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


LAYOUTS = [torch.clone, turned, gapped, lambda x: gapped(x.mT).mT, scattered]
LAYOUT_IDS = ["contiguous", "turned", "gapped", "turned-gapped", "scattered"]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)


def expected_update(grad, num_iters):
    return sinkhorn_knopp(grad.double() ** 2, num_iters).sqrt() * grad.double().sign()


def update_of(grad, scales):
    return grad.double() * scales.row.double() * scales.col.double()


def same_bits(one, other):
    return all(
        torch.equal(a, b)
        for pair in zip(one, other, strict=True)
        for a, b in zip(*pair, strict=True)
    )


def test_the_table_holds_every_backend():
    assert [backend.name for backend in backends()] == ["cpu", "triton", "eager"]


def test_a_program_imports_them_when_it_looks_for_one():
    code = (
        "import sinkgd, sys, torch\n"
        "fast = {'sinkgd.kernels.cpu', 'sinkgd.kernels.triton'}\n"
        "assert not fast & sys.modules.keys()\n"
        "sinkgd.kernels.select('auto', torch.device('cpu'))\n"
        "assert fast <= sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TestScales:
    @shapes
    @dtypes
    @layouts
    def test_they_are_the_classic_sinkhorn_iterates(self, backend, threads, shape, dtype, layout):
        grad = layout(normal(shape, dtype=dtype))
        for num_iters in (1, 5):
            scales = backend.scales([grad], num_iters)[0]
            expected = expected_update(grad, num_iters)
            assert_close(update_of(grad, scales), expected, **FLOAT32)

    @pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-15, 1e15, 1e20, 1e30])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @layouts
    def test_they_follow_any_size_of_gradient(self, backend, size, dtype, layout):
        grad = layout((size * normal((67, 31))).to(dtype))
        scales = backend.scales([grad], 5)[0]
        assert_close(update_of(grad, scales), expected_update(grad, 5), **FLOAT32)

    @pytest.mark.parametrize("exponent", [-100, -64, -30, 30, 64, 100])
    @pytest.mark.parametrize("shape", [(67, 31), (263, 257)], ids=str)
    @layouts
    def test_a_power_of_two_changes_no_bit(self, backend, exponent, shape, layout):
        grad = layout(normal(shape))
        plain = backend.scales([grad], 5)
        for row, col in backend.scales([2.0**exponent * grad], 5):
            assert torch.equal(row * (2.0**exponent * grad) * col, update32(grad, plain[0]))

    @pytest.mark.parametrize("num_iters", [1, 5, 60])
    @pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
    @layouts
    def test_zero_rows_and_columns_have_scale_zero(self, backend, num_iters, dim, layout):
        grad = normal((19, 23))
        grad.index_fill_(dim, torch.tensor([0, 7, 18]), 0)
        grad = layout(grad)
        scales = backend.scales([grad], num_iters)[0]
        zeros = grad.eq(0).all(1 - dim).flatten()
        assert torch.equal(scales[dim].eq(0).flatten(), zeros)
        assert not scales[1 - dim].eq(0).any()
        expected = square_root_sinkhorn(grad, num_iters)
        assert_close(update_of(grad, scales), expected, rtol=2e-5, atol=0)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
    @pytest.mark.parametrize("shape", [(19, 23), (263, 257)], ids=str)
    @layouts
    def test_a_bad_entry_makes_every_column_scale_bad(self, backend, value, shape, layout):
        grad = normal(shape)
        grad[-2, 5] = value
        good = normal(shape, seed=1)
        bad, untouched = backend.scales([layout(grad), good], 5)
        assert not bad.col.isfinite().any()
        assert_close(update_of(good, untouched), expected_update(good, 5), **FLOAT32)

    @pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (0, 3, 4), (2, 0, 4)], ids=str)
    def test_empty_matrices_have_finite_scales(self, backend, shape):
        other = normal((5, 7))
        empty, scales = backend.scales([torch.empty(shape), other], 5)
        assert empty.row.shape == (*shape[:-1], 1)
        assert empty.col.shape == (*shape[:-2], 1, shape[-1])
        assert empty.row.isfinite().all()
        assert empty.col.isfinite().all()
        assert_close(update_of(other, scales), expected_update(other, 5), **FLOAT32)

    @pytest.mark.parametrize("batch", [(3,), (2, 3), (1, 1, 2)], ids=str)
    @layouts
    def test_a_batch_is_its_matrices(self, backend, batch, layout):
        grads = layout(normal((*batch, 41, 29)))
        grads[0] *= 1e-25  # one of them leaves float32's range
        scales = backend.scales([grads], 5)[0]
        expected = torch.stack([expected_update(g, 5) for g in grads.flatten(0, -3)])
        assert_close(update_of(grads, scales).view_as(expected), expected, **FLOAT32)

    @pytest.mark.parametrize("m", [20_011, 200_003])
    def test_a_tall_matrix_loses_no_precision(self, backend, m):
        if backend.name == "eager" and m > 100_000:
            pytest.skip("torch adds up long columns in one sum: 2e-5 at this height")
        grad = normal((m, 3))
        scales = backend.scales([grad], 1)[0]
        row = (3 / grad.double().square().sum(1, keepdim=True)).sqrt()
        col = m**0.5 / (row * grad.double()).norm(dim=0, keepdim=True)
        assert_close(update_of(grad, scales), row * grad.double() * col, **FLOAT32)

    def test_the_gradient_is_only_read(self, backend):
        grads = [normal((263, 257)), normal((9, 7), dtype=torch.bfloat16), 1e30 * normal((5, 7))]
        before = [grad.clone() for grad in grads]
        backend.scales(grads, 5)
        assert all(torch.equal(*pair) for pair in zip(grads, before, strict=True))


def update32(grad, scales):
    return scales.row * grad * scales.col


def mix(backend):
    """Shapes and types; the largest has many parts in every backend."""
    large = (140, 133) if backend.name == "triton" else (263, 257)
    return [(shape, dtype) for shape in [(37, 53), large, (3, 20, 30)] for dtype in DTYPES]


class TestDeterminism:
    def test_the_same_gradients_give_the_same_bits_whatever_ran_before(self, backend, threads):
        grads = [normal(shape, dtype=dtype) for shape, dtype in mix(backend)]
        first = backend.scales(grads, 5)
        other = normal((199, 301) if backend.name == "triton" else (999, 801), seed=3)
        backend.scales([other, torch.full((40, 50), torch.nan)], 2)
        assert same_bits(backend.scales(grads, 5), first)

    def test_a_matrix_has_the_same_bits_in_any_list(self, backend, threads):
        grads = [normal(shape, dtype=dtype) for shape, dtype in mix(backend)]
        together = backend.scales(grads, 5)
        alone = [backend.scales([grad], 5)[0] for grad in grads]
        assert same_bits(together, alone)

    def test_bfloat16_has_the_bits_of_the_same_numbers_in_float32(self, backend):
        for shape in SHAPES:
            grad = normal(shape, dtype=torch.bfloat16)
            wide = backend.scales([grad.float()], 5)
            assert same_bits(backend.scales([grad], 5), wide)

    def test_several_python_threads_do_not_disturb_each_other(self, backend):
        shape = (37, 53) if backend.name == "triton" else (263, 257)  # one at a time there
        grads = [[normal(shape, seed=4 * i + k) for k in range(2)] for i in range(4)]
        expected = [backend.scales(pair, 5) for pair in grads]
        found = [[] for _ in grads]
        times = 2 if backend.name == "triton" else 5

        def work(i):
            for _ in range(times):
                found[i].append(backend.scales(grads[i], 5))

        workers = [threading.Thread(target=work, args=(i,)) for i in range(len(grads))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for i, runs in enumerate(found):
            assert len(runs) == times
            assert all(same_bits(run, expected[i]) for run in runs)


class TestUpdate:
    @shapes
    @dtypes
    @pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
    def test_it_is_keep_times_param_plus_step_times_update(
        self, backend, threads, shape, dtype, param_dtype
    ):
        param, grad = normal(shape, 1, param_dtype), normal(shape, dtype=dtype)
        scales = backend.scales([grad], 5)
        kept, moved = 0.875 * param.double(), -0.25 * update_of(grad, scales[0])
        backend.update_([param], [grad], scales, keep=0.875, step=-0.25)
        exact = torch.finfo(param_dtype).eps / 2
        error = (param.double() - (kept + moved)).abs()
        assert (error <= 1e-6 * (kept.abs() + moved.abs()) + exact * (kept + moved).abs()).all()

    @layouts
    @pytest.mark.parametrize("grad_layout", LAYOUTS, ids=LAYOUT_IDS)
    @pytest.mark.parametrize("shape", [(37, 53), (3, 20, 30), (1, 6), (8, 1, 4)], ids=str)
    def test_strides_change_nothing(self, backend, layout, grad_layout, shape):
        param, grad = normal(shape, 1), normal(shape)
        scales = backend.scales([grad], 5)
        strided = layout(param)
        backend.update_([param], [grad], scales, keep=0.875, step=-0.25)
        backend.update_([strided], [grad_layout(grad)], scales, keep=0.875, step=-0.25)
        assert_close(strided, param, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("keep", [1.0, 0.9])
    def test_bfloat16_parameters_are_rounded_once_to_the_nearest(self, backend, dtype, keep):
        shape = (101, 63) if backend.name == "triton" else (301, 263)
        grad = normal(shape, dtype=dtype)
        narrow = normal(shape, 1, torch.bfloat16)
        narrow[0, :4] = torch.tensor([torch.nan, torch.inf, 0.0, 3e38])
        wide = narrow.float()
        scales = backend.scales([grad], 5)
        # 2^-9 of a parameter is a tie for many of them
        for row, col in (scales[0], [torch.ones_like(scales[0].row), scales[0].col.sign()]):
            backend.update_([narrow], [grad], [Scales(row, col)], keep=keep, step=-(2.0**-9))
            backend.update_([wide], [grad], [Scales(row, col)], keep=keep, step=-(2.0**-9))
            assert torch.equal(narrow.nan_to_num(), wide.bfloat16().nan_to_num())
            assert torch.equal(narrow.isnan(), wide.isnan())
            wide = narrow.float()

    def test_only_what_is_allowed_changes(self, backend, threads):
        params = [normal(shape, 1, dtype) for shape, dtype in mix(backend)]
        grads = [normal(shape, 2, dtype) for shape, dtype in mix(backend)]
        before = [param.clone() for param in params]
        allowed = [torch.tensor(i % 2 == 0) for i in range(len(params))]
        for i in range(1, len(params), 2):
            grads[i][..., 0, 0] = torch.nan
        scales = backend.scales(grads, 5)
        backend.update_(params, grads, scales, keep=0.9, step=-0.1, allowed=allowed)
        unchanged = [torch.equal(*pair) for pair in zip(params, before, strict=True)]
        assert unchanged == [i % 2 == 1 for i in range(len(params))]
        assert all(param.isfinite().all() for param in params)

    def test_numbers_may_be_tensors(self, backend):
        grad = normal((37, 53))
        scales = backend.scales([grad], 5)
        one, other = normal((37, 53), 1), normal((37, 53), 1)
        backend.update_([one], [grad], scales, keep=0.5, step=-0.25)
        numbers = {"keep": torch.tensor(0.5), "step": torch.tensor(-0.25)}
        backend.update_([other], [grad], scales, **numbers)
        assert_close(one, other, rtol=1e-6, atol=1e-7)

    def test_autograd_learns_that_the_parameter_changed(self, backend):
        param = normal((5, 7)).requires_grad_()
        squares = param.square().sum()
        with torch.no_grad():
            grad = normal((5, 7), 1)
            backend.update_([param], [grad], backend.scales([grad], 1), keep=1.0, step=-0.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squares.backward()


def heavy_tailed(shape, seed=0):
    """Rows that keep moving for tens of iterations."""
    return normal(shape, seed) ** 5


def row_scales(grad, num_iters):
    """r after each iteration, in float64."""
    S = grad.double() ** 2
    m, n = S.shape
    c2, found = torch.ones(n, dtype=torch.float64), []
    for _ in range(num_iters):
        r2 = n / (S @ c2)
        c2 = m / (S.mT @ r2)
        found.append(r2.sqrt())
    return found


def movements(grad, num_iters):
    """How far a row moves at most in each iteration from the second on, relatively."""
    scales = row_scales(grad, num_iters)
    return [float((after / before - 1).abs().max()) for before, after in pairwise(scales)]


class TestSizes:
    """Kernels read memory by the shape of a parameter, so what lies beside it must have its own."""

    @pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)])
    @pytest.mark.parametrize("change", ["fewer rows", "fewer columns", "one", "other batch"])
    @pytest.mark.parametrize("lowered", [False, True])
    def test_scales_of_another_size_are_refused(self, backend, shape, change, lowered):
        *batch, m, n = shape
        row, col = {
            "fewer rows": ((*batch, m - 1, 1), (*batch, 1, n)),
            "fewer columns": ((*batch, m, 1), (*batch, 1, n - 1)),
            "one": ((*batch, 1, 1), (*batch, 1, 1)),
            "other batch": ((2, m, 1), (2, 1, n)),
        }[change]
        own = Scales(torch.ones(row), torch.ones(col))
        if lowered:
            taken = LowRank(torch.zeros(*batch, m, 1), torch.zeros(*batch, n, 1))
            own = CorrectedScales(*own, taken)
        param = torch.ones(shape)
        with pytest.raises(ValueError, match=r"scales of shapes .* do not fit a parameter of"):
            backend.update_([param], [torch.ones(shape)], [own], keep=1.0, step=1.0)
        assert param.eq(1).all()

    @pytest.mark.parametrize("start", [(1, 6), (1, 1), (7,), (2, 1, 7)])
    def test_starts_of_another_size_are_refused(self, backend, start):
        with pytest.raises(ValueError, match=r"starts of shape .* do not fit a gradient of"):
            backend.scales([torch.ones(5, 7)], 1, starts=[torch.ones(start)])


class TestTolerance:
    @pytest.mark.parametrize("stop", [2, 3, 6])
    @pytest.mark.parametrize("shape", [(37, 53), (19, 7), (140, 133)], ids=str)
    @pytest.mark.parametrize("layout", [torch.clone, turned], ids=["contiguous", "turned"])
    def test_a_matrix_is_left_when_no_row_moves_by_more(self, backend, stop, shape, layout):
        grad = heavy_tailed(shape)
        moves = movements(grad, stop + 1)
        assert sorted(moves, reverse=True) == moves
        assert moves[-1] > 1e-4  # so that one iteration more or less is seen
        before = moves[stop - 3] if stop > 2 else 4 * moves[0]
        tol = (before * moves[stop - 2]) ** 0.5
        grad = layout(grad)
        scales = backend.scales([grad], 12, tol=tol)[0]
        assert_close(update_of(grad, scales), expected_update(grad, stop), rtol=1e-5, atol=0)
        assert same_bits([scales], backend.scales([grad], stop))

    @pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
    @pytest.mark.parametrize("layout", [torch.clone, turned], ids=["contiguous", "turned"])
    def test_zero_rows_and_columns_do_not_keep_it_going(self, backend, dim, layout):
        live = heavy_tailed((31, 29))
        zeros = torch.zeros((7, 29) if dim == 0 else (31, 7))
        grad = torch.cat([zeros, live], dim=dim)
        moves = movements(live, 5)
        tol = (moves[-2] * moves[-1]) ** 0.5  # between those of iterations 4 and 5
        assert same_bits(
            backend.scales([layout(grad)], 12, tol=tol), backend.scales([layout(grad)], 5)
        )

    def test_a_row_that_shrinks_and_one_that_grows_count_alike(self, backend):
        grad = heavy_tailed((37, 53))
        first, second = row_scales(grad, 2)
        ratio = second / first
        shrinks, grows = float(1 - ratio.min()), float(ratio.max() - 1)
        for tol in (max(shrinks, grows) * 1.01, max(shrinks, grows) * 0.99):
            stop = 2 if tol > max(shrinks, grows) else 3
            scales = backend.scales([grad], 3, tol=tol)
            assert same_bits(scales, backend.scales([grad], stop))

    @pytest.mark.parametrize("shape", [(37, 53), (3, 20, 30)], ids=str)
    def test_a_tolerance_of_zero_changes_nothing(self, backend, shape):
        grad = heavy_tailed(shape)
        assert same_bits(backend.scales([grad], 6, tol=0.0), backend.scales([grad], 6))

    def test_each_matrix_of_a_batch_and_of_a_list_is_left_in_its_turn(self, backend):
        quick, slow = normal((20, 30)), heavy_tailed((20, 30))
        tol = movements(slow, 4)[-1] * 1.01
        alone = [backend.scales([grad], 12, tol=tol)[0] for grad in (quick, slow)]
        assert not same_bits([alone[0]], backend.scales([quick], 12))
        assert same_bits([alone[1]], backend.scales([slow], 4))
        assert same_bits(backend.scales([quick, slow], 12, tol=tol), alone)
        batch = torch.stack([slow, quick, slow])
        row, col = backend.scales([batch], 12, tol=tol)[0]
        for i, scales in enumerate([alone[1], alone[0], alone[1]]):
            expected = update_of(batch[i], scales)
            assert_close(
                batch[i].double() * row[i].double() * col[i].double(), expected, rtol=1e-5, atol=0
            )

    def test_what_is_bad_or_zero_keeps_no_other_waiting(self, backend):
        bad, good = normal((20, 30)), heavy_tailed((20, 30))
        bad[3, 4] = torch.nan
        tol = movements(good, 4)[-1] * 1.01
        found = backend.scales([bad, torch.zeros(5, 7), good], 12, tol=tol)
        assert not found[0].col.isfinite().any()
        assert found[1].row.eq(0).all()
        assert found[1].col.eq(0).all()
        assert same_bits(found[2:], backend.scales([good], 4))

    def test_one_iteration_is_never_cut_short(self, backend):
        grad = normal((20, 30))
        assert same_bits(backend.scales([grad], 1, tol=1.0), backend.scales([grad], 1))
        assert same_bits(backend.scales([grad], 9, tol=9.0), backend.scales([grad], 2))


def fixed_point(grad):
    """The update that no iteration changes, and its column scales with a largest of 1."""
    S = grad.double() ** 2
    m, n = S.shape
    c2 = S.new_ones(n)
    for _ in range(3000):
        r2 = n / (S @ c2)
        c2 = m / (S.mT @ r2)
    col = c2.sqrt()
    return r2.sqrt()[:, None] * grad.double() * col, (col / col.max()).to(torch.float32)[None, :]


class TestStarts:
    @layouts
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(37, 53), (140, 33)], ids=str)
    def test_one_iteration_from_the_fixed_point_is_there(self, backend, dtype, shape, layout):
        grad = layout((normal(shape) ** 3).to(dtype))
        expected, start = fixed_point(grad)
        scales = backend.scales([grad], 1, starts=[start])[0]
        assert_close(update_of(grad, scales), expected, rtol=1e-5, atol=0)
        far = backend.scales([grad], 1)[0]
        assert not torch.isclose(update_of(grad, far), expected, rtol=1e-2, atol=0).all()

    def test_float64_starts_belong_to_float64_gradients(self, backend):
        grad = normal((37, 53), dtype=torch.float64)
        expected, start = fixed_point(grad)
        scales = backend.scales([grad], 1, starts=[start.double()])[0]
        assert_close(update_of(grad, scales), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("num_iters", [1, 2, 5])
    def test_they_are_where_the_iteration_begins(self, backend, num_iters):
        grad, start = normal((37, 53)), normal((1, 53), 1).abs().clamp(1e-3, 1)
        scales = backend.scales([grad], num_iters, starts=[start])[0]
        # the paper's iteration does not see the columns' scales but through its first row step
        assert_close(
            update_of(grad, scales),
            expected_update(grad.double() * start, num_iters),
            rtol=1e-5,
            atol=0,
        )

    def test_ones_change_nothing(self, backend):
        grads = [normal((37, 53)), normal((3, 20, 30))]
        starts = [torch.ones(1, 53), torch.ones(3, 1, 30)]
        assert same_bits(backend.scales(grads, 3, starts=starts), backend.scales(grads, 3))

    def test_there_is_one_a_matrix_of_a_batch_and_none_where_there_is_none(self, backend):
        batch, other = normal((3, 20, 30)) ** 3, normal((20, 30), 5)
        points = [fixed_point(grad) for grad in batch]
        starts = [torch.stack([start for _, start in points]), None]
        found = backend.scales([batch, other], 1, starts=starts)
        expected = torch.stack([update for update, _ in points])
        assert_close(update_of(batch, found[0]), expected, rtol=1e-5, atol=0)
        assert_close(update_of(other, found[1]), expected_update(other, 1), **FLOAT32)

    def test_zero_columns_stay_zero(self, backend):
        grad = normal((20, 30))
        grad[:, [0, 7]] = 0
        start = torch.full((1, 30), 0.25)
        scales = backend.scales([grad], 3, starts=[start])[0]
        assert torch.equal(scales.col.eq(0).flatten(), grad.eq(0).all(0))
        assert_close(update_of(grad, scales), square_root_sinkhorn(grad, 3), rtol=2e-5, atol=0)

    def test_a_tolerance_stops_at_the_second_iteration_from_the_fixed_point(self, backend):
        grad = normal((37, 53)) ** 3
        expected, start = fixed_point(grad)
        scales = backend.scales([grad], 50, tol=1e-4, starts=[start])[0]
        assert_close(update_of(grad, scales), expected, rtol=1e-5, atol=0)


def keys(*values):
    return list(torch.tensor(values))


class TestStochasticRounding:
    @layouts
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(37, 53), (3, 20, 30), (140, 133)], ids=str)
    def test_the_bits_are_those_of_the_definition(self, backend, shape, dtype, layout):
        grad = normal(shape, dtype=dtype)
        param = layout(normal(shape, 1, torch.bfloat16))
        wide = param.float()
        (key,) = keys(-0x123456789ABCDEF)
        scales = backend.scales([grad], 2)
        backend.update_([wide], [grad], scales, keep=0.875, step=-0.01)
        backend.update_([param], [grad], scales, keep=0.875, step=-0.01, keys=[key])
        assert torch.equal(param, round_to_bfloat16(wide, key))

    def test_each_parameter_has_its_own_key(self, backend):
        shapes = [(5, 7), (8, 16), (2, 3, 4)]
        grads = [normal(shape) for shape in shapes]
        params = [normal(shape, 1, torch.bfloat16) for shape in shapes]
        wide = [param.float() for param in params]
        given = keys(1, 2, 1 << 40)
        scales = backend.scales(grads, 1)
        backend.update_(wide, grads, scales, keep=1.0, step=-0.01)
        backend.update_(params, grads, scales, keep=1.0, step=-0.01, keys=given)
        for param, exact, key in zip(params, wide, given, strict=True):
            assert torch.equal(param, round_to_bfloat16(exact, key))

    @pytest.mark.parametrize("part", [0.03, 0.3, 0.5, 0.99])
    def test_the_mean_over_many_keys_is_the_number(self, backend, part):
        count, shape, unit = 64, (8, 8), 2.0**-7  # 4096 draws; the unit of bfloat16 above 1
        ones = torch.ones(shape)
        params = [ones.bfloat16() for _ in range(count)]
        scales = [Scales(torch.ones(8, 1), torch.ones(1, 8))] * count
        given = list(keys_of_step(7, torch.tensor(3), count))
        backend.update_(params, [ones] * count, scales, keep=1.0, step=part * unit, keys=given)
        ups = (torch.stack(params).double() - 1) / unit
        assert set(ups.flatten().tolist()) <= {0.0, 1.0}
        deviation = (part * (1 - part) / ups.numel()) ** 0.5
        assert abs(float(ups.mean()) - part) < 5 * deviation

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
    def test_other_types_are_rounded_as_ever(self, backend, dtype):
        grad = normal((37, 53))
        one, other = normal((37, 53), 1, dtype), normal((37, 53), 1, dtype)
        scales = backend.scales([grad], 1)
        backend.update_([one], [grad], scales, keep=0.9, step=-0.1)
        backend.update_([other], [grad], scales, keep=0.9, step=-0.1, keys=keys(5))
        assert torch.equal(one, other)

    def test_the_same_key_gives_the_same_bits_and_another_others(self, backend):
        grad = normal((37, 53))
        scales = backend.scales([grad], 1)
        params = [normal((37, 53), 1, torch.bfloat16) for _ in range(3)]
        for param, key in zip(params, keys(5, 5, 6), strict=True):
            backend.update_([param], [grad], scales, keep=0.9, step=-0.1, keys=[key])
        assert torch.equal(params[0], params[1])
        assert not torch.equal(params[0], params[2])

    def test_what_is_not_finite_stays_what_it_is(self, backend):
        param = normal((5, 4), 1, torch.bfloat16)
        param[0] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
        ones, (key,) = Scales(torch.ones(5, 1), torch.ones(1, 4)), keys(9)
        backend.update_([param], [torch.ones(5, 4)], [ones], keep=1.0, step=1e-3, keys=[key])
        assert param[0, 0].isnan()
        assert param[0, 1:3].tolist() == [torch.inf, -torch.inf]
        assert param[0, 3:].isfinite().all()
        assert param[1:].isfinite().all()

    def test_only_what_is_allowed_is_rounded(self, backend):
        grads, scales = [normal((5, 7))] * 2, [Scales(torch.ones(5, 1), torch.ones(1, 7))] * 2
        params = [normal((5, 7), 1, torch.bfloat16) for _ in range(2)]
        before = params[1].clone()
        allowed = [torch.tensor(True), torch.tensor(False)]
        backend.update_(
            params, grads, scales, keep=0.9, step=-0.1, allowed=allowed, keys=keys(1, 2)
        )
        assert not torch.equal(params[0], before)
        assert torch.equal(params[1], before)


class TestForbidden:
    @dtypes
    @pytest.mark.parametrize("step", [-0.1, math.inf, math.nan])
    @pytest.mark.parametrize("keep", [1.0, 0.9])
    def test_what_may_not_be_written_keeps_its_bits(self, backend, dtype, step, keep):
        param, grad = normal((37, 53), 1, dtype), normal((37, 53), 0, dtype)
        param[0, :3] = torch.tensor([-0.0, 0.0, math.nan])
        before = param.clone()
        scales = backend.scales([grad], 1)
        backend.update_(
            [param], [grad], scales, keep=keep, step=step, allowed=[torch.tensor(False)]
        )
        ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        assert torch.equal(param.view(ints), before.view(ints))


class TestMemory:
    """However many matrices there are, a backend holds float32 copies of few at a time."""

    COUNT, SHAPE = 8, (160, 192)

    def copies(self, known, call, *, vectors):
        """How many float32 matrices live at most, beside ``known`` and some vectors a matrix."""
        live = LiveStorages(known)
        live.enter("call")
        with live:
            call()
        entries = live.peaks["call"].total / 4 - self.COUNT * vectors * sum(self.SHAPE)
        return entries / (self.SHAPE[0] * self.SHAPE[1])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_scales(self, backend, dtype):
        grads = [normal(self.SHAPE, i, dtype) for i in range(self.COUNT)]
        assert self.copies(grads, lambda: backend.scales(grads, 2), vectors=2) < 1.2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("rank", [0, 3, 33])  # 33 are more than triton's kernels subtract
    def test_update(self, backend, rank, dtype):
        grads, params = (
            [normal(self.SHAPE, i + j, dtype) for i in range(self.COUNT)] for j in (0, 100)
        )
        scales, known = backend.scales(grads, 2), [*grads, *params]
        if rank:
            m, n = self.SHAPE
            taken = [LowRank(normal((m, rank), i), normal((n, rank), i)) for i in range(self.COUNT)]
            scales = [CorrectedScales(*own, away) for own, away in zip(scales, taken, strict=True)]
            known += [x for own in taken for x in own]
        known += [x for own in scales for x in (own.row, own.col)]
        copies = self.copies(
            known,
            lambda: backend.update_(params, grads, scales, keep=0.9, step=-0.1),
            vectors=rank,
        )
        assert copies < 2.2  # the update, and the parameter if it is not in float32


class TestChoice:
    def test_auto_takes_the_fastest_that_is_there(self, monkeypatch):
        assert kernels.select("auto", torch.device("cpu")).name == "cpu"
        assert kernels.select("auto", torch.device("meta")).name == "eager"
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert kernels.select("auto", torch.device("cpu")).name == "eager"

    def test_auto_never_takes_the_interpreter(self, interpreter, monkeypatch):
        monkeypatch.setattr(CpuBackend, "supports", lambda self, device: False)
        assert kernels.select("triton", torch.device("cpu")).name == "triton"
        assert kernels.select("auto", torch.device("cpu")).name == "eager"
        row = ("triton", False, "runs on cpu only if it is named")
        assert row in registry.describe(torch.device("cpu"))

    def test_an_absent_backend_is_refused_with_the_command_that_brings_it(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"'cpu' cannot run here: numba is not installed; "):
            sr_sinkhorn(torch.eye(4), backend="cpu")
        with pytest.raises(ImportError, match=r"pip install '\.\[cpu\]'"):
            sr_sinkhorn(torch.eye(4), backend="cpu")
        with pytest.raises(ImportError, match=r"triton is not installed; pip install triton"):
            sr_sinkhorn(torch.eye(4), backend="triton")
        assert registry.describe(torch.device("cpu"))[0][1] is False

    @pytest.mark.parametrize(
        ("found", "compiler", "takes"),
        [(None, None, "eager"), ("/usr/bin/gcc", None, "triton"), (None, "nvcc", "triton")],
    )
    def test_triton_needs_a_compiler_and_auto_says_so_once(
        self, monkeypatch, found, compiler, takes
    ):
        device = torch.device("cuda", 0)
        find_spec = importlib.util.find_spec
        spec = find_spec("torch")
        present = lambda name: spec if name == "triton" else find_spec(name)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", present)
        monkeypatch.setattr(TritonBackend, "supports", lambda self, device: device.type == "cuda")
        monkeypatch.setattr(triton_support, "interpreting", lambda: False)
        monkeypatch.setattr(shutil, "which", lambda name, path=None: found)
        monkeypatch.delenv("CC", raising=False)
        if compiler is not None:
            monkeypatch.setenv("CC", compiler)
        triton_support._has_compiler.cache_clear()
        registry._warn_once.cache_clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            chosen = [kernels.select("auto", device).name for _ in range(2)]
        assert chosen == [takes] * 2
        rows = {name: (runs, why) for name, runs, why in registry.describe(device)}
        if takes == "eager":
            (once,) = said
            assert "'triton' cannot run here: triton finds no C compiler" in str(once.message)
            assert rows["triton"] == (False, TritonBackend().missing())
            with pytest.raises(ImportError, match="no C compiler for its launchers; install gcc"):
                kernels.select("triton", device)
        else:
            assert not said
            assert rows["triton"][0]
        triton_support._has_compiler.cache_clear()

    def test_auto_says_once_why_it_passes_over_the_loops(self, monkeypatch):
        monkeypatch.setattr("sinkgd.kernels.cpu.backend.torch_openmp", lambda: None)
        registry._warn_once.cache_clear()
        with pytest.warns(RuntimeWarning, match="'cpu' cannot run here: .*GOMP_parallel"):
            assert kernels.select("auto", torch.device("cpu")).name == "eager"
        assert kernels.select("auto", torch.device("cpu")).name == "eager"

    def test_a_torch_without_openmp_is_named(self, monkeypatch):
        monkeypatch.setattr("sinkgd.kernels.cpu.backend.torch_openmp", lambda: None)
        assert "GOMP_parallel" in CpuBackend().missing()

    def test_a_device_it_does_not_run_on_is_named(self):
        with pytest.raises(ValueError, match="'cpu' does not run on meta; use 'auto'"):
            sr_sinkhorn(torch.ones(3, 4, device="meta"), backend="cpu")
