"""orthogonalize: it is the iteration on singular values, and its limit is the polar factor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from reference import newton_schulz, polar_factor
from sinkgd.newton_schulz import orthogonalize

SHAPES = [(16, 16), (8, 24), (24, 8), (7, 11), (1, 8), (8, 1), (1, 1)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


def normal(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def orthogonal(size, seed):
    return torch.linalg.qr(normal((size, size), seed)).Q


@shapes
def test_the_limit_is_the_polar_factor(shape):
    x = normal(shape)
    assert_close(orthogonalize(x, 60), polar_factor(x), rtol=0, atol=1e-12)


@shapes
def test_the_limit_has_orthonormal_rows_or_columns(shape):
    x = orthogonalize(normal(shape), 60)
    gram = x @ x.mT if shape[0] <= shape[1] else x.mT @ x
    assert_close(gram, torch.eye(min(shape), dtype=torch.float64), rtol=0, atol=1e-12)


@shapes
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 6, 9, 11])
def test_each_step_is_one_of_the_iteration_on_the_singular_values(shape, num_steps):
    x = normal(shape)
    assert_close(orthogonalize(x, num_steps), newton_schulz(x, num_steps), rtol=0, atol=1e-12)


def test_five_steps_are_the_default():
    x = normal((8, 24))
    assert torch.equal(orthogonalize(x), orthogonalize(x, 5))


@shapes
def test_singular_values_stay_between_zero_and_one_and_only_grow(shape):
    x = normal(shape)
    before = torch.zeros(min(shape), dtype=torch.float64)
    for num_steps in range(1, 12):
        values = torch.linalg.svdvals(orthogonalize(x, num_steps))
        assert (values <= 1 + 1e-12).all()
        assert (values >= before - 1e-12).all()
        before = values


def test_a_small_singular_value_grows_by_half_a_step():
    x = torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64))
    for num_steps in (1, 2, 10):
        small = orthogonalize(x, num_steps)[1, 1].item()
        assert small == pytest.approx(1e-9 * 1.5**num_steps, rel=1e-6)


@shapes
def test_a_tall_matrix_is_the_transpose_of_a_wide_one(shape):
    x = normal(shape)
    assert_close(orthogonalize(x.mT), orthogonalize(x).mT, rtol=0, atol=1e-12)


def test_rotating_the_matrix_rotates_the_result():
    x, left, right = normal((8, 12)), orthogonal(8, 1), orthogonal(12, 2)
    assert_close(orthogonalize(left @ x @ right), left @ orthogonalize(x) @ right)


@pytest.mark.parametrize("exponent", [-100, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_size_of_the_matrix_does_not_matter(dtype, exponent):
    x = normal((8, 24)).to(dtype)
    assert_close(orthogonalize(2.0**exponent * x), orthogonalize(x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(24, 40), (24, 64), (64, 24)], ids=str)
def test_float32_follows_the_exact_iteration(shape):
    x = normal(shape).float()
    # a dozen products of 1e-7 rounding each, on singular values up to 1
    assert_close(orthogonalize(x, 12).double(), newton_schulz(x, 12), rtol=0, atol=3e-6)


@pytest.mark.parametrize("columns", [12, 24])
@pytest.mark.parametrize("num_steps", [5, 40])
def test_a_singular_matrix_keeps_its_null_space(num_steps, columns):
    x = normal((8, 3)) @ normal((3, columns), seed=1)
    result = orthogonalize(x, num_steps)
    values = torch.linalg.svdvals(result)
    # rounding, 1e-16 of the matrix, may have grown by 1.5 a step
    assert (values[3:] < 1e-15 * 1.5**num_steps).all()
    assert (values[:3] > 0.5).all()


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (0, 4), (4, 0), (0, 3, 4)], ids=str)
def test_zero_and_empty_matrices_stay_as_they_are(shape):
    result = orthogonalize(torch.zeros(shape))
    assert result.shape == shape
    assert result.eq(0).all()


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 3, 7, 5)], ids=["wide", "tall"])
def test_each_matrix_of_a_batch_is_treated_alone(shape):
    x = normal(shape)
    x[0, 1], x[1, 0] = 0, 1e12 * x[1, 0]
    one_by_one = torch.stack([orthogonalize(matrix) for matrix in x.flatten(0, 1)])
    assert_close(orthogonalize(x), one_by_one.view_as(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (8, 16), (16, 8), (4, 100)], ids=str)
def test_the_cost_is_that_of_the_cheaper_way(shape):
    k, length = min(shape), max(shape)
    with FlopCounterMode(display=False) as counter:
        orthogonalize(normal(shape), 5)
    on_matrix, on_gram = 5 * 4 * k**2 * length, 24 * k**3 + 4 * k**2 * length
    assert counter.get_total_flops() == min(on_matrix, on_gram)


def test_the_matrix_is_only_read_and_its_type_kept():
    for dtype in (torch.float32, torch.float64):
        for x in (normal((5, 7)).to(dtype), normal((7, 5)).to(dtype)):
            before = x.clone()
            assert orthogonalize(x).dtype == dtype
            assert torch.equal(x, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_bad_entry_shows_in_the_result(value):
    x = normal((5, 7))
    x[1, 2] = value
    assert not orthogonalize(x).isfinite().all()


@pytest.mark.parametrize("num_steps", [0, -2])
def test_fewer_steps_than_one_are_refused(num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be at least 1, got {num_steps}"):
        orthogonalize(torch.eye(3), num_steps)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 20),
    st.integers(-90, 90),
    st.integers(0, 2**32 - 1),
)
def test_any_matrix_follows_the_iteration_on_its_singular_values(shape, num_steps, exponent, seed):
    x = 2.0**exponent * normal(shape, seed)
    assert_close(orthogonalize(x, num_steps), newton_schulz(x, num_steps), rtol=0, atol=1e-11)
