"""permute: a bijection for every n, another one for every seed and epoch, and well mixed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkgd.lab.data.batches import permute

PRIMES = [2, 3, 5, 7, 11, 97, 1009, 65537]
AROUND_POWERS = [2**k + d for k in (1, 2, 3, 4, 7, 10, 13, 16) for d in (-1, 0, 1)]


@pytest.mark.parametrize("n", sorted({1, 2, 3, 6, 1000, *PRIMES, *AROUND_POWERS}))
def test_every_number_below_n_comes_once(n):
    images = permute(np.arange(n), n, seed=0, epoch=0)
    np.testing.assert_array_equal(np.sort(images), np.arange(n))


@settings(deadline=None)
@given(
    n=st.integers(1, 3000), seed=st.integers(0, 2**70), epoch=st.integers(0, 2**40), data=st.data()
)
def test_it_is_a_bijection_and_acts_on_each_position_alone(n, seed, epoch, data):
    images = permute(np.arange(n), n, seed=seed, epoch=epoch)
    assert set(images.tolist()) == set(range(n))
    some = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), dtype=np.int64)
    np.testing.assert_array_equal(permute(some, n, seed=seed, epoch=epoch), images[some])


@pytest.mark.parametrize("n", [10**9, 2**40 + 1, 2**62])
def test_large_n_costs_no_memory(n):
    positions = np.concatenate([np.arange(1000), np.arange(n - 1000, n)])
    images = permute(positions, n, seed=1, epoch=2)
    assert len(np.unique(images)) == 2000
    assert images.min() >= 0
    assert images.max() < n


def test_the_order_is_the_same_in_every_version():
    # A resumed run relies on it: these numbers may only change with the format of checkpoints.
    positions = np.arange(5)
    assert permute(positions, 10**6, seed=7, epoch=3).tolist() == [
        158132,
        532602,
        476249,
        200330,
        625683,
    ]
    assert permute(positions, 2**45, seed=0, epoch=0).tolist() == [
        31209622060234,
        24394884701929,
        26342242886072,
        25085075360631,
        14582227930026,
    ]


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [
        tuple(permute(np.arange(50), 50, seed=seed, epoch=epoch).tolist())
        for seed in range(10)
        for epoch in range(10)
    ]
    assert len(set(orders)) == 100


def test_every_image_is_as_likely_as_any_other():
    n, trials = 5, 4000
    counts = np.zeros((n, n))
    for seed in range(trials):
        counts[np.arange(n), permute(np.arange(n), n, seed=seed, epoch=0)] += 1
    expected = trials / n
    sigma = (trials * (1 / n) * (1 - 1 / n)) ** 0.5
    assert np.abs(counts - expected).max() < 5 * sigma


def test_neighbors_are_scattered():
    n = 20_000
    images = permute(np.arange(n), n, seed=0, epoch=0)
    # For a random order: displacements average n/3 and successive images do not correlate.
    assert abs(np.abs(images - np.arange(n)).mean() / n - 1 / 3) < 0.01
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(images, np.arange(n))[0, 1]) < 0.03


def test_shape_is_kept():
    assert permute(np.arange(6).reshape(2, 3), 6, seed=0, epoch=0).shape == (2, 3)
    assert permute(np.array(4), 6, seed=0, epoch=0).shape == ()
    assert permute(np.array([], dtype=np.int64), 6, seed=0, epoch=0).shape == (0,)
