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


def test_intervals_hold_the_truth_in_some_95_of_100_studies():
    draw = np.random.default_rng(1)
    # As in the study `ladder`: sizes with three and two seeds, and a model far beyond them.
    weights = np.repeat([50e3, 113e3, 201e3, 452e3], [3, 3, 2, 2])
    truth, slope, studies, held = 0.15, -0.05, 400, [0, 0, 0]
    far = 25e6
    there = far ** (slope / np.log(2))
    for _ in range(studies):
        noise = draw.normal(size=(2, len(weights)))
        values = np.exp(slope * np.log2(weights) + 0.05 * noise[0])
        found = fit_trend(weights, values, far=far)
        held[0] += found.doubling_low <= np.exp(slope) <= found.doubling_high
        held[1] += found.far_low <= there <= found.far_high
        compute = (weights / weights[0]) ** 2
        exponent = fit_power_law(compute, 3.2 + 1.1 * compute**-truth + 0.015 * noise[1])
        held[2] += exponent.c_low <= truth <= exponent.c_high
    assert all(0.92 * studies <= number <= 0.99 * studies for number in held), held
