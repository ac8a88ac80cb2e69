"""Meta and fake tensors take steps: their state has the shapes of a real one, as planners need."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sinkgd
from optimizer_cases import OPTIMIZERS, optimizer_of

PLACES = {
    "meta": (nullcontext, "meta"),
    "fake": (FakeTensorMode, "cpu"),
}
OPTIONS = [
    {"warm_start": True},
    {"operator_norm": "unit", "deflated_rank": 2},
    {"weight_projection": True},
    {"constant_norm": True},
    {"momentum_rank": 2, "low_rank_momentum": 0.5},
    {"averaged_scales": 0.5},
    {"deflated_rank": 2, "deflated_start": "kept"},
    {"tol": 0.1},
    {"rounding": "stochastic"},
]
BUILDS = {str(case): case.build for case in OPTIMIZERS} | {
    ", ".join(own): lambda params, own=own, **options: optimizer_of(
        params, "sinkgd", **options, **own
    )
    for own in OPTIONS
}
builds = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
places = pytest.mark.parametrize(("mode", "device"), PLACES.values(), ids=PLACES)


def state_after(build, device, dtype, lr=1e-3):
    """Return the shape and type of all that is kept after two steps, the second without a part."""
    shapes = [(8, 6), (3, 4, 6), (2, 2)]
    params = [nn.Parameter(torch.ones(shape, dtype=dtype, device=device)) for shape in shapes]
    optimizer = build(params, lr=lr)
    for _ in range(2):
        for param in params[:2]:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert optimizer.skipped() == {}
    states = optimizer.state_dict()["state"]
    return {
        (number, name): (value.shape, value.dtype)
        for number, state in states.items()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


@builds
@places
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_state_is_that_of_real_tensors(build, mode, device, dtype):
    with mode():
        found = state_after(build, device, dtype)
    assert found == state_after(build, "cpu", dtype)


@places
def test_a_rate_of_zero_is_no_probe(mode, device):
    with mode():
        assert state_after(sinkgd.SPAM, device, torch.float32, lr=0.0)


@places
def test_values_on_other_devices_are_stepped(mode, device):
    here = nn.Parameter(torch.zeros(4, 3))
    here.grad = torch.ones(4, 3)
    with mode():
        there = nn.Parameter(torch.zeros(4, 3, device=device))
        there.grad = torch.ones_like(there)
    sinkgd.SinkGD([{"params": [here]}, {"params": [there]}], lr=0.1).step()
    assert here.any()


@builds
def test_a_model_made_on_the_meta_device_is_trained_once_it_has_values(build):
    model = nn.Linear(6, 8, bias=False, device="meta")
    optimizer = build(list(model.parameters()), lr=1e-3)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    model.to_empty(device="cpu").weight.data.zero_()
    optimizer.param_groups[0]["params"] = [*model.parameters()]
    model.weight.grad = torch.eye(8, 6)
    optimizer.step()
    assert model.weight.any()


@places
def test_gradients_are_released(mode, device):
    with mode():
        model = nn.Linear(4, 3, device=device)
        optimizer = sinkgd.SinkGD(model.parameters(), lr=0.1)
        release = sinkgd.GradientRelease(optimizer)
        model(torch.ones(2, 4, device=device)).sum().backward()
        optimizer.step()
        release.remove()
    assert model.weight.grad is None
