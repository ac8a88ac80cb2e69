"""The operator norm of an update is pinned, within a percent after twenty steps."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from one_matrix import direction, heavy, optimizer_of, update_along


@pytest.mark.parametrize("last", ["row", "column"])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (1, 6), (6, 1), (40, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_after_twenty_steps_it_is_within_a_percent(shape, dtype, last):
    grad = heavy(3, shape)
    for norm, size in (("unit", 1.0), ("muon", (shape[0] / shape[1]) ** 0.5)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad_dtype = None
        optimizer = optimizer_of(weight, operator_norm=norm, last=last)
        for _ in range(20):
            update = update_along(grad.to(dtype), optimizer, weight)
            largest = torch.linalg.svdvals(update.double())[0].item()
            assert size * (1 - 1e-5) < largest < 3 * size  # the estimate is never above
        assert_close(largest, size, rtol=1e-2, atol=0)


def test_it_is_the_same_direction():
    plain, pinned = nn.Parameter(torch.zeros(9, 14)), nn.Parameter(torch.zeros(9, 14))
    expected = update_along(heavy(), optimizer_of(plain), plain)
    update = update_along(heavy(), optimizer_of(pinned, operator_norm="unit"), pinned)
    assert_close(direction(update), direction(expected))


@pytest.mark.parametrize("options", [{}, {"split": 3}, {"layout": "transposed"}], ids=str)
def test_one_vector_a_matrix_is_kept(options):
    weight = nn.Parameter(torch.zeros(9, 14, dtype=torch.bfloat16))
    optimizer = optimizer_of(weight, operator_norm="unit", **options)
    for seed in range(2):
        weight.grad = heavy(seed).bfloat16()
        optimizer.step()
    (vector,) = optimizer.state[weight].values()
    assert vector.dtype == torch.float32
    assert vector.shape == ((9, 1) if options.get("layout") else (options.get("split", 1), 14))


def test_no_direction_is_lost_where_columns_come_and_go():
    weight = nn.Parameter(torch.zeros(9, 14))
    optimizer = optimizer_of(weight, operator_norm="unit")
    left, right = heavy(), heavy()
    left[:, 7:] = 0
    right[:, :7] = 0
    for _ in range(100):
        update_along(left, optimizer, weight)
    for _ in range(30):
        update = update_along(right, optimizer, weight)
        largest = torch.linalg.svdvals(update.double())[0].item()
        assert 1 - 1e-5 < largest < 3
    assert_close(largest, 1.0, rtol=1e-2, atol=0)


def test_inputs_of_mean_zero_are_no_trap():
    weight = nn.Parameter(torch.zeros(9, 14))
    grad = heavy()
    grad -= grad.mean(dim=1, keepdim=True)
    optimizer = optimizer_of(weight, operator_norm="unit")
    for _ in range(20):
        update = update_along(grad, optimizer, weight)
    assert_close(torch.linalg.svdvals(update.double())[0].item(), 1.0, rtol=1e-2, atol=0)


@pytest.mark.parametrize("kept", [0, 1, 4, 16])
@pytest.mark.parametrize("shape", [(64, 48), (48, 64)], ids=str)
def test_rows_that_the_weight_projection_removes_do_not_shorten_the_update(shape, kept):
    grad, plain = heavy(2, shape), nn.Parameter(torch.zeros(shape))
    start = update_along(grad, optimizer_of(plain), plain)  # rows parallel to those of the update
    start[:kept] = torch.randn(kept, shape[1], generator=torch.Generator().manual_seed(1))
    weight = nn.Parameter(start.clone())
    optimizer = optimizer_of(weight, operator_norm="unit", weight_projection=True, lr=1e-3)
    for _ in range(40):
        weight.data.copy_(start)
        weight.grad = grad.clone()
        optimizer.step()
    moved = (start - weight.detach()).double() / 1e-3
    assert not moved[kept:].any()
    assert torch.linalg.svdvals(moved)[0].item() == pytest.approx(min(kept, 1), rel=2e-2)
