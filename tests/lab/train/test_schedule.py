"""The learning rate rises linearly, falls as a cosine, and knows its place from the step alone."""

import itertools
import math

import pytest
import torch

from sinkgd.lab.train.config import TrainingConfig
from sinkgd.lab.train.loop import lr_factor, schedule

STEPS, WARMUP = 50, 5


def factors(**options: float) -> list[float]:
    return [lr_factor(step, steps=STEPS, **options) for step in range(STEPS)]


def test_the_warm_up_rises_by_equal_parts_to_the_peak():
    rising = factors()[:WARMUP]
    assert rising == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_the_cosine_is_half_way_down_in_its_middle_and_ends_at_the_last_step():
    values = lr_factor(9, steps=19, warmup_fraction=1 / 19), lr_factor(18, steps=19)
    assert values == pytest.approx((0.55, 0.1))


def test_the_rate_never_rises_after_the_warm_up():
    falling = factors()[WARMUP - 1 :]
    assert all(later < earlier for earlier, later in itertools.pairwise(falling))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.1, 0.99])
def test_short_runs_have_finite_positive_rates(steps, warmup_fraction):
    for step in range(steps + 1):
        factor = lr_factor(step, steps=steps, warmup_fraction=warmup_fraction)
        assert math.isfinite(factor)
        assert 0 < factor <= 1


def test_without_a_warm_up_the_first_rate_is_near_the_peak():
    assert factors(warmup_fraction=0.0)[0] == pytest.approx(1.0, abs=0.01)


def used_rates(first: int, last: int, optimizer: torch.optim.Optimizer) -> list[list[float]]:
    scheduler = schedule(optimizer, TrainingConfig(steps=STEPS), step=first)
    rates = []
    for _ in range(first, last):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def two_groups() -> torch.optim.Optimizer:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    return torch.optim.SGD([{"params": weights[:1], "lr": 0.3}, {"params": weights[1:]}], lr=0.02)


def test_every_group_follows_its_own_peak():
    expected = [[0.3 * factor, 0.02 * factor] for factor in factors()]
    assert used_rates(0, STEPS, two_groups()) == expected


def test_a_resumed_schedule_continues_exactly():
    whole, resumed = two_groups(), two_groups()
    expected = used_rates(0, STEPS, whole)
    first = used_rates(0, 17, resumed)
    assert first + used_rates(17, STEPS, resumed) == expected
