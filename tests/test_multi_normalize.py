"""multi_normalize: it is Algorithm 1 for any norms, and residuals tell how far it has come."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import reference
from sinkgd import (
    ColumnNorm,
    FrobeniusNorm,
    Norm,
    RowNorm,
    SignNorm,
    SpectralNorm,
    multi_normalize,
    residuals,
    sr_sinkhorn,
)

SINKHORN = [RowNorm(), ColumnNorm()]
STEPS = 60  # enough for Newton-Schulz to converge on the matrices of this file
ORACLES = {
    RowNorm(): reference.row_projection,
    ColumnNorm(): reference.column_projection,
    FrobeniusNorm(): reference.frobenius_projection,
    SignNorm(): reference.sign_projection,
    SpectralNorm(STEPS): reference.spectral_projection,
}
LISTS = {
    "row": [RowNorm()],
    "row-column": SINKHORN,
    "column-row": [ColumnNorm(), RowNorm()],
    "frobenius-row": [FrobeniusNorm(), RowNorm()],
    "row-spectral": [RowNorm(), SpectralNorm(STEPS)],
    "spectral-column-row": [SpectralNorm(STEPS), ColumnNorm(), RowNorm()],
    "row-column-sign": [RowNorm(), ColumnNorm(), SignNorm()],
    "row-twice": [RowNorm(), RowNorm()],
}
every_list = pytest.mark.parametrize("norms", LISTS.values(), ids=LISTS)
SHAPES = [(16, 16), (8, 24), (24, 8), (7, 11), (1, 8), (8, 1)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


def normal(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


class MaxNorm:
    """A user's norm: the largest entry of every row to size 1."""

    def project(self, x):
        return x / x.abs().amax(dim=-1, keepdim=True)


class Counted:
    """A norm that counts how often it was projected on."""

    def __init__(self, norm):
        self.norm, self.count = norm, 0

    def project(self, x):
        self.count += 1
        return self.norm.project(x)


class TestItIsAlgorithm1:
    @every_list
    @shapes
    @pytest.mark.parametrize("num_iters", [1, 3])
    def test_the_projections_take_turns(self, norms, shape, num_iters):
        grad = normal(shape)
        expected = grad
        for _ in range(num_iters):
            for norm in norms:
                expected = ORACLES[norm](expected)
        assert_close(multi_normalize(grad, norms, num_iters), expected, rtol=1e-9, atol=1e-9)

    def test_five_iterations_are_the_default(self):
        grad = normal((7, 11)) ** 3
        assert torch.equal(multi_normalize(grad, SINKHORN), multi_normalize(grad, SINKHORN, 5))

    @every_list
    @shapes
    def test_the_root_mean_square_is_one(self, norms, shape):
        update = multi_normalize(normal(shape, dtype=torch.float32), norms)
        assert_close(update.double().square().mean().item(), 1.0, rtol=1e-6, atol=0)

    @shapes
    @pytest.mark.parametrize("num_iters", [1, 5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_rows_and_columns_are_square_root_sinkhorn(self, shape, num_iters, dtype):
        grad = normal(shape, dtype=dtype)
        rtol = 3e-6 if dtype == torch.float32 else 1e-13
        expected = sr_sinkhorn(grad, num_iters)
        assert_close(multi_normalize(grad, SINKHORN, num_iters), expected, rtol=rtol, atol=0)

    def test_a_norm_of_a_few_lines_takes_part(self):
        assert isinstance(MaxNorm(), Norm)
        grad = normal((7, 11))
        expected = grad / grad.abs().max(dim=1).values.unsqueeze(1)
        assert_close(multi_normalize(grad, [RowNorm(), MaxNorm()]), expected)

    def test_any_sequence_of_norms_will_do(self):
        grad = normal((7, 11))
        expected = multi_normalize(grad, SINKHORN)
        for norms in (tuple(SINKHORN), iter(SINKHORN)):
            assert torch.equal(multi_normalize(grad, norms), expected)
        assert residuals(grad, iter(SINKHORN)) == residuals(grad, SINKHORN)


class TestSWAN:
    """Rows, then the spectral norm, once: √n (W Wᵀ)^(-1/2) W with W the row-normalized gradient."""

    @pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16), (1, 8), (8, 1)], ids=str)
    def test_it_whitens_the_row_normalized_gradient(self, shape):
        grad = normal(shape)
        rows = torch.diag(1 / grad.norm(dim=1)) @ grad * shape[1] ** 0.5
        expected = max(shape) ** 0.5 * reference.polar_factor(rows)
        update = multi_normalize(grad, [RowNorm(), SpectralNorm(STEPS)], num_iters=1)
        assert_close(update, expected, rtol=0, atol=1e-10)

    def test_a_wide_matrix_is_the_papers_formula(self):
        grad = normal((8, 24))
        rows = reference.row_projection(grad)
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        inverse_root = vectors @ torch.diag(values**-0.5) @ vectors.T
        update = multi_normalize(grad, [RowNorm(), SpectralNorm(STEPS)], num_iters=1)
        assert_close(update, 24**0.5 * inverse_root @ rows, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)], ids=str)
    def test_five_steps_are_newton_schulz_on_the_singular_values(self, shape):
        grad = normal(shape)
        whitened = reference.newton_schulz(reference.row_projection(grad), 5)
        expected = reference.frobenius_projection(whitened)
        update = multi_normalize(grad, [RowNorm(), SpectralNorm()], num_iters=1)
        assert_close(update, expected, rtol=0, atol=1e-10)

    def test_float32_is_close_to_the_oracle(self):
        grad = normal((24, 40), dtype=torch.float32)
        expected = reference.spectral_projection(reference.row_projection(grad))
        update = multi_normalize(grad, [RowNorm(), SpectralNorm(20)], num_iters=1)
        assert_close(update.double(), expected, rtol=0, atol=1e-5)


class TestResiduals:
    def test_a_residual_is_the_root_mean_square_of_what_a_projection_would_change(self):
        x = normal((7, 11))
        norms = list(ORACLES)
        values = residuals(x, norms)
        assert len(values) == len(norms)
        for norm, value in zip(norms, values, strict=True):
            expected = (x - ORACLES[norm](x)).norm() / (7 * 11) ** 0.5
            assert_close(value, expected, rtol=1e-9, atol=0)

    def test_a_matrix_by_hand(self):
        # rows of length 5 and 10 where √2 is due: they change by 5 - √2 and 10 - √2
        x = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
        expected = (((5 - 2**0.5) ** 2 + (10 - 2**0.5) ** 2) / 4) ** 0.5
        assert residuals(x, [RowNorm()])[0].item() == pytest.approx(expected, rel=1e-6)

    @shapes
    def test_all_vanish_at_the_fixed_point(self, shape):
        fixed = multi_normalize(normal(shape), SINKHORN, num_iters=300)
        assert all(residual < 1e-10 for residual in residuals(fixed, SINKHORN))

    @pytest.mark.parametrize("shape", [(8, 24), (24, 8), (12, 12)], ids=str)
    def test_rows_and_whitening_reach_a_common_fixed_point(self, shape):
        norms = [RowNorm(), SpectralNorm(STEPS)]
        fixed = multi_normalize(normal(shape), norms, num_iters=1000)
        assert all(residual < 1e-6 for residual in residuals(fixed, norms))

    @shapes
    def test_the_last_norm_holds_after_any_iteration(self, shape):
        for norms in LISTS.values():
            update = multi_normalize(normal(shape), norms, num_iters=1)
            assert residuals(update, norms)[-1] < 1e-9

    def test_they_shrink_from_iteration_to_iteration(self):
        grad = normal((16, 16)) ** 3
        rows = [
            residuals(multi_normalize(grad, SINKHORN, k), SINKHORN)[0].item() for k in range(1, 9)
        ]
        assert rows == sorted(rows, reverse=True)
        assert rows[-1] < rows[0] / 10

    def test_each_matrix_of_a_batch_has_its_own(self):
        x = normal((2, 3, 5, 7))
        row, column = residuals(x, SINKHORN)
        assert row.shape == column.shape == (2, 3)
        alone = residuals(x[1, 2], SINKHORN)
        assert_close(torch.stack((row[1, 2], column[1, 2])), torch.stack(alone))

    def test_narrow_types_are_measured_in_float32(self):
        x = multi_normalize(normal((16, 24)), SINKHORN, 50).bfloat16()
        for residual, expected in zip(
            residuals(x, SINKHORN), residuals(x.double(), SINKHORN), strict=True
        ):
            assert residual.dtype == torch.float32
            assert_close(residual.double(), expected, rtol=1e-4, atol=0)

    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (torch.ones(3), ValueError, r"residuals needs a matrix, got a tensor of shape \(3,\)"),
            (torch.ones(3, 3).int(), TypeError, "residuals needs a real floating dtype"),
        ],
        ids=["vector", "integer"],
    )
    def test_errors_name_the_function_and_the_value(self, x, error, message):
        with pytest.raises(error, match=message):
            residuals(x, SINKHORN)


class TestTolerance:
    def test_it_stops_at_the_first_iteration_within(self):
        grad, tol = normal((16, 24)) ** 3, 1e-4
        stopped = multi_normalize(grad, SINKHORN, num_iters=1000, tol=tol)
        iterations = next(
            k
            for k in range(1, 1000)
            if max(residuals(multi_normalize(grad, SINKHORN, k), SINKHORN)) <= tol
        )
        assert 1 < iterations < 100
        assert torch.equal(stopped, multi_normalize(grad, SINKHORN, iterations))

    def test_it_really_stops(self):
        def projections(**options):
            row = Counted(RowNorm())
            multi_normalize(normal((16, 24)), [row, ColumnNorm()], **options)
            return row.count

        assert projections(num_iters=1000, tol=1e-3) < 20
        assert projections(num_iters=1000) == 1000

    def test_a_tolerance_out_of_reach_does_not_go_beyond_num_iters(self):
        grad = normal((16, 24)) ** 3
        update = multi_normalize(grad, SINKHORN, num_iters=3, tol=1e-30)
        assert torch.equal(update, multi_normalize(grad, SINKHORN, num_iters=3))

    def test_every_norm_and_every_matrix_has_to_hold(self):
        easy, hard = torch.ones(16, 16, dtype=torch.float64), normal((16, 16)) ** 5
        tol = 1e-3
        update = multi_normalize(torch.stack((easy, hard)), SINKHORN, num_iters=1000, tol=tol)
        for residual in residuals(update, SINKHORN):
            assert (residual <= tol).all()
        # the column norm holds from the first iteration on, so it was the rows that were waited for
        assert residuals(multi_normalize(hard, SINKHORN, 1), SINKHORN)[0] > tol


class TestTensors:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @every_list
    def test_narrow_types_are_rounded_once(self, norms, dtype):
        grad = normal((12, 16)).to(dtype)
        update = multi_normalize(grad, norms)
        assert update.dtype == dtype
        assert torch.equal(update, multi_normalize(grad.float(), norms).to(dtype))

    @pytest.mark.parametrize("size", [1e-30, 1e30])
    @every_list
    def test_the_size_of_the_gradient_does_not_matter(self, norms, size):
        grad = normal((12, 16), dtype=torch.float32)
        expected = multi_normalize(grad, norms)
        assert_close(multi_normalize(size * grad, norms), expected, rtol=1e-4, atol=1e-5)

    @every_list
    def test_each_matrix_of_a_batch_is_normalized_alone(self, norms):
        grads = normal((2, 3, 5, 7))
        one_by_one = torch.stack([multi_normalize(grad, norms) for grad in grads.flatten(0, 1)])
        assert_close(multi_normalize(grads, norms), one_by_one.view_as(grads))

    @every_list
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_gradient_is_only_read(self, norms, dtype):
        grad = normal((5, 7)).to(dtype)
        before = grad.clone()
        multi_normalize(grad, norms)
        assert torch.equal(grad, before)

    @every_list
    def test_zero_and_empty_matrices_stay_as_they_are(self, norms):
        assert multi_normalize(torch.zeros(3, 4), norms).eq(0).all()
        for shape in ((0, 4), (4, 0), (0, 3, 4)):
            assert multi_normalize(torch.empty(shape), norms).shape == shape

    @every_list
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
    def test_a_bad_entry_shows_in_the_update(self, norms, value):
        grad = normal((5, 7))
        grad[1, 2] = value
        assert not multi_normalize(grad, norms).isfinite().all()


@pytest.mark.parametrize(
    ("grad", "options", "error", "message"),
    [
        (torch.ones(4), {}, ValueError, r"needs a matrix, got a tensor of shape \(4,\)"),
        (torch.eye(4), {"num_iters": 0}, ValueError, "num_iters must be at least 1, got 0"),
        (torch.eye(4), {"norms": []}, ValueError, "norms must name at least one norm"),
        (torch.eye(4).long(), {}, TypeError, "needs a real floating dtype, got torch.int64"),
        (torch.eye(4).cfloat(), {}, TypeError, "needs a real floating dtype, got torch.complex64"),
        (torch.eye(4).to_sparse(), {}, TypeError, r"sparse_coo; use to_dense\(\)"),
    ],
    ids=["vector", "num_iters", "no-norms", "integer", "complex", "sparse"],
)
def test_errors_name_the_offending_value(grad, options, error, message):
    with pytest.raises(error, match=message):
        multi_normalize(grad, **{"norms": SINKHORN, **options})


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.lists(
        st.sampled_from([RowNorm(), ColumnNorm(), FrobeniusNorm(), SignNorm()]),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 4),
    st.integers(-90, 90),
    st.integers(0, 2**32 - 1),
)
def test_any_list_of_norms_takes_turns_on_any_matrix(shape, norms, num_iters, exponent, seed):
    grad = 2.0**exponent * normal(shape, seed)
    expected = grad
    for _ in range(num_iters):
        for norm in norms:
            expected = ORACLES[norm](expected)
    assert_close(multi_normalize(grad, norms, num_iters), expected, rtol=1e-12, atol=0)
