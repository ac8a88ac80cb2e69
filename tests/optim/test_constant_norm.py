"""Each matrix keeps its Frobenius norm, and the learning rate is relative to it."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import sinkgd
from one_matrix import heavy, optimizer_of
from option_reference import Expected

SHAPE = (12, 14)


def normal(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def walked(start, steps=4, *, grads=heavy, **options):
    """Return the weight after some steps, and its state."""
    weight = nn.Parameter(start.clone())
    optimizer = optimizer_of(weight, **{"lr": 0.1, "constant_norm": True, **options})
    for seed in range(steps):
        weight.grad = grads(seed, start.shape).to(start.dtype)
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


OPTIONS = {
    "alone": {},
    "momentum": {"momentum": 0.9},
    "after": {"momentum": 0.5, "momentum_place": "after"},
    "after, nesterov": {"momentum": 0.5, "momentum_place": "after", "nesterov": True},
    "projected": {"weight_projection": True},
    "deflated, pinned": {"deflated_rank": 2, "operator_norm": "muon"},
    "last row": {"last": "row"},
}
every = pytest.mark.parametrize("name", OPTIONS)


@every
@pytest.mark.parametrize("size", [1e-12, 0.02, 1e12])
def test_steps_are_those_of_the_formula_for_weights_of_any_size(every_backend, name, size):
    start = normal(1) * size
    expected = Expected(start, lr=0.1, constant_norm=True, **OPTIONS[name])
    for seed in range(4):
        expected.step(heavy(seed, SHAPE))
    weight, _ = walked(start, **OPTIONS[name])
    assert_close(weight.double() / size, expected.weight / size, rtol=1e-4, atol=1e-5)
    assert_close(weight.norm(), start.norm(), rtol=1e-6, atol=0)


@every
def test_to_maximize_is_to_descend_along_the_opposite_gradient(name):
    def opposite(seed, shape):
        return -heavy(seed, shape)

    up, _ = walked(normal(1), maximize=True, **OPTIONS[name])
    down, _ = walked(normal(1), grads=opposite, **OPTIONS[name])
    assert_close(up, down, rtol=1e-6, atol=1e-7)


def test_the_rate_is_the_relative_change_of_a_weight():
    start = 0.02 * normal(1)
    weight, _ = walked(start, steps=1, lr=1e-3)
    change = (weight - start).square().mean().sqrt() / start.square().mean().sqrt()
    assert_close(change.item(), 1e-3, rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("options", "shape", "parts"),
    [
        ({"split": 3}, (3, 1), lambda x: x.split(4)),
        ({"split": (2, 10)}, (2, 1), lambda x: x.split((2, 10))),
        ({"layout": "transposed"}, (1, 1), lambda x: [x.T]),
        ({"layout": "transposed", "split": 2}, (1, 2), lambda x: x.T.split(7)),
    ],
    ids=["equal parts", "unequal parts", "transposed", "transposed parts"],
)
@pytest.mark.parametrize("more", [{}, {"momentum": 0.5, "momentum_place": "after"}], ids=str)
def test_each_matrix_of_a_parameter_keeps_its_own_norm(options, shape, parts, more):
    start = normal(1) * torch.logspace(-2, 2, 12).unsqueeze(1)
    fused, state = walked(start, **options, **more)
    assert state["norm"].shape == shape
    for i, (part, first) in enumerate(zip(parts(fused), parts(start), strict=True)):
        single, own = walked(
            first, grads=lambda seed, _, i=i: parts(heavy(seed, SHAPE))[i].contiguous(), **more
        )
        assert_close(part, single, rtol=1e-4, atol=1e-5)
        assert_close(state["norm"].flatten()[i], own["norm"].squeeze())


@pytest.mark.parametrize("more", [{}, {"momentum": 0.5, "momentum_place": "after"}], ids=str)
def test_experts_and_convolutions_keep_the_norm_of_each_matrix(more):
    experts, state = walked(normal(1, (3, 6, 4)), **more)
    assert state["norm"].shape == (3, 1, 1)
    assert_close(experts.norm(dim=(1, 2)), normal(1, (3, 6, 4)).norm(dim=(1, 2)))
    start = normal(2, (6, 4, 3, 3)).contiguous(memory_format=torch.channels_last)
    kernel, state = walked(
        start, grads=lambda seed, shape: heavy(seed, (6, 36)).view(shape), **more
    )
    flat, _ = walked(start.reshape(6, 36), **more)
    assert state["norm"].shape == (1, 1, 1, 1)
    assert_close(kernel.reshape(6, 36), flat, rtol=1e-4, atol=1e-5)


def test_a_matrix_of_zeros_takes_plain_steps_for_good():
    weight, state = walked(torch.zeros(SHAPE), steps=5)
    plain, _ = walked(torch.zeros(SHAPE), steps=5, constant_norm=False)
    assert_close(weight, plain)
    assert state["norm"].eq(0).all()


def test_an_expert_of_zeros_does_so_beside_others():
    start = normal(1, (2, 6, 4))
    start[0] = 0
    experts, _ = walked(start)
    plain, _ = walked(start, constant_norm=False)
    assert_close(experts[0], plain[0])
    assert_close(experts[1].norm(), start[1].norm())


def test_a_zero_gradient_and_a_zero_rate_leave_the_weight_as_it_is():
    still, _ = walked(normal(1), grads=lambda _, shape: torch.zeros(shape))
    assert torch.equal(still, normal(1))
    for lr in (0.0, torch.tensor(0.0)):
        still, state = walked(normal(1), lr=lr)
        assert torch.equal(still, normal(1))
        assert_close(state["norm"].item(), normal(1).norm().item())


def test_a_step_to_zero_is_not_taken():
    weight, _ = walked(torch.full((1, 1), 2.0), steps=1, lr=1.0, grads=lambda *_: torch.ones(1, 1))
    assert weight.item() == 2


def test_norms_are_those_before_the_first_step_not_of_the_start():
    weight = nn.Parameter(normal(1))
    optimizer = optimizer_of(weight, lr=0.1, constant_norm=True)
    optimizer.init_state()
    assert optimizer.state[weight]["norm"].item() == -1
    weight.data.mul_(3)  # as when a checkpoint is loaded
    for seed in range(2):
        weight.grad = heavy(seed, SHAPE)
        optimizer.step()
    assert_close(weight.norm(), 3 * normal(1).norm())


def test_a_bad_first_gradient_leaves_the_norm_unknown():
    weight = nn.Parameter(normal(1))
    group = {"params": [weight], "algorithm": "sinkgd", "constant_norm": True}
    optimizer = sinkgd.SinkGD([group], lr=0.1, nonfinite="skip")
    weight.grad = torch.full(SHAPE, torch.nan)
    optimizer.step()
    assert optimizer.state[weight]["norm"].item() == -1
    assert torch.equal(weight, normal(1))


@every
def test_bfloat16_weights_drift_by_less_than_a_rounding(name):
    start = (0.02 * normal(1)).bfloat16()
    weight, state = walked(start, steps=50, lr=1e-3, rounding="stochastic", **OPTIONS[name])
    assert weight.dtype == torch.bfloat16
    assert state["norm"].dtype == torch.float32
    assert_close(weight.float().norm(), start.float().norm(), rtol=1e-3, atol=0)
    wide, _ = walked(start.float(), steps=50, lr=1e-3, **OPTIONS[name])
    # Each of 50 roundings errs by about 2**-9 of an entry, in a direction of its own.
    assert (weight.float() - wide).norm() < 50**0.5 * 2**-8 * wide.norm()


def test_vectors_are_updated_as_without():
    ones = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    for param, option in zip(ones, (False, True), strict=True):
        optimizer = sinkgd.SinkGDVariant(
            [param], lr=0.1, constant_norm=option, momentum=0.5, momentum_place="after"
        )
        param.grad = torch.arange(1.0, 5)
        optimizer.step()
    assert torch.equal(*ones)
