"""Tiny rows are left out, or are as long as all others."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from one_matrix import heavy, optimizer_of, update_along


def test_they_are_left_alone_and_the_others_scaled_without_them():
    grad = heavy()
    grad[[2, 5]] *= 1e-6
    weight = nn.Parameter(torch.zeros(9, 14))
    update = update_along(grad, optimizer_of(weight, tiny_rows="mask"), weight)
    assert update[[2, 5]].eq(0).all()
    live = [i for i in range(9) if i not in (2, 5)]
    few = nn.Parameter(torch.zeros(7, 14))
    expected = update_along(grad[live], optimizer_of(few), few)
    assert_close(update[live], expected * (9 / 7) ** 0.5)  # columns have the length √9


def test_by_default_they_are_as_long_as_all_others():
    grad = heavy()
    grad[2] *= 1e-6
    weight = nn.Parameter(torch.zeros(9, 14))
    update = update_along(grad, optimizer_of(weight, sinkhorn_iterations=20), weight)
    assert_close(update[2].square().mean().item(), 1.0, rtol=0.1, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_gradient_and_the_average_stay_as_they_were(momentum):
    weight = nn.Parameter(torch.zeros(9, 14))
    options = {"tiny_rows": "mask", "tiny_row_threshold": 0.9, "momentum": momentum}
    optimizer = optimizer_of(weight, **options)
    weight.grad = heavy()
    optimizer.step()
    assert torch.equal(weight.grad, heavy())
    if momentum:
        assert_close(optimizer.state[weight]["momentum_buffer"], heavy() * 0.1)
