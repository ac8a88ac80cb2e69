"""A run of AdamW continues with SinkGD: moments and rates are AdamW's, matrices have no state."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import sinkgd


def a_model(seed=0):
    torch.manual_seed(seed)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    body = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(11, 8), body, nn.Linear(8, 11))


def two_groups(model):
    """The groups of the Hugging Face Trainer: matrices decay, vectors do not."""
    named = [*model.named_parameters()]
    matrices, vectors = (
        [(name, param) for name, param in named if (param.ndim >= 2) == is_matrix]
        for is_matrix in (True, False)
    )
    return [
        {"params": matrices, "weight_decay": 0.5},
        {"params": vectors, "weight_decay": 0.0},
    ]


def trained(model, optimizer, steps=3, first=0):
    generator = torch.Generator().manual_seed(first)
    for _ in range(steps):
        tokens = torch.randint(11, (4, 6), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def by_name(optimizer):
    return {
        name: optimizer.state.get(param, {})
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }


@pytest.mark.parametrize("fused", [False, True])
def test_the_rest_of_the_model_steps_as_adamw_would_and_matrices_have_no_state(fused):
    model = a_model()
    adamw = torch.optim.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.5, fused=fused)
    trained(model, adamw)
    other = copy.deepcopy(model)
    optimizer = sinkgd.from_adamw_state(other, adamw.state_dict())
    matrices = {
        name
        for group in optimizer.param_groups
        if group["algorithm"] == "sinkgd"
        for name in group["param_names"]
    }
    assert len(matrices) == 8
    for name, state in by_name(optimizer).items():
        assert bool(state) == (name not in matrices)
    # The same gradients move everything but the matrices, and vectors' decay, alike.
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        one.grad = torch.randn_like(one)
        two.grad = one.grad.clone()
    for group in adamw.param_groups:
        group["weight_decay"] = 0.0
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    adamw.step()
    optimizer.step()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        if name not in matrices:
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
        else:
            assert not torch.equal(one, two)


def test_rates_decay_betas_and_eps_are_adamws():
    model = a_model()
    options = {"lr": 1e-3, "betas": (0.5, 0.75), "eps": 1e-5}
    adamw = torch.optim.AdamW(two_groups(model), **options)
    optimizer = sinkgd.from_adamw_state(model, adamw.state_dict())
    expected = sinkgd.param_groups(model, adamw_lr=1e-3, weight_decay=0.5, betas=(0.5, 0.75))
    for group, other in zip(optimizer.param_groups, expected, strict=True):
        for option in ("algorithm", "lr", "weight_decay", "betas"):
            assert group.get(option) == other.get(option)
        assert group.get("eps", 1e-5) == 1e-5


RATE_OF_0 = r"AdamW's rate in state_dict is 0 .*schedule: 0\.001\).*Pass adamw_lr"


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_scheduler_continues_its_curve(share):
    model = a_model()
    adamw = torch.optim.AdamW(two_groups(model), lr=1e-3)
    schedule = LambdaLR(adamw, lambda step: share if step == 2 else 1 / (1 + step))
    for _ in range(2):
        adamw.step()
        schedule.step()
    expected = nullcontext() if share else pytest.warns(UserWarning, match=RATE_OF_0)
    with expected:
        optimizer = sinkgd.from_adamw_state(model, adamw.state_dict())
    rates = {group["algorithm"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"sinkgd": 3e-4 * share, "adamw": 1e-3 * share})
    LambdaLR(optimizer, lambda step: 1 / (1 + step), last_epoch=2)
    rates = {group["algorithm"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"sinkgd": 3e-4 / 4, "adamw": 1e-3 / 4})


@pytest.mark.parametrize("passed", [None, 4e-3])
@pytest.mark.parametrize("is_scheduled", [False, True])
@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.25, 0.25), (0.25, 0.5)], ids=str)
def test_a_rate_that_is_passed_replaces_those_of_the_state(passed, is_scheduled, shares):
    model = a_model()
    adamw = torch.optim.AdamW(two_groups(model), lr=1e-3)
    for group, share in zip(adamw.param_groups, shares, strict=True):
        group["lr"] = 1e-3 * share
        if is_scheduled:
            group["initial_lr"] = 1e-3
    if passed is None:
        if shares == (0.0, 0.0):
            with pytest.warns(UserWarning, match="Pass adamw_lr to from_adamw_state"):
                sinkgd.from_adamw_state(model, adamw.state_dict(), adamw_lr=None)
        elif shares[0] != shares[1]:
            with pytest.raises(ValueError, match="pass adamw_lr"):
                sinkgd.from_adamw_state(model, adamw.state_dict(), adamw_lr=None)
        return
    optimizer = sinkgd.from_adamw_state(model, adamw.state_dict(), adamw_lr=passed)
    expected = pytest.approx({"sinkgd": 0.3 * passed, "adamw": passed})
    for key in ("lr", "initial_lr") if is_scheduled else ("lr",):
        assert {group["algorithm"]: group[key] for group in optimizer.param_groups} == expected
    assert all(("initial_lr" in group) == is_scheduled for group in optimizer.param_groups)


@pytest.mark.parametrize("named", [False, True])
def test_names_decide_where_groups_are_not_in_the_order_of_the_model(named):
    model = a_model()
    groups = two_groups(model)
    names = [name for group in groups for name, _ in group["params"]]
    if not named:
        for group in groups:
            group["params"] = [param for _, param in group["params"]]
    adamw = torch.optim.AdamW(groups, lr=1e-3)
    trained(model, adamw)
    if not named:
        with pytest.raises(ValueError, match="2 groups and no names; pass names"):
            sinkgd.from_adamw_state(model, adamw.state_dict())
    optimizer = sinkgd.from_adamw_state(model, adamw.state_dict(), None if named else names)
    params = dict(model.named_parameters())
    for name, state in by_name(optimizer).items():
        if state:
            assert torch.equal(state["exp_avg"], adamw.state[params[name]]["exp_avg"])
            assert float(state["step"]) == 3


def test_the_state_that_was_given_is_not_shared():
    model = a_model()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trained(model, adamw)
    before = copy.deepcopy(adamw.state_dict())
    optimizer = sinkgd.from_adamw_state(model, adamw.state_dict())
    trained(model, optimizer)
    for place, state in adamw.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, before["state"][place][key])


def test_bfloat16_weights_and_frozen_ones_are_taken():
    model = a_model().bfloat16()
    model[0].requires_grad_(requires_grad=False)
    params = [param for param in model.parameters() if param.requires_grad]
    adamw = torch.optim.AdamW(params, lr=1e-2)
    trained(model, adamw)
    optimizer = sinkgd.from_adamw_state(model, adamw.state_dict())
    assert {s["exp_avg"].dtype for s in by_name(optimizer).values() if s} == {torch.bfloat16}
    trained(model, optimizer)


def changed(state_dict, **options):
    for group in state_dict["param_groups"]:
        group.update(options)
    return state_dict


REFUSED = {
    "no state dict": (lambda s: {"state": {}}, "state_dict must be what"),
    "of this package": (lambda s: changed(s, algorithm="adamw"), "call its load_state_dict"),
    "of Lion": (lambda s: s["param_groups"][0].pop("eps") and s, "has no eps and no algorithm"),
    "of SGD": (lambda s: s["param_groups"][0].pop("betas") and s, "has no betas and no algorithm"),
    "of Adam": (lambda s: changed(s, decoupled_weight_decay=False), "saved by torch.optim.Adam,"),
    "amsgrad": (lambda s: changed(s, amsgrad=True), "has amsgrad=True"),
    "fewer": (lambda s: s["param_groups"][0]["params"].pop() and s, "there are 27 names for them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_state_is_refused_and_says_why(name):
    change, said = REFUSED[name]
    model = a_model()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trained(model, adamw)
    with pytest.raises(ValueError, match=said):
        sinkgd.from_adamw_state(model, change(adamw.state_dict()))


def test_groups_at_different_rates_ask_for_one():
    model = a_model()
    groups = two_groups(model)
    groups[0]["lr"] = 1e-4
    adamw = torch.optim.AdamW(groups, lr=1e-3)
    with pytest.raises(ValueError, match=r"different lr \(0.0001, 0.001\); pass adamw_lr"):
        sinkgd.from_adamw_state(model, adamw.state_dict())
    optimizer = sinkgd.from_adamw_state(model, adamw.state_dict(), adamw_lr=1e-3)
    assert {group["lr"] for group in optimizer.param_groups if "betas" in group} == {1e-3}


def test_groups_whose_equal_rates_are_tensors_continue_and_do_not_share_them():
    model = a_model()
    groups = [{**group, "lr": torch.tensor(1e-3)} for group in two_groups(model)]
    adamw = torch.optim.AdamW(groups, lr=torch.tensor(1e-3), foreach=False)
    optimizer = sinkgd.from_adamw_state(model, adamw.state_dict())
    for group in optimizer.param_groups:
        group["lr"].fill_(1.0)
    assert all(float(group["lr"]) == pytest.approx(1e-3) for group in adamw.param_groups)


def test_names_in_a_wrong_order_are_refused_by_their_shapes():
    model = a_model()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trained(model, adamw)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"exp_avg of '.*' has shape .* check the order of names"):
        sinkgd.from_adamw_state(model, adamw.state_dict(), names[::-1])
