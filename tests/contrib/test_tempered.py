"""temper: it is its formula, keeps the gradient's size, and no zero makes a NaN."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from reference import tempered
from sinkgd import TemperedSinkGD, temper

SHAPES = [(64, 64), (32, 96), (96, 32), (37, 53), (1, 8), (8, 1)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
# S1, S2 and S3 of the ablation, and one that is nearly linear
SETTINGS = [(0.1, 5), (0.05, 10), (0.2, 3), (100.0, 1)]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@shapes
@pytest.mark.parametrize(("tau", "num_iters"), SETTINGS)
def test_it_is_the_formula_of_rows_columns_and_tanh(shape, tau, num_iters):
    grad = draw(*shape)
    expected = tempered(grad, tau, num_iters, 1e-8)
    assert_close(temper(grad, tau, num_iters).double(), expected, rtol=2e-5, atol=1e-6)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(-12, 12), st.integers(1, 4))
def test_it_is_the_formula_at_every_scale(m, n, exponent, num_iters):
    # sums from about 1e-4 to 1e4 times eps = 1e-8: some are floored and some are not
    grad = draw(m, n) * 2.0**exponent * 1e-8
    expected = tempered(grad, 0.1, num_iters, 1e-8)
    size = expected.abs().max().item()
    assert_close(temper(grad, 0.1, num_iters).double(), expected, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("num_iters", [0, 1, 5])
@pytest.mark.parametrize("shape", [(), (5,), (4, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_gradient_has_a_finite_update(shape, dtype, num_iters):
    largest = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
    assert temper(largest, num_iters=num_iters).isfinite().all()


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_zero_rows_stay_zero_without_a_floor(eps):
    update = temper(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), eps=eps)
    assert update.tolist() == [[1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_update_has_the_size_of_the_gradient(scale):
    grad = draw(24, 40) * scale
    size = (temper(grad) / scale).square().mean().sqrt()
    assert_close(size, (grad / scale).square().mean().sqrt(), rtol=1e-5, atol=0)


def test_flipping_signs_flips_the_same_signs():
    grad = draw(8, 12)
    signs = torch.where(draw(8, 12) < 0, -1.0, 1.0)
    assert torch.equal(temper(signs * grad), signs * temper(grad))


def test_vectors_scalars_and_no_iterations_have_rules_of_their_own():
    vector = draw(9)
    expected = torch.tanh(vector.double() / vector.double().abs().sum() / 0.1)
    assert_close(temper(vector).double(), expected, rtol=1e-5, atol=1e-7)
    assert_close(temper(torch.tensor(0.02)).item(), math.tanh(0.2), rtol=1e-6, atol=0)
    for grad in (vector, draw(5, 7), torch.tensor(-3.0)):
        expected = grad.double() / (grad.double().abs().mean() + 1e-8)
        assert_close(temper(grad, num_iters=0).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_iters", [0, 1, 5])
@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4)])
def test_zeros_stay_zero(shape, num_iters):
    assert temper(torch.zeros(shape), num_iters=num_iters).eq(0).all()


def test_a_zero_row_stays_zero_and_others_are_what_they_are():
    grad = draw(6, 10)
    grad[2] = 0
    update = temper(grad)
    assert update[2].eq(0).all()
    assert_close(update.double(), tempered(grad, 0.1, 5, 1e-8), rtol=2e-5, atol=1e-6)


def test_batched_equals_one_by_one():
    grads = draw(3, 5, 7)
    assert_close(temper(grads), torch.stack([temper(grad) for grad in grads]))


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    grad = draw(16, 24).bfloat16()
    assert torch.equal(temper(grad), temper(grad.float()).bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "tau must be positive and finite, got 0.0"),
        ({"n_iter": -1}, "n_iter must be at least 0, got -1"),
        ({"eps": -1e-8}, "eps must be at least 0 and finite, got -1e-08"),
    ],
)
def test_errors_name_the_option_and_its_value(options, message):
    with pytest.raises(ValueError, match=message):
        TemperedSinkGD([nn.Parameter(draw(2, 2))], **options)


def test_the_defaults_are_those_of_the_ablation():
    (group,) = TemperedSinkGD([nn.Parameter(draw(2, 2))]).param_groups
    found = {name: group[name] for name in ("lr", "weight_decay", "tau", "n_iter", "eps")}
    assert found == {"lr": 3e-4, "weight_decay": 0.1, "tau": 0.1, "n_iter": 5, "eps": 1e-8}


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (2, 4, 6), (3, 2, 2, 2)])
def test_a_step_decays_and_then_descends(shape):
    weight = nn.Parameter(draw(*shape))
    weight.grad = draw(*shape) * 0.3
    before, matrix = weight.detach().clone(), weight.grad.clone()
    if len(shape) > 3:  # a convolution is a matrix of (out, everything else)
        matrix = matrix.flatten(1)
    TemperedSinkGD([weight], lr=0.5).step()
    expected = before * (1 - 0.5 * 0.1) - 0.5 * temper(matrix).reshape(shape)
    assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_the_scale_of_the_loss_is_divided_out():
    steps = []
    for scale in (1.0, 1024.0):
        weight = nn.Parameter(draw(4, 6))
        optimizer = TemperedSinkGD([weight], lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale((weight * draw(4, 6)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(weight.detach().clone())
    assert_close(steps[0], steps[1], rtol=1e-6, atol=1e-7)
