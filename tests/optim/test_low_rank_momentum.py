"""Momentum of low rank is momentum where the gradients have that rank, and loses no direction."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from one_matrix import heavy, optimizer_of, update_along

LEFT, RIGHT = "momentum_left", "momentum_right"
STEPS = 6


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def updates(grads, **options):
    """Return the updates along some gradients, and the state after them."""
    weight = nn.Parameter(torch.zeros(grads[0].shape))
    weight.grad_dtype = None
    optimizer = optimizer_of(weight, **options)
    return [update_along(grad, optimizer, weight) for grad in grads], optimizer.state[weight]


def memory_of(state):
    return state[LEFT].double() @ state[RIGHT].double()


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (1, 6), (6, 1), (3, 5, 4)], ids=str)
@pytest.mark.parametrize("rank", [9, 20])
def test_at_full_rank_it_is_momentum(shape, rank):
    grads = [normal(shape, seed) for seed in range(STEPS)]
    found, _ = updates(grads, momentum_rank=rank, low_rank_momentum=0.8)
    expected, _ = updates(grads, momentum=0.8)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_gradients_that_share_few_directions_are_averaged_without_loss():
    left, right = normal((9, 3), 1), normal((3, 14), 2)
    grads = [left @ normal((3, 3), 10 + seed) @ right for seed in range(STEPS)]
    _, state = updates(grads, momentum_rank=4, low_rank_momentum=0.8)
    average = torch.zeros(9, 14, dtype=torch.float64)
    for grad in grads:
        average = 0.8 * average + 0.2 * grad.double()
    assert_close(memory_of(state), average, rtol=1e-4, atol=1e-5)


def test_of_a_steady_gradient_the_leading_directions_are_remembered():
    U, S, V = torch.linalg.svd(normal((20, 30), 0).double(), full_matrices=False)
    S = 2.0 ** -torch.arange(20.0).double()
    grad = U @ S.diag() @ V
    _, state = updates([grad.float()] * 40, momentum_rank=4, low_rank_momentum=0.5)
    assert_close(memory_of(state), U[:, :4] @ S[:4].diag() @ V[:4], rtol=1e-3, atol=1e-3)


def test_directions_that_were_missing_come_back():
    one = [normal((9, 1), 1) @ normal((1, 14), 2)] * STEPS
    several = [normal((9, 4), 3) @ normal((4, 14), 4)] * 40
    _, state = updates([*one, *several], momentum_rank=5, low_rank_momentum=0.5)
    assert_close(memory_of(state).float(), several[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "left", "right"),
    [
        ({}, (9, 4), (4, 14)),
        ({"split": 3}, (9, 3), (9, 14)),  # of matrices with three rows
        ({"split": [4, 5]}, (9, 4), (8, 14)),
        ({"layout": "transposed"}, (4, 14), (9, 4)),
        ({"momentum_rank": 30}, (9, 9), (9, 14)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_two_thin_factors_are_kept(options, left, right, dtype):
    weight = nn.Parameter(torch.zeros(9, 14, dtype=dtype))
    optimizer = optimizer_of(weight, **{"momentum_rank": 4, **options})
    for seed in range(2):
        weight.grad = heavy(seed).to(dtype)
        optimizer.step()
    state = optimizer.state[weight]
    assert {key: tuple(x.shape) for key, x in state.items()} == {LEFT: left, RIGHT: right}
    assert {x.dtype for x in state.values()} == {torch.promote_types(dtype, torch.float32)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_gradients_are_averaged_in_float32(dtype):
    grads = [heavy(seed).clamp(-100, 100).to(dtype) for seed in range(STEPS)]
    narrow, _ = updates(grads, momentum_rank=2)
    wide, _ = updates([grad.float() for grad in grads], momentum_rank=2)
    assert all(torch.equal(one, other) for one, other in zip(narrow, wide, strict=True))


def test_a_scale_of_the_loss_that_changes_is_divided_out():
    def run(scales):
        weight = nn.Parameter(torch.zeros(9, 14))
        optimizer = optimizer_of(weight, momentum_rank=2)
        for seed, scale in enumerate(scales):
            weight.grad = heavy(seed) * scale
            optimizer.grad_scale = torch.tensor(scale)
            optimizer.step()
        return weight.detach(), memory_of(optimizer.state[weight])

    for one, other in zip(run([1.0] * 3), run([1024.0, 2.0, 0.5]), strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_another_rank_starts_a_new_memory():
    weight = nn.Parameter(torch.zeros(9, 14))
    optimizer = optimizer_of(weight, momentum_rank=2)
    update_along(heavy(0), optimizer, weight)
    optimizer.param_groups[0]["momentum_rank"] = 3
    found = update_along(heavy(1), optimizer, weight)
    assert torch.equal(found, updates([heavy(1)], momentum_rank=3)[0][0])
    assert optimizer.state[weight][LEFT].shape == (9, 3)
