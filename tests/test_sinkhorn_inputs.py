"""sr_sinkhorn on every kind of input: any size of number, zeros, any type, bad entries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from reference import square_root_sinkhorn
from sinkgd import sinkhorn_scales, sr_sinkhorn

pytestmark = pytest.mark.usefixtures("every_backend")

# 25 roundings of 1.2e-7: five iterations of two sums, a root and the products of r, c and G
FLOAT32 = {"rtol": 3e-6, "atol": 0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


class TestRange:
    @pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
    def test_tiny_and_huge_gradients_give_the_same_update(self, size):
        grad = normal((37, 53))
        scaled = size * grad
        assert_close(sr_sinkhorn(scaled).double(), square_root_sinkhorn(scaled, 5), **FLOAT32)
        assert_close(sr_sinkhorn(scaled), sr_sinkhorn(grad), **FLOAT32)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_the_largest_finite_numbers_still_count(self, dtype):
        grad = torch.finfo(dtype).max * normal((5, 7)).sign().to(dtype)
        assert_close(sr_sinkhorn(grad), grad.sign(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("size", [1e-150, 1e150])
    def test_float64_keeps_its_own_range(self, size):
        grad = size * normal((7, 5), dtype=torch.float64)
        assert_close(sr_sinkhorn(grad), square_root_sinkhorn(grad, 5), rtol=1e-13, atol=0)

    @pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
    @pytest.mark.parametrize("size", [1e-25, 1e25])
    @pytest.mark.parametrize("which", [[0], [3], [0, 2, 5], list(range(1, 7))], ids=str)
    def test_rows_or_columns_of_very_different_sizes(self, dim, size, which):
        grad = normal((7, 7))
        grad.index_fill_(dim, torch.tensor(which), 0)
        small = size * normal((7, 7), seed=1)
        grad = torch.where(grad == 0, small, grad)
        assert_close(sr_sinkhorn(grad).double(), square_root_sinkhorn(grad, 5), **FLOAT32)

    def test_every_row_and_column_of_its_own_size(self):
        rows = 10.0 ** torch.linspace(-14, 14, 9, dtype=torch.float64)
        grad = (rows[:, None] * normal((9, 8)) * rows[:8].flip(0)).float()
        assert_close(sr_sinkhorn(grad).double(), square_root_sinkhorn(grad, 5), **FLOAT32)

    def test_single_tiny_and_huge_entries(self):
        grad = normal((9, 8))
        grad[2, 3], grad[4, 4], grad[4, 7] = 1e-25, 1e25, 1e-12
        assert_close(sr_sinkhorn(grad).double(), square_root_sinkhorn(grad, 5), **FLOAT32)

    def test_a_nearly_zero_row_counts_as_much_as_any(self):
        grad = normal((16, 24))
        grad[3] *= 1e-20
        assert_close(sr_sinkhorn(grad)[3].norm(), torch.tensor(24**0.5), rtol=1e-2, atol=0)


class TestZeros:
    def test_zero_rows_stay_zero(self):
        grad = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
        assert sr_sinkhorn(grad)[1].eq(0).all()
        assert sr_sinkhorn(torch.zeros(3, 4)).eq(0).all()

    @pytest.mark.parametrize("num_iters", [1, 5])
    @pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
    @pytest.mark.parametrize("live", [1, 4, 8], ids=lambda live: f"{live}-live")
    def test_the_rest_goes_on_without_zero_rows_or_columns(self, dim, live, num_iters):
        grad = normal((9, 9))
        grad.narrow(dim, live, 9 - live).zero_()
        update = sr_sinkhorn(grad, num_iters)
        assert update.narrow(dim, live, 9 - live).eq(0).all()
        assert_close(update.double(), square_root_sinkhorn(grad, num_iters), **FLOAT32)

    def test_a_zero_row_leaves_its_share_to_the_others(self):
        m, n = 6, 10
        grad = normal((m, n))
        grad[2] = 0
        lengths = sr_sinkhorn(grad, num_iters=100).norm(dim=1)
        expected = torch.full((m,), (n * m / (m - 1)) ** 0.5)
        expected[2] = 0
        assert_close(lengths, expected, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
    def test_mostly_zero_rows_or_columns_stand_many_iterations(self, dim):
        # as an embedding's gradient; each iteration moves a factor of 10 between r² and c²
        grad = torch.zeros(40, 40)
        grad.narrow(dim, 0, 4).copy_(normal((40, 40)).narrow(dim, 0, 4))
        update = sr_sinkhorn(grad, num_iters=100)
        assert_close(update.double(), square_root_sinkhorn(grad, 100), rtol=2e-5, atol=0)

    def test_a_zero_row_and_a_zero_column_together(self):
        grad = normal((5, 6))
        grad[1], grad[:, 4] = 0, 0
        assert_close(sr_sinkhorn(grad).double(), square_root_sinkhorn(grad, 5), **FLOAT32)

    @pytest.mark.parametrize("num_iters", [1, 5])
    def test_the_scale_of_nothing_is_zero(self, num_iters):
        grad = normal((5, 6))
        grad[1], grad[:, 4] = 0, 0
        r, c = sinkhorn_scales(grad, num_iters)
        assert r.eq(0).flatten().tolist() == [i == 1 for i in range(5)]
        assert c.eq(0).flatten().tolist() == [j == 4 for j in range(6)]

    @pytest.mark.parametrize("size", [(1, 7), (7, 1), (1, 1)], ids=str)
    def test_a_single_row_or_column_becomes_its_sign(self, size):
        grad = normal(size)
        assert_close(sr_sinkhorn(grad), grad.sign(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (0, 3, 4), (2, 0, 4)], ids=str)
    def test_empty_matrices_give_empty_updates(self, shape):
        grad = torch.empty(shape)
        assert sr_sinkhorn(grad).shape == shape
        r, c = sinkhorn_scales(grad)
        assert r.shape == (*shape[:-1], 1)
        assert c.shape == (*shape[:-2], 1, shape[-1])
        assert r.isfinite().all()
        assert c.isfinite().all()


class TestTensors:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_types_are_rounded_once(self, dtype):
        grad = normal((64, 48)).to(dtype)
        update = sr_sinkhorn(grad)
        assert update.dtype == dtype
        assert torch.equal(update, sr_sinkhorn(grad.float()).to(dtype))

    @pytest.mark.parametrize("size", [6e-8, 6e4], ids=["smallest", "largest"])
    def test_float16_is_not_squared_in_float16(self, size):
        grad = (size * normal((16, 24)).sign()).half()
        assert_close(sr_sinkhorn(grad), grad.sign(), rtol=1e-3, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_scales_are_float32(self, dtype):
        assert {scale.dtype for scale in sinkhorn_scales(normal((5, 7)).to(dtype))} == {
            torch.float32
        }

    def test_scales_of_float64_are_float64(self):
        scales = sinkhorn_scales(normal((5, 7), dtype=torch.float64))
        assert {scale.dtype for scale in scales} == {torch.float64}

    @pytest.mark.parametrize("batch", [(3,), (2, 3), (1, 1, 2)], ids=str)
    def test_batched_equals_one_by_one(self, batch):
        grads = normal((*batch, 5, 7))
        one_by_one = torch.stack([sr_sinkhorn(grad) for grad in grads.flatten(0, -3)])
        assert_close(sr_sinkhorn(grads), one_by_one.view_as(grads), rtol=1e-6, atol=0)

    def test_matrices_of_a_batch_do_not_touch_each_other(self):
        grads = normal((4, 5, 7))
        alone = sr_sinkhorn(grads[0])
        grads[1], grads[2], grads[3] = 0, 1e30, torch.nan
        assert_close(sr_sinkhorn(grads)[0], alone, rtol=1e-6, atol=0)

    def test_strided_gradients_are_read_as_they_are(self):
        whole = normal((14, 20))
        for view in (whole.mT, whole[::2, 1::3], whole[:1].expand(6, 20)):
            assert_close(sr_sinkhorn(view), sr_sinkhorn(view.contiguous()), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("shape", [(5, 7), (7, 5), (1, 8), (8, 1)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_gradient_is_only_read(self, shape, dtype):
        grad = normal(shape, dtype=dtype)
        before = grad.clone()
        sr_sinkhorn(grad)
        sinkhorn_scales(grad)
        assert torch.equal(grad, before)


class TestNonFinite:
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("num_iters", [1, 5])
    @pytest.mark.parametrize("shape", [(5, 7), (1, 7), (7, 1), (1, 1)], ids=str)
    def test_one_bad_entry_shows_in_the_scales(self, value, dtype, num_iters, shape):
        grad = normal(shape).to(dtype)
        grad[-1, -1] = value
        assert not all(scale.isfinite().all() for scale in sinkhorn_scales(grad, num_iters))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
    def test_a_bad_entry_in_a_matrix_of_zeros_shows_in_the_scales(self, value):
        grad = torch.zeros(5, 7)
        grad[2, 3] = value
        assert not all(scale.isfinite().all() for scale in sinkhorn_scales(grad))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
    def test_a_matrix_of_bad_entries_shows_in_the_scales(self, value):
        grad = torch.full((5, 7), value)
        assert not all(scale.isfinite().all() for scale in sinkhorn_scales(grad))

    def test_only_the_bad_matrix_of_a_batch_has_bad_scales(self):
        grads = normal((3, 5, 7))
        grads[1, 2, 3] = torch.inf
        r, c = sinkhorn_scales(grads)
        finite = r.isfinite().flatten(1).all(1) & c.isfinite().flatten(1).all(1)
        assert finite.tolist() == [True, False, True]


# what a result in each type can carry: its relative rounding, and float16's smallest number
TOLERANCES = {
    torch.float64: {"rtol": 1e-13, "atol": 0},
    torch.float32: FLOAT32,
    torch.bfloat16: {"rtol": 2**-8, "atol": 0},
    torch.float16: {"rtol": 2**-10, "atol": 2**-24},
}


@st.composite
def gradients(draw):
    """Gaussian or heavy-tailed matrices of any size and type, some with zeros."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    dtype = draw(st.sampled_from(list(TOLERANCES)))
    exponent = draw(st.integers(-8, 8) if dtype == torch.float16 else st.integers(-80, 80))
    power = draw(st.sampled_from([1, 3]))
    zeros = draw(st.sampled_from([0.0, 0.2, 0.7]))
    seed = draw(st.integers(0, 2**32 - 1))
    entries = normal(shape, seed, torch.float64).pow(power)
    kept = torch.rand(shape, generator=generator(seed)) >= zeros
    return (entries * kept * 2.0**exponent).to(dtype)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(gradients(), st.integers(1, 6))
def test_any_matrix_of_any_type_and_size_gives_the_printed_algorithms_update(grad, num_iters):
    update = sr_sinkhorn(grad, num_iters)
    assert update.dtype == grad.dtype
    expected = square_root_sinkhorn(grad, num_iters)
    assert_close(update.double(), expected, **TOLERANCES[grad.dtype])


@settings(derandomize=True, deadline=None, max_examples=50)
@given(gradients(), st.integers(1, 6))
def test_every_live_column_of_any_matrix_holds(grad, num_iters):
    lengths = sr_sinkhorn(grad.double(), num_iters).norm(dim=0)
    m = grad.shape[0]
    assert_close(lengths, m**0.5 * grad.ne(0).any(0).double(), rtol=1e-12, atol=0)
