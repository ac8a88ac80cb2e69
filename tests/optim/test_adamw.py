"""Groups of AdamW are torch's AdamW, bit for bit."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import sinkgd


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_and_state_equal_torch_adamw(fused, maximize, weight_decay):
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "maximize": maximize}
    options |= {"weight_decay": weight_decay, "fused": fused}
    ours = [nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4))]
    theirs = deepcopy(ours)
    optimizer = sinkgd.SinkGD([{"params": ours, "algorithm": "adamw", **options}])
    reference = torch.optim.AdamW(theirs, **options)
    for _ in range(4):
        for own, their in zip(ours, theirs, strict=True):
            own.grad = torch.randn_like(own)
            their.grad = own.grad.clone()
        optimizer.step()
        reference.step()
    for own, their in zip(ours, theirs, strict=True):
        assert torch.equal(own, their)
        assert optimizer.state[own].keys() == reference.state[their].keys()
        for key, value in reference.state[their].items():
            assert torch.equal(optimizer.state[own][key], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    group = {"params": [nn.Parameter(torch.ones(2))], "algorithm": "adamw", **options}
    with pytest.raises(ValueError, match=message):
        sinkgd.SinkGD([group])


def test_a_gradient_of_another_dtype_is_refused_by_name():
    weight = nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
    weight.grad_dtype = None  # any
    weight.grad = torch.ones(4, 3)
    groups = [{"params": [("w", weight)], "algorithm": "adamw"}]
    with pytest.raises(TypeError, match=r"'w' is torch\.bfloat16 and its gradient torch\.float32"):
        sinkgd.SinkGD(groups, lr=0.1).step()
    sinkgd.SinkGD([{**groups[0], "rounding": "stochastic"}], lr=0.1).step()
    assert weight.ne(1).all()
