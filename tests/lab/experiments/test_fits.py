"""Fits over sizes: known curves are found, and intervals hold the truth as often as they say."""

import numpy as np
import pytest

from sinkgd.lab.experiments.fits import fit_power_law, fit_trend


@pytest.mark.parametrize(("a", "b", "c"), [(2.0, 1.5, 0.3), (0.0, 5.0, 0.07), (1.0, 0.2, 1.1)])
def test_the_fit_finds_the_curve_that_made_the_losses(a, b, c):
    compute = np.array([1e12, 4e12, 2e13, 9e13])
    losses = a + b * (compute / compute[0]) ** -c
    found = fit_power_law(compute, losses)
    assert found.c == pytest.approx(c, rel=0.02)
    assert found.a + found.b == pytest.approx(a + b, abs=2e-3)
    curve = found.a + found.b * (compute / compute[0]) ** -found.c
    assert curve == pytest.approx(losses, abs=2e-3)


def test_the_fit_keeps_the_limit_at_or_above_zero():
    assert fit_power_law([1.0, 10.0, 100.0, 1000.0], [4.0, 3.0, 2.0, 1.0]).a == 0


# As in the study `ladder`: sizes with three and two seeds.
SEEDS = [3, 3, 2, 2]
WEIGHTS = np.repeat([50e3, 113e3, 201e3, 452e3], SEEDS)
STUDIES = 400


@pytest.mark.parametrize("of_size", [0.0, 0.5, 1.0, 2.0], ids=lambda x: f"{x:g}-of-a-seed")
def test_intervals_of_a_trend_hold_the_truth_in_some_95_of_100_studies(of_size):
    """Also if the seeds of a size have an error in common, such as that of its learning rate."""
    draw = np.random.default_rng(1)
    slope, far, held = -0.05, 25e6, [0, 0]  # a model far beyond the sizes
    there = far ** (slope / np.log(2))
    for _ in range(STUDIES):
        noise = draw.normal(size=len(WEIGHTS)) + of_size * np.repeat(draw.normal(size=4), SEEDS)
        found = fit_trend(WEIGHTS, np.exp(slope * np.log2(WEIGHTS) + 0.05 * noise), far=far)
        held[0] += found.doubling_low <= np.exp(slope) <= found.doubling_high
        held[1] += found.far_low <= there <= found.far_high
    assert all(0.92 * STUDIES <= number <= 0.99 * STUDIES for number in held), held


def test_intervals_of_an_exponent_hold_the_truth_in_some_95_of_100_studies():
    draw = np.random.default_rng(1)
    truth, held = 0.15, 0
    compute = (WEIGHTS / WEIGHTS[0]) ** 2
    for _ in range(STUDIES):
        noise = draw.normal(size=len(WEIGHTS))
        found = fit_power_law(compute, 3.2 + 1.1 * compute**-truth + 0.015 * noise)
        held += found.c_low <= truth <= found.c_high
    assert 0.92 * STUDIES <= held <= 0.99 * STUDIES, held
