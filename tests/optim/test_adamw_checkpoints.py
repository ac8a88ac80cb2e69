"""A checkpoint of torch.optim.AdamW goes on where it can, and says what to do where it cannot."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import sinkgd


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in ((5, 4), (4,))]


def step(params, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def saved_by_torch(params, kind=torch.optim.AdamW, **options):
    reference = kind(params, **options)
    for seed in range(3):
        step(params, reference, seed)
    return reference


@pytest.mark.parametrize("fused", [None, False, True])
@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-6}, {"weight_decay": 0.3, "maximize": True}],
    ids=str,
)
def test_groups_of_adamw_go_on(fused, is_named, options):
    theirs = problem()
    reference = saved_by_torch(theirs, fused=fused, **options)
    reference.param_groups[0]["initial_lr"] = 0.5  # as a scheduler leaves it
    ours = deepcopy(theirs)
    given = [(f"p{i}", param) for i, param in enumerate(ours)] if is_named else ours
    group = {"params": given, "algorithm": "adamw", "fused": bool(fused)}
    optimizer = sinkgd.SinkGD([group])
    optimizer.load_state_dict(reference.state_dict())
    for seed in range(3, 6):
        step(theirs, reference, seed)
        step(ours, optimizer, seed)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    own = optimizer.param_groups[0]
    assert own["algorithm"] == "adamw"
    assert own["initial_lr"] == 0.5
    assert not {"amsgrad", "foreach", "capturable", "differentiable"} & own.keys()
    for option, value in options.items():
        assert own[option] == value


def test_what_goes_on_is_saved_and_loaded_as_ours():
    params = problem()
    reference = saved_by_torch(params)
    optimizer = sinkgd.SinkGD([{"params": params, "algorithm": "adamw"}])
    optimizer.load_state_dict(reference.state_dict())
    other = sinkgd.SinkGD([{"params": deepcopy(params), "algorithm": "adamw"}])
    other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("algorithms", "kind", "options", "message"),
    [
        (["sinkgd", "adamw"], torch.optim.AdamW, {}, "Load only the model's weights"),
        (["stateless"], torch.optim.AdamW, {}, "names no algorithm.*torch.optim.AdamW.*stateless"),
        (["spam"], torch.optim.AdamW, {}, "names no algorithm.*'spam'"),
        (["adamw", "adamw"], torch.optim.AdamW, {}, "the same parameters"),
        (["adamw"], torch.optim.AdamW, {"amsgrad": True}, "amsgrad=True"),
        (["adamw"], torch.optim.Adam, {"weight_decay": 0.1}, r"torch.optim.Adam.*\(0.1\)"),
        (["adamw"], torch.optim.SGD, {"momentum": 0.9}, "neither AdamW nor"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_remedy(algorithms, kind, options, message):
    params = problem()
    reference = saved_by_torch(deepcopy(params), kind, **options)
    shares = [params] if len(algorithms) == 1 else [[param] for param in params]
    groups = [{"params": p, "algorithm": a} for p, a in zip(shares, algorithms, strict=True)]
    optimizer = sinkgd.SinkGD(groups)
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match=message) as caught:
        optimizer.load_state_dict(reference.state_dict())
    assert "only the model's weights" in str(caught.value)
    assert str(optimizer.state_dict()) == before


def test_adam_without_decay_is_adamw():
    theirs = problem()
    reference = saved_by_torch(theirs, torch.optim.Adam)
    ours = deepcopy(theirs)
    optimizer = sinkgd.SinkGD([{"params": ours, "algorithm": "adamw", "fused": False}])
    optimizer.load_state_dict(reference.state_dict())
    step(theirs, reference, 3)
    step(ours, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
