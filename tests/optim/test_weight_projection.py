"""Rows of an update are orthogonal to those of the weight, and as long as before."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from one_matrix import heavy, optimizer_of
from option_reference import Expected

SHAPE = (9, 14)


def normal(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def update_at(start, grad, **options):
    """Return the update of a step of lr 1 from a weight, computed in float64 afterwards."""
    weight = nn.Parameter(start.clone())
    optimizer = optimizer_of(weight, **options)
    weight.grad = grad.clone()
    optimizer.step()
    return start.double() - weight.detach().double()


@pytest.mark.parametrize("options", [{}, {"last": "row"}, {"deflated_rank": 2}], ids=str)
def test_rows_are_orthogonal_to_the_weight_and_as_long_as_without(every_backend, options):
    start = normal(1)
    plain = update_at(start, heavy(), **options)
    update = update_at(start, heavy(), weight_projection=True, **options)
    assert_close(update.norm(dim=1), plain.norm(dim=1), rtol=1e-5, atol=0)
    cosines = (update * start).sum(1) / (update.norm(dim=1) * start.norm(dim=1))
    assert cosines.abs().max() < 1e-6


def test_steps_are_those_of_the_formula(every_backend):
    start, options = normal(1), {"lr": 0.1, "sinkhorn_iterations": 2, "weight_projection": True}
    weight, expected = nn.Parameter(start.clone()), Expected(start, **options)
    optimizer = optimizer_of(weight, **options)
    for seed in range(4):
        weight.grad = heavy(seed)
        optimizer.step()
        expected.step(heavy(seed))
    assert_close(weight.detach().double(), expected.weight, rtol=1e-5, atol=1e-5)


def test_the_size_of_a_row_of_the_weight_does_not_matter():
    # The update of a large row is lost in rounding, so only small rows are compared.
    sizes = 10 ** torch.linspace(-30, 30, 9, dtype=torch.float64).unsqueeze(1).float()
    start = normal(1)
    expected = update_at(start, heavy(), weight_projection=True)
    for factor in (sizes, sizes.flip(0)):
        weight = nn.Parameter(start * factor)
        optimizer = optimizer_of(weight, weight_projection=True)
        weight.grad = heavy()
        before = weight.detach().clone()
        optimizer.step()
        small = factor.flatten() < 1e-6
        moved = before[small].double() - weight.detach()[small].double()
        assert_close(moved, expected[small], rtol=1e-5, atol=1e-5)
        assert weight.isfinite().all()


def test_a_row_of_zeros_leaves_the_update_as_it_is_and_a_parallel_row_vanishes():
    start, grad = normal(1), heavy()
    start[2] = 0
    start[5] = -3 * update_at(start, grad)[5].float()
    plain, update = update_at(start, grad), update_at(start, grad, weight_projection=True)
    assert torch.equal(update[2], plain[2])
    assert update[5].eq(0).all()
    assert update.ne(0).any(dim=1).sum() == 8


def test_a_matrix_of_one_column_stays_as_it_is():
    assert update_at(normal(1, (7, 1)), heavy(0, (7, 1)), weight_projection=True).eq(0).all()


@pytest.mark.parametrize("momentum", [{"nesterov": True}, {"momentum_place": "after"}], ids=str)
def test_with_momentum_updates_are_projected_off_the_weight(momentum):
    start = normal(1)
    options = {"momentum": 0.5, "weight_projection": True, **momentum}
    update = update_at(start, heavy(), **options)  # the first average is a multiple of an update
    assert (update * start).sum(1).abs().max() < 1e-4
    assert update.norm(dim=1).min() > 0.1


def test_there_is_no_state():
    weight = nn.Parameter(normal(1))
    optimizer = optimizer_of(weight, weight_projection=True)
    weight.grad = heavy()
    optimizer.step()
    assert not optimizer.state[weight]
