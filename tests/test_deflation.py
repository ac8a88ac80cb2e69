"""Deflation: leading singular values are lowered to the next one, against numpy's decomposition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sinkgd import DeflatedNorm, RowNorm, multi_normalize
from sinkgd.deflation import LEAST_LEVEL, deflate
from sinkgd.optim.param_groups import DEFLATED_RANK
from sinkgd.optim.transforms.deflate import STACKED_ENTRIES

SHAPES = [(16, 16), (8, 24), (24, 8), (7, 11)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


def oracle(x, rank):
    """The definition, by numpy's decomposition into singular values."""
    u, sizes, v = np.linalg.svd(x.numpy().astype(np.float64), full_matrices=False)
    k = min(rank, len(sizes) - 1)
    level = max(sizes[k], LEAST_LEVEL * sizes[0])
    sizes[:k] = np.minimum(sizes[:k], level)
    return torch.from_numpy((u * sizes) @ v)


def with_singular_values(shape, sizes, seed=0):
    """A matrix of random singular vectors."""
    random = np.random.default_rng(seed)
    m, n = shape
    k = min(shape)
    u, _ = np.linalg.qr(random.standard_normal((m, k)))
    v, _ = np.linalg.qr(random.standard_normal((n, k)))
    return torch.from_numpy((u * np.asarray(sizes)) @ v.T)


def standing_out(shape, rank, by, seed=0):
    """A matrix of which ``rank`` singular values are apart from each other and the rest."""
    others = np.linspace(1.5, 0.5, min(shape) - rank)
    return with_singular_values(shape, [*(by ** np.arange(rank, 0, -1)), *others], seed)


# A block power iteration of two rounds mixes directions of similar size. The columns of B are then
# not quite orthogonal, and singular values differ from the columns' lengths: of 3,000 such matrices
# the worst direction ended at 0.39 of the level, the median at 0.90.
MIXED = 1 / 3


@settings(derandomize=True, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 24),
    st.integers(10, 40),
    st.integers(10, 40),
    st.integers(0, 999),
)
def test_whatever_rank_a_matrix_has_no_direction_falls_below_the_next(k, rank, m, n, seed):
    random = torch.Generator().manual_seed(seed)
    left, right = torch.randn(m, rank, generator=random), torch.randn(rank, n, generator=random)
    x = left.double() @ right.double()
    before, after = torch.linalg.svdvals(x), torch.linalg.svdvals(deflate(x, k))
    assert (after <= before * (1 + 1e-9) + 1e-12 * before[0]).all()
    directions = min(k, rank - 1)
    level = max(before[k], LEAST_LEVEL * before[0])
    assert (after[: directions + 1] >= MIXED * level.clamp(max=before[directions])).all()


@pytest.mark.parametrize("rank", range(1, 13))
def test_a_direction_that_appears_changes_little_at_first(rank):
    """Continuity in the rank: a further direction of size ε moves the update by a multiple of ε."""
    norm = DeflatedNorm(4)
    random = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(20, rank + 1, generator=random).double() for _ in range(2))
    before = norm.project(left[:, :-1] @ right[:, :-1].T)
    for size in (1e-3, 1e-6, 1e-9):
        after = norm.project(left[:, :-1] @ right[:, :-1].T + size * left[:, -1:] @ right[:, -1:].T)
        assert (after - before).norm() < 100 * size * before.norm()


@shapes
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_what_stands_out_is_lowered_to_the_next(shape, rank):
    """Those that stand out by more than 2^6 end at the least level."""
    x = standing_out(shape, rank, by=1e3)
    expected = oracle(x, rank)
    error = torch.linalg.matrix_norm(deflate(x, rank) - expected, 2)
    assert error < 2e-3 * torch.linalg.matrix_norm(expected, 2)


@settings(derandomize=True, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 12), st.integers(0, 999))
def test_of_any_matrix_no_direction_grows_and_the_rest_is_kept(m, n, rank, seed):
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = deflate(x, rank)
    before, after = torch.linalg.svdvals(x), torch.linalg.svdvals(y)
    # svdvals itself rounds every value by an ulp or so of the largest one.
    assert (after <= before * (1 + 1e-12) + 1e-15 * before[0]).all()
    k = min(rank, min(m, n) - 1)
    assert torch.linalg.svdvals(x - y)[k:].max() <= 1e-12 * before[0]


def test_it_comes_near_the_exact_one_on_a_spectrum_like_a_gradients():
    x = with_singular_values((128, 352), 1 / np.arange(1, 129))
    exact, found = oracle(x, 15), deflate(x, 15)
    cosine = torch.nn.functional.cosine_similarity(exact.flatten(), found.flatten(), dim=0)
    raw = torch.nn.functional.cosine_similarity(exact.flatten(), x.flatten(), dim=0)
    assert raw < 0.65
    assert cosine > 0.95


def test_how_it_lies_in_memory_does_not_matter():
    x = standing_out((9, 30), 2, by=20.0)
    assert_close(deflate(x.mT.contiguous().mT, 2), deflate(x, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("exponent", [-100, -40, 40, 100])
def test_the_size_of_x_does_not_matter(exponent):
    x = standing_out((9, 30), 2, by=20.0).float()
    norm = DeflatedNorm(2)
    assert torch.equal(norm.project(2.0**exponent * x), norm.project(x))
    assert torch.equal(deflate(2.0**exponent * x, 2), 2.0**exponent * deflate(x, 2))


def test_matrices_of_a_batch_do_not_know_of_each_other():
    x = torch.randn(2, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    whole = deflate(x, 3)
    for i in range(2):
        for j in range(3):
            assert_close(whole[i, j], deflate(x[i, j], 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 99])
def test_matrices_of_fewer_directions_keep_what_they_have(rank):
    random = torch.Generator().manual_seed(0)
    one = torch.outer(torch.randn(8, generator=random), torch.randn(20, generator=random))
    update = DeflatedNorm(rank).project(one)
    assert_close(update, one / one.square().mean().sqrt(), rtol=0, atol=2e-3)
    sizes = torch.linalg.svdvals(deflate(one, rank)) / torch.linalg.matrix_norm(one, 2)
    assert sizes[0] >= LEAST_LEVEL * 0.99
    assert sizes[1] < 1e-6  # rounding errors stay what they are


def test_zero_stays_zero_and_what_is_not_finite_stays_with_its_matrix():
    x = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(0))
    x[0], x[1, 2, 3], x[2, 0, 0] = 0, float("nan"), float("inf")
    y = DeflatedNorm(3).project(x)
    assert (y[0] == 0).all()
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    assert y[3].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1), (0, 5), (5, 0)])
def test_a_single_direction_is_left_as_it_is(shape):
    x = torch.ones(shape)
    assert_close(deflate(x, 8), x)
    assert DeflatedNorm().project(x).shape == x.shape


def test_the_argument_is_only_read():
    x = torch.randn(6, 10)
    copy = x.clone()
    deflate(x, 2)
    DeflatedNorm(2).project(x)
    assert torch.equal(x, copy)


def test_the_projection_is_deflation_at_length_root_mn():
    x = standing_out((8, 24), 2, by=30.0)
    expected = deflate(x, 2)
    expected *= (8 * 24) ** 0.5 / expected.norm()
    assert_close(DeflatedNorm(2).project(x), expected, rtol=1e-12, atol=1e-12)


def test_rows_and_deflation_in_turn_are_what_the_formulas_say():
    """Against a re-statement in numpy of both, as the recipe has them."""
    x = standing_out((8, 24), 2, by=1e3, seed=1)
    rows = x / x.norm(dim=1, keepdim=True)
    expected = oracle(rows, 2)
    expected *= (8 * 24) ** 0.5 / expected.norm()
    update = multi_normalize(x, [RowNorm(), DeflatedNorm(2)], num_iters=1)
    cosine = torch.nn.functional.cosine_similarity(update.flatten(), expected.flatten(), dim=0)
    assert cosine > 0.98


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_that_leaves_nothing_to_do_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}"):
        DeflatedNorm(rank)
    with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}"):
        deflate(torch.ones(2, 2), rank)


@pytest.mark.parametrize("shape", [(128, 128), (128, 352), (512, 512), (37, 100)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_small_matrix_has_the_same_bits_in_any_stack(shape, threads):
    """So that a step has the same bits whoever is beside it."""
    assert shape[0] * shape[1] <= STACKED_ENTRIES
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(9, *shape, generator=torch.Generator().manual_seed(0))
        together = deflate(x, DEFLATED_RANK)
        assert all(
            torch.equal(deflate(own[None], DEFLATED_RANK)[0], y)
            for own, y in zip(x, together, strict=True)
        )
    finally:
        torch.set_num_threads(before)
