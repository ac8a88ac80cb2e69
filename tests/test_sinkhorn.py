"""sr_sinkhorn: it is the paper's iteration, it has the paper's symmetries, it fails clearly."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from reference import column_projection, row_projection, sinkhorn_knopp, square_root_sinkhorn
from sinkgd import sinkhorn_scales, sr_sinkhorn

pytestmark = pytest.mark.usefixtures("every_backend")

# square, wide, tall, no power of two, one row, one column
SHAPES = [(64, 64), (32, 96), (96, 32), (37, 53), (1, 8), (8, 1)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")

# 25 roundings of 1.2e-7: five iterations of two sums, a root and the products of r, c and G
FLOAT32 = {"rtol": 3e-6, "atol": 0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def cauchy(shape, seed=0):
    return torch.empty(shape, dtype=torch.float64).cauchy_(generator=generator(seed))


def row_errors(update):
    """How far the squared row lengths are from n, relatively."""
    return (update.double().square().mean(dim=-1) - 1).abs()


@pytest.fixture
def grad(shape: tuple[int, int]) -> torch.Tensor:
    return normal(shape)


class TestItIsTheIteration:
    @shapes
    @pytest.mark.parametrize("num_iters", [1, 2, 5])
    def test_squares_are_the_classic_sinkhorn_iterates(self, grad, num_iters):
        expected = sinkhorn_knopp(grad.double() ** 2, num_iters).sqrt() * grad.sign()
        assert_close(sr_sinkhorn(grad, num_iters).double(), expected, **FLOAT32)

    @shapes
    @pytest.mark.parametrize("num_iters", [1, 5])
    def test_it_is_the_printed_algorithm(self, grad, num_iters):
        expected = square_root_sinkhorn(grad, num_iters)
        assert_close(sr_sinkhorn(grad, num_iters).double(), expected, **FLOAT32)

    @shapes
    def test_float64_is_computed_in_float64(self, grad):
        update = sr_sinkhorn(grad.double(), num_iters=5)
        assert_close(update, square_root_sinkhorn(grad, 5), rtol=1e-13, atol=0)

    def test_heavy_tails_lose_no_precision(self):
        grad = cauchy((48, 40)).float()
        assert_close(sr_sinkhorn(grad).double(), square_root_sinkhorn(grad, 5), **FLOAT32)

    def test_a_wide_layer_loses_no_precision(self):
        grad = normal((1500, 1100))
        expected = sinkhorn_knopp(grad.double() ** 2, 2).sqrt() * grad.sign()
        assert_close(sr_sinkhorn(grad, 2).double(), expected, **FLOAT32)

    @shapes
    def test_five_iterations_are_the_default(self, grad):
        assert torch.equal(sr_sinkhorn(grad), sr_sinkhorn(grad, num_iters=5))
        for default, five in zip(sinkhorn_scales(grad), sinkhorn_scales(grad, 5), strict=True):
            assert torch.equal(default, five)

    @shapes
    def test_the_update_is_the_gradient_between_the_scales(self, grad):
        m, n = grad.shape
        r, c = sinkhorn_scales(grad)
        assert r.shape == (m, 1)
        assert c.shape == (1, n)
        assert_close(r * grad * c, sr_sinkhorn(grad), rtol=1e-6, atol=0)

    @shapes
    def test_one_iteration_divides_by_the_row_lengths_then_by_the_column_lengths(self, grad):
        m, n = grad.shape
        r, c = sinkhorn_scales(grad, num_iters=1)
        assert_close(r, n**0.5 / grad.norm(dim=1, keepdim=True), rtol=1e-6, atol=0)
        assert_close(c, m**0.5 / (r * grad).norm(dim=0, keepdim=True), rtol=1e-6, atol=0)

    def test_rows_come_first(self):
        grad = normal((64, 64), dtype=torch.float64)
        rows_first = column_projection(row_projection(grad))
        columns_first = row_projection(column_projection(grad))
        update = sr_sinkhorn(grad, num_iters=1)
        assert_close(update, rows_first, rtol=1e-13, atol=0)
        # the order matters by 2 % of the update
        assert 0.01 < (update - columns_first).norm() / update.norm() < 0.04

    def test_the_order_of_rows_and_columns_matters_more_with_heavy_tails(self):
        grad = cauchy((64, 64))
        rows_first = sr_sinkhorn(grad, num_iters=1)
        columns_first = sr_sinkhorn(grad.mT, num_iters=1).mT
        assert (rows_first - columns_first).norm() / rows_first.norm() > 0.2

    @shapes
    def test_in_the_limit_the_order_does_not_matter(self, grad):
        rows_first = sr_sinkhorn(grad.double(), num_iters=200)
        columns_first = sr_sinkhorn(grad.double().mT, num_iters=200).mT
        assert_close(rows_first, columns_first, rtol=1e-9, atol=0)


class TestLengths:
    @shapes
    def test_both_norms_hold_at_the_fixed_point(self, grad):
        update = sr_sinkhorn(grad, num_iters=200)
        m, n = grad.shape
        assert_close(update.norm(dim=1), torch.full((m,), n**0.5), rtol=1e-5, atol=0)
        assert_close(update.norm(dim=0), torch.full((n,), m**0.5), rtol=1e-5, atol=0)

    @shapes
    @pytest.mark.parametrize("num_iters", [1, 2, 5])
    def test_columns_hold_after_any_iteration(self, grad, num_iters):
        m, n = grad.shape
        update = sr_sinkhorn(grad, num_iters)
        assert_close(update.norm(dim=0), torch.full((n,), m**0.5), rtol=1e-6, atol=0)

    @shapes
    @pytest.mark.parametrize("num_iters", [1, 2, 5])
    def test_the_root_mean_square_is_one(self, grad, num_iters):
        update = sr_sinkhorn(grad, num_iters).double()
        assert_close(update.square().mean().sqrt().item(), 1.0, rtol=1e-6, atol=0)

    @shapes
    def test_the_fixed_point_stays(self, grad):
        fixed = sr_sinkhorn(grad, num_iters=200)
        assert_close(sr_sinkhorn(fixed), fixed, rtol=1e-5, atol=0)


class TestConvergence:
    @pytest.mark.parametrize("shape", [(12, 9), (9, 12), (16, 16)])
    def test_each_iteration_shrinks_the_error_by_the_limits_second_singular_value(self, shape):
        grad = cauchy(shape, seed=1)
        m, n = shape
        limit = sr_sinkhorn(grad, num_iters=3000)
        singular = torch.linalg.svdvals(limit.square() / (m * n) ** 0.5)
        assert_close(singular[0].item(), 1.0, rtol=1e-6, atol=0)
        rate = singular[1].item() ** 2
        errors = [row_errors(sr_sinkhorn(grad, num_iters=k)).norm().item() for k in (40, 41)]
        assert 1e-10 < errors[1] < 1e-2  # past the first iterations, above the rounding
        assert errors[1] / errors[0] == pytest.approx(rate, rel=0.02)

    def test_five_iterations_nearly_converge_on_gaussian_matrices(self):
        worst = [row_errors(sr_sinkhorn(normal((64, 64), seed))).max() for seed in range(9)]
        assert 4e-6 / 3 < torch.stack(worst).median() < 4e-6 * 3

    def test_five_iterations_leave_a_tenth_on_heavy_tailed_matrices(self):
        def log_normal(seed):
            draws = normal((2, 64, 64), seed)
            return draws[0] * (2 * draws[1]).exp()

        worst = [row_errors(sr_sinkhorn(log_normal(seed))).max() for seed in range(9)]
        assert 9e-2 / 3 < torch.stack(worst).median() < 9e-2 * 3

    @shapes
    def test_a_matrix_of_rank_one_becomes_its_sign_at_once(self, shape):
        m, n = shape
        grad = normal((m, 1)) @ normal((1, n), seed=1)
        assert_close(sr_sinkhorn(grad, num_iters=1), grad.sign(), rtol=1e-6, atol=0)

    def test_without_total_support_convergence_is_sublinear(self):
        grad = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
        errors = [row_errors(sr_sinkhorn(grad, 2**k)).max().item() for k in range(4, 10)]
        for before, after in pairwise(errors):
            # twice the iterations, half the error: it goes like 1 / L
            assert after / before == pytest.approx(0.5, abs=0.05)

    def test_without_any_support_the_iterates_stay_those_of_the_paper(self):
        # two rows live in one column: both norms can never hold, and the scales drift apart
        grad = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
        update = sr_sinkhorn(grad, num_iters=50)
        # four roundings an iteration
        assert_close(update.double(), square_root_sinkhorn(grad, 50), rtol=3e-5, atol=0)


class TestSymmetries:
    @shapes
    def test_scaling_a_row_changes_nothing(self, grad):
        # powers of two are exact in floating point, so the claim is equality, not closeness
        scale = 2.0 ** torch.arange(grad.shape[0]).remainder(7).sub(3).unsqueeze(1)
        assert torch.equal(sr_sinkhorn(scale * grad), sr_sinkhorn(grad))

    @shapes
    def test_scaling_a_row_by_any_number_changes_only_the_rounding(self, grad):
        scale = torch.rand(grad.shape[0], 1, generator=generator(1)) + 0.1
        assert_close(sr_sinkhorn(scale * grad), sr_sinkhorn(grad), **FLOAT32)

    @shapes
    def test_scaling_a_column_changes_nothing_in_the_limit(self, grad):
        scale = torch.rand(1, grad.shape[1], generator=generator(1), dtype=torch.float64) + 0.1
        limit = sr_sinkhorn(grad.double(), num_iters=200)
        assert_close(sr_sinkhorn(scale * grad, num_iters=200), limit, rtol=1e-9, atol=0)

    @shapes
    @pytest.mark.parametrize("exponent", [-100, -40, 40, 100])
    def test_scaling_the_gradient_changes_nothing(self, grad, exponent):
        # 2^±100 is 1e±30
        assert torch.equal(sr_sinkhorn(2.0**exponent * grad), sr_sinkhorn(grad))

    @shapes
    def test_flipping_signs_flips_the_same_signs(self, grad):
        signs = torch.where(torch.rand(grad.shape, generator=generator(1)) < 0.5, -1.0, 1.0)
        assert torch.equal(sr_sinkhorn(signs * grad), signs * sr_sinkhorn(grad))

    @shapes
    def test_exchanging_rows_and_columns_exchanges_those_of_the_update(self, grad):
        rows = torch.randperm(grad.shape[0], generator=generator(1))
        columns = torch.randperm(grad.shape[1], generator=generator(2))
        expected = sr_sinkhorn(grad)[rows][:, columns]
        assert_close(sr_sinkhorn(grad[rows][:, columns]), expected, **FLOAT32)

    @shapes
    def test_signs_and_zeros_are_kept(self, grad):
        grad[torch.rand(grad.shape, generator=generator(1)) < 0.3] = 0
        assert torch.equal(sr_sinkhorn(grad).sign(), grad.sign())

    @shapes
    def test_the_update_is_an_ascent_direction(self, grad):
        assert (grad * sr_sinkhorn(grad)).sum() > 0


class TestErrors:
    @pytest.mark.parametrize("function", [sr_sinkhorn, sinkhorn_scales])
    @pytest.mark.parametrize(
        ("shape", "num_iters", "message"),
        [
            ((), 5, r"needs a matrix, got a tensor of shape \(\)"),
            ((4,), 5, r"needs a matrix, got a tensor of shape \(4,\)"),
            ((4, 4), 0, "num_iters must be at least 1, got 0"),
            ((4, 4), -3, "num_iters must be at least 1, got -3"),
        ],
    )
    def test_errors_name_the_offending_value(self, function, shape, num_iters, message):
        with pytest.raises(ValueError, match=message):
            function(torch.ones(shape), num_iters)

    @pytest.mark.parametrize("function", [sr_sinkhorn, sinkhorn_scales])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_other_than_real_floating_types_are_refused(self, function, dtype):
        name = f"{function.__name__} needs a real floating dtype, got {dtype}"
        with pytest.raises(TypeError, match=name):
            function(torch.ones(4, 4, dtype=dtype))

    @pytest.mark.parametrize("function", [sr_sinkhorn, sinkhorn_scales])
    def test_sparse_gradients_are_refused(self, function):
        with pytest.raises(TypeError, match=r"sparse_coo; use to_dense\(\)"):
            function(torch.eye(4).to_sparse())

    @pytest.mark.parametrize("function", [sr_sinkhorn, sinkhorn_scales])
    def test_an_unknown_backend_is_refused_with_the_known_ones(self, function):
        with pytest.raises(ValueError, match=r"auto, .*eager.*; got 'egaer'"):
            function(torch.eye(4), backend="egaer")

    @shapes
    def test_the_eager_backend_can_be_asked_for(self, grad):
        assert_close(sr_sinkhorn(grad, backend="eager"), sr_sinkhorn(grad), **FLOAT32)
