"""Averaged scales: steady gradients step as without, and the growth of a step is bounded."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from one_matrix import heavy, optimizer_of, update_along

ROWS, COLUMNS = "row_length", "column_length"


def updates(grads, **options):
    """Return the updates along some gradients, and the state after them."""
    weight = nn.Parameter(torch.zeros(grads[0].shape))
    optimizer = optimizer_of(weight, **options)
    return [update_along(grad, optimizer, weight) for grad in grads], optimizer.state[weight]


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (1, 6), (6, 1), (3, 5, 4)], ids=str)
def test_a_steady_gradient_steps_as_without(shape):
    grads = [heavy(0, shape)] * 4
    found, _ = updates(grads, averaged_scales=0.75)
    expected, _ = updates(grads)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99])
def test_a_gradient_that_is_suddenly_large_makes_a_step_of_bounded_size(beta):
    quiet = [heavy(seed) * 1e-12 for seed in range(3)]
    found, _ = updates([*quiet, heavy(3)], averaged_scales=beta)
    plain, _ = updates([heavy(3)])
    ratio = (found[-1] / plain[0]).nan_to_num(1.0)
    assert ratio.max() <= 1.001 / (1 - beta)


def test_a_gradient_that_is_suddenly_small_makes_a_small_step():
    found, _ = updates([heavy(0), heavy(1) * 1e-6, heavy(2)], averaged_scales=0.9)
    sizes = [float(one.square().mean().sqrt()) for one in found]
    assert sizes[1] < 1e-5
    assert 0.1 < sizes[2] < 10


def test_rows_and_columns_that_were_zero_come_back():
    grad = heavy(0)
    grad[2], grad[:, 5] = 0, 0
    found, state = updates([grad, heavy(1)], averaged_scales=0.75)
    assert not found[0][2].any()
    assert not found[0][:, 5].any()
    assert found[1].isfinite().all()
    assert found[1].ne(0).all()
    # What was not seen before is not mixed with zeros: its first length is this step's.
    _, alone = updates([heavy(1)], averaged_scales=0.75)
    assert_close(state[ROWS][2], alone[ROWS][2], rtol=1e-5, atol=0)
    assert_close(state[COLUMNS][0, 5], alone[COLUMNS][0, 5], rtol=1e-5, atol=0)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_scale_of_the_loss_that_changes_is_divided_out(rank):
    def run(scales):
        weight = nn.Parameter(torch.zeros(9, 14))
        optimizer = optimizer_of(weight, averaged_scales=0.75, momentum_rank=rank)
        for seed, scale in enumerate(scales):
            weight.grad = heavy(seed) * scale
            optimizer.grad_scale = torch.tensor(scale)
            optimizer.step()
        return weight.detach(), optimizer.state[weight][ROWS]

    for one, other in zip(run([1.0] * 3), run([1024.0, 2.0, 0.5]), strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "rows", "columns"),
    [
        ({}, (9, 1), (1, 14)),
        ({"split": 3}, (9, 1), (3, 14)),
        ({"layout": "transposed"}, (1, 14), (9, 1)),
        ({"last": "row"}, (9, 1), (1, 14)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_number_is_kept_for_each_row_and_each_column(options, rows, columns, dtype):
    weight = nn.Parameter(torch.zeros(9, 14, dtype=dtype))
    optimizer = optimizer_of(weight, averaged_scales=0.75, **options)
    for seed in range(2):
        weight.grad = heavy(seed).to(dtype)
        optimizer.step()
    state = optimizer.state[weight]
    assert {key: tuple(x.shape) for key, x in state.items()} == {ROWS: rows, COLUMNS: columns}
    assert {x.dtype for x in state.values()} == {torch.promote_types(dtype, torch.float32)}


@pytest.mark.parametrize("size", [1e-38, 1e-44, 1e38])
def test_gradients_at_the_ends_of_the_range_leave_finite_numbers(size):
    bounded = heavy(0).clamp(-1, 1)
    found, state = updates([bounded * size, bounded, bounded * size], averaged_scales=0.9)
    assert all(one.isfinite().all() for one in found)
    assert all(kept.isfinite().all() for kept in state.values())
    assert math.isfinite(float(found[1].abs().max()))
