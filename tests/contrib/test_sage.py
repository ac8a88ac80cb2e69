"""SAGE's rule against the paper's formulas in float64, whole and with its rows in pieces."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing import assert_close

import sinkgd
from spawn import on_ranks

FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}


def draws(shape, count=4):
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 1, shape[-1])  # features of very different sizes
    return [torch.randn(shape, generator=generator) * scale for _ in range(count)]


def optimizer_of(params, **options):
    return sinkgd.SinkGD([{"params": params, "algorithm": "sage", **options}], lr=0.125)


def printed(weight, grads, *, lr=0.125, beta1=0.9, beta2=0.99, eps=1e-8):
    """Equations 2 to 7 of the paper, number by number; a vector is a table of one row."""
    rows, columns = (
        (weight if weight.ndim > 1 else weight[None]).double().tolist(),
        weight.shape[-1],
    )
    momentum = [[0.0] * columns for _ in rows]
    average = [0.0] * columns
    for t, grad in enumerate(grads, start=1):
        g = (grad if grad.ndim > 1 else grad[None]).double().tolist()
        s = [sum(abs(row[j]) for row in g) / len(g) for j in range(columns)]
        average = [beta2 * a + (1 - beta2) * x for a, x in zip(average, s, strict=True)]
        corrected = [a / (1 - beta2**t) for a in average]
        rms = [math.sqrt(sum(x * x for x in xs) / columns) for xs in (corrected, s)]
        for i, row in enumerate(g):
            for j, x in enumerate(row):
                damper = min(rms[0] / (corrected[j] + eps), rms[1] / (s[j] + eps), 1.0)
                ahead = beta1 * momentum[i][j] + (1 - beta1) * x
                rows[i][j] -= lr * damper * math.copysign(1.0, ahead) if ahead else 0.0
                momentum[i][j] = beta2 * momentum[i][j] + (1 - beta2) * x
    return torch.tensor(rows, dtype=torch.float64).reshape(weight.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(9, 5), (1, 6), (7,)])
def test_it_is_the_printed_rule(shape, dtype):
    start, *grads = draws(shape, 40)
    # Every other gradient is about as large as what is left of the one before in the momentum, so
    # that the order in which direction and momentum are computed shows in many signs.
    grads = [grad * (1.0 if t % 2 else 0.1) for t, grad in enumerate(grads)]
    start, grads = start.to(dtype), [grad.to(dtype) for grad in grads]
    weight = nn.Parameter(start.clone())
    optimizer = optimizer_of([weight])
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    assert_close(weight.detach().double(), printed(start, grads), **FLOAT32)


def test_no_entry_moves_further_than_lr():
    weight = nn.Parameter(torch.zeros(9, 5))
    weight.grad = draws((9, 5))[0]
    optimizer_of([weight]).step()
    moved = weight.detach().abs()
    assert moved.max() <= 0.125
    assert moved.min() < 0.5 * 0.125  # the largest feature is damped; by at most √n


def test_a_gradient_that_is_not_finite_leaves_weight_and_state_alone():
    weight = nn.Parameter(torch.zeros(9, 5))
    optimizer = optimizer_of([weight], nonfinite="skip")
    weight.grad = draws((9, 5))[0]
    optimizer.step()
    before = [weight.detach().clone(), *(x.clone() for x in optimizer.state[weight].values())]
    weight.grad = torch.full((9, 5), torch.nan)
    optimizer.step()
    after = [weight.detach(), *optimizer.state[weight].values()]
    assert all(map(torch.equal, before, after))


def test_state_is_one_number_an_entry_and_one_a_column():
    weight = nn.Parameter(torch.zeros(9, 5, dtype=torch.bfloat16))
    weight.grad = draws((9, 5))[0].bfloat16()
    optimizer = optimizer_of([weight])
    optimizer.step()
    found = {key: (x.shape, x.dtype) for key, x in optimizer.state[weight].items()}
    assert found == {
        "exp_avg": ((9, 5), torch.bfloat16),
        "mean_size": ((5,), torch.float32),
        "weight_seen": ((), torch.float32),
    }
    other = optimizer_of([nn.Parameter(torch.zeros(9, 5, dtype=torch.bfloat16))])
    other.load_state_dict(optimizer.state_dict())
    (loaded,) = other.state.values()
    assert all(torch.equal(x, loaded[key]) for key, x in optimizer.state[weight].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (1.0, 0.9)}, r"betas must lie in \[0, 1\), got \(1.0, 0.9\)"),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
    ],
)
def test_errors_name_the_option_and_its_value(options, message):
    with pytest.raises(ValueError, match=message):
        optimizer_of([nn.Parameter(torch.zeros(2, 2))], **options)


def test_a_scalar_has_no_columns():
    with pytest.raises(ValueError, match=r"'parameter 0 of group 0' has shape \(\)\. .* 'ada"):
        optimizer_of([nn.Parameter(torch.tensor(1.0))])


def is_sharded():
    mesh = init_device_mesh("cpu", (2,))
    start, *grads = draws((9, 5))
    weight = nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
    optimizer = optimizer_of([weight])
    for grad in grads:
        weight.grad = distribute_tensor(grad, mesh, [Shard(0)])
        optimizer.step()
    refusal = ""
    try:
        optimizer_of([nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(1)]))])
    except TypeError as error:
        refusal = str(error)
    return weight.detach().full_tensor(), refusal


def test_rows_may_be_sharded_and_columns_are_refused():
    start, *grads = draws((9, 5))
    for weight, refusal in on_ranks(2, is_sharded):
        assert_close(weight.double(), printed(start, grads), **FLOAT32)
        assert "the columns of 'parameter 0 of group 0' are sharded" in refusal
