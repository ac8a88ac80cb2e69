"""Norms: each projection is the paper's, attains its dual norm, and has the one length √(mn)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import norm_cases
import reference
import sinkgd
from sinkgd import ColumnNorm, FrobeniusNorm, Norm, RowNorm, SignNorm, SpectralNorm, norms
from sinkgd.optim.methods import multi_normalized

STEPS = 60  # enough for Newton-Schulz to converge on the matrices of this file

# the norm, its projection by an oracle, the norm itself and its dual, as functions of a matrix,
# both in the units that make the projection's length √(mn)
NORMS = {
    "row": (
        RowNorm(),
        reference.row_projection,
        lambda z: z.norm(dim=1).max() / z.shape[1] ** 0.5,
        lambda x: x.norm(dim=1).sum() * x.shape[1] ** 0.5,
    ),
    "column": (
        ColumnNorm(),
        reference.column_projection,
        lambda z: z.norm(dim=0).max() / z.shape[0] ** 0.5,
        lambda x: x.norm(dim=0).sum() * x.shape[0] ** 0.5,
    ),
    "frobenius": (
        FrobeniusNorm(),
        reference.frobenius_projection,
        lambda z: z.norm() / z.numel() ** 0.5,
        lambda x: x.norm() * x.numel() ** 0.5,
    ),
    "sign": (
        SignNorm(),
        reference.sign_projection,
        lambda z: z.abs().max(),
        lambda x: x.abs().sum(),
    ),
    "spectral": (
        SpectralNorm(num_steps=STEPS),
        reference.spectral_projection,
        lambda z: torch.linalg.matrix_norm(z, 2) / max(z.shape) ** 0.5,
        lambda x: torch.linalg.matrix_norm(x, "nuc") * max(x.shape) ** 0.5,
    ),
}
every_norm = pytest.mark.parametrize("name", NORMS)
SCALINGS = ["row", "column", "frobenius"]
SHAPES = [(16, 16), (8, 24), (24, 8), (7, 11), (1, 8), (8, 1), (1, 1)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


def normal(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_every_norm_is_tried():
    classes = [value for value in vars(sinkgd).values() if isinstance(value, type)]
    exported = {one for one in classes if issubclass(one, norms._BuiltIn)}
    assert {*norms._BUILT_IN} == exported
    assert {type(norm) for norm in norm_cases.NORMS.values()} == exported
    assert {type(norm) for norm, *_ in NORMS.values()} == exported - {sinkgd.DeflatedNorm}
    scaling = {type(NORMS[name][0]) for name in SCALINGS}
    assert scaling == {*multi_normalized._SCALING_NORMS} - {SignNorm}
    assert all(isinstance(norm, Norm) for norm, *_ in NORMS.values())


@every_norm
@shapes
def test_the_projection_is_the_oracles(name, shape):
    norm, projection, _, _ = NORMS[name]
    x = normal(shape)
    assert_close(norm.project(x), projection(x), rtol=1e-9, atol=1e-12)


@every_norm
@shapes
def test_the_projection_is_the_point_of_the_unit_ball_most_along_x(name, shape):
    norm, _, value, dual = NORMS[name]
    x = normal(shape)
    p = norm.project(x)
    # ⟨x, z⟩ ≤ dual(x) · norm(z) for every z: who attains it with norm(z) = 1 is the maximizer
    assert_close(value(p).item(), 1.0, rtol=1e-9, atol=0)
    assert_close((x * p).sum(), dual(x), rtol=1e-9, atol=0)


@every_norm
@shapes
def test_the_length_is_the_same_for_all_norms(name, shape):
    m, n = shape
    for x in (normal(shape), normal(shape) ** 5, normal(shape).float()):
        length = NORMS[name][0].project(x).double().norm()
        assert_close(length.item(), (m * n) ** 0.5, rtol=1e-6, atol=0)


@every_norm
@shapes
def test_projecting_twice_is_projecting_once(name, shape):
    norm = NORMS[name][0]
    once = norm.project(normal(shape))
    assert_close(norm.project(once), once, rtol=1e-9, atol=1e-12)


@every_norm
@pytest.mark.parametrize("exponent", [-100, -40, 40, 100])
def test_the_size_of_x_does_not_matter(name, exponent):
    norm, projection, _, _ = NORMS[name]
    x = normal((8, 24)).float()
    scaled = norm.project(2.0**exponent * x)
    # powers of two are exact: equality where the projection is made of divisions alone
    assert_close(scaled, norm.project(x), rtol=1e-5 if name == "spectral" else 0, atol=0)
    assert_close(scaled.double(), projection(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_float32_is_enough_for_any_size(name, size):
    norm, projection, _, _ = NORMS[name]
    x = (size * normal((9, 13))).float()
    assert_close(norm.project(x).double(), projection(x), rtol=1e-6, atol=0)


def test_rows_and_columns_of_very_different_sizes_each_hold():
    x = normal((5, 7)).float()
    x[2] *= 1e-30
    x[3] *= 1e30
    rows, columns = RowNorm().project(x), ColumnNorm().project(x.mT).mT
    assert_close(rows.double(), reference.row_projection(x), rtol=1e-6, atol=0)
    assert_close(columns, rows, rtol=1e-6, atol=0)


@every_norm
def test_the_projection_points_along_x(name):
    x = normal((9, 13))
    assert (x * NORMS[name][0].project(x)).sum() > 0


@pytest.mark.parametrize("name", [*SCALINGS, "sign"])
def test_signs_and_zeros_are_kept(name):
    x = normal((9, 13))
    x[x.abs() < 0.3] = 0
    assert torch.equal(NORMS[name][0].project(x).sign(), x.sign())


@every_norm
def test_each_matrix_of_a_batch_is_projected_alone(name):
    norm = NORMS[name][0]
    x = normal((2, 3, 5, 7))
    one_by_one = torch.stack([norm.project(matrix) for matrix in x.flatten(0, 1)])
    assert_close(norm.project(x), one_by_one.view_as(x), rtol=1e-9, atol=1e-12)


@every_norm
@shapes
def test_nothing_has_no_direction_and_stays_zero(name, shape):
    assert NORMS[name][0].project(torch.zeros(shape)).eq(0).all()


@pytest.mark.parametrize("dim", [0, 1], ids=["row", "column"])
@every_norm
def test_a_zero_row_or_column_stays_zero(name, dim):
    x = normal((5, 7))
    x.select(dim, 2).zero_()
    p = NORMS[name][0].project(x)
    assert p.select(dim, 2).eq(0).all()
    assert p.isfinite().all()


def test_row_and_column_norms_leave_the_rest_of_a_matrix_with_zeros_alone():
    x = normal((5, 7))
    x[2], x[:, 3] = 0, 0
    assert_close(RowNorm().project(x), reference.row_projection(x), rtol=1e-12, atol=0)
    assert_close(ColumnNorm().project(x), reference.column_projection(x), rtol=1e-12, atol=0)


@every_norm
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_bad_entry_shows_in_the_projection(name, value):
    x = normal((5, 7))
    x[1, 2] = value
    assert not NORMS[name][0].project(x).isfinite().all()


@every_norm
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4)], ids=str)
def test_empty_matrices_are_projected_to_empty_ones(name, shape):
    assert NORMS[name][0].project(torch.empty(shape)).shape == shape


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_x_is_only_read_and_its_type_kept(name, dtype):
    x = normal((5, 7)).to(dtype)
    before = x.clone()
    assert NORMS[name][0].project(x).dtype == dtype
    assert torch.equal(x, before)


@every_norm
def test_strided_matrices_are_read_as_they_are(name):
    norm = NORMS[name][0]
    view = normal((14, 20))[::2, 1::3].mT
    assert_close(norm.project(view), norm.project(view.contiguous()), rtol=1e-9, atol=1e-12)


class TestSpectralNorm:
    @pytest.mark.parametrize("num_steps", [1, 3, 5, 12])
    @shapes
    def test_few_steps_are_newton_schulz_at_the_common_length(self, shape, num_steps):
        x = normal(shape)
        expected = reference.frobenius_projection(reference.newton_schulz(x, num_steps))
        projected = SpectralNorm(num_steps=num_steps).project(x)
        assert_close(projected, expected, rtol=1e-9, atol=1e-12)

    def test_five_steps_are_the_default(self):
        x = normal((8, 24))
        assert torch.equal(SpectralNorm().project(x), SpectralNorm(num_steps=5).project(x))

    def test_a_singular_matrix_keeps_the_common_length(self):
        x = normal((8, 3)) @ normal((3, 12), seed=1)
        projected = SpectralNorm(num_steps=STEPS).project(x)
        assert_close(projected.norm().item(), 96**0.5, rtol=1e-9, atol=0)
        # three equal singular values share the length of eight
        expected = torch.tensor([(96 / 3) ** 0.5] * 3, dtype=torch.float64)
        assert_close(torch.linalg.svdvals(projected)[:3], expected, rtol=1e-9, atol=0)

    @pytest.mark.parametrize("num_steps", [0, -1])
    def test_fewer_steps_than_one_are_refused(self, num_steps):
        with pytest.raises(ValueError, match=f"num_steps must be at least 1, got {num_steps}"):
            SpectralNorm(num_steps=num_steps)


@st.composite
def matrices(draw):
    """Matrices of any size without zeros, in float32 or float64."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    scale = 2.0 ** draw(st.integers(-90, 90))
    return (scale * normal(shape, seed=draw(st.integers(0, 2**32 - 1)))).to(dtype)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(matrices(), st.sampled_from([*SCALINGS, "sign"]))
def test_any_matrix_is_projected_as_by_the_oracle(x, name):
    norm, projection, _, _ = NORMS[name]
    rtol = 1e-6 if x.dtype == torch.float32 else 1e-13
    assert_close(norm.project(x).double(), projection(x), rtol=rtol, atol=0)
