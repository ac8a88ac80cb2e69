"""AdamW with 8-bit moments against bitsandbytes' own optimizer, and against torch's AdamW."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing import assert_close

import sinkgd
from sinkgd.contrib import adamw_8bit
from spawn import on_ranks

bnb = pytest.importorskip("bitsandbytes", reason="pip install 'sinkgd[8bit]'")

# A table of 32 blocks, one whose last block is short, one just below the threshold, and a scalar.
SHAPES = [(64, 128), (33, 125), (4095,), ()]
OPTIONS = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def draws(shapes=SHAPES, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def params_of(dtype=torch.float32):
    return [nn.Parameter(x) for x in draws(dtype=dtype)]


def optimizer_of(params, **options):
    return sinkgd.SinkGD([{"params": params, "algorithm": "adamw-8bit", **OPTIONS, **options}])


def train(optimizer, params, steps, first=1, size=1.0):
    for number in range(first, first + steps):
        for param, grad in zip(params, draws(seed=number), strict=True):
            param.grad = (grad * size).to(param.dtype)
        optimizer.step()


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype
        assert torch.equal(value, other[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_and_state_equal_those_of_bitsandbytes(dtype, weight_decay):
    ours, theirs = params_of(dtype), params_of(dtype)
    optimizer = optimizer_of(ours, weight_decay=weight_decay)
    reference = bnb.optim.AdamW8bit(theirs, **{**OPTIONS, "weight_decay": weight_decay})
    train(optimizer, ours, 5)
    train(reference, theirs, 5)
    for own, their in zip(ours, theirs, strict=True):
        assert torch.equal(own, their)
        state = {key: x for key, x in reference.state[their].items() if "qmap" not in key}
        state["step"] = torch.tensor(float(state["step"]))
        assert_same_state(dict(optimizer.state[own]), state)


def test_a_parameter_is_updated_in_parts_with_the_same_bits(monkeypatch):
    whole, parts = params_of(), params_of()
    train(optimizer_of(whole), whole, 3)
    monkeypatch.setattr(adamw_8bit, "CPU_ENTRIES", 2 * adamw_8bit.BLOCK)
    train(optimizer_of(parts), parts, 3)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_it_follows_adamw_within_the_width_of_a_code():
    ours, theirs = params_of(), params_of()
    start = draws()
    reference = torch.optim.AdamW(theirs, **OPTIONS)
    train(optimizer_of(ours), ours, 20)
    train(reference, theirs, 20)
    for own, their, before in zip(ours, theirs, start, strict=True):
        moved = (their - before).square().mean().sqrt()
        assert (own - their).square().mean().sqrt() < 0.02 * moved
    # Those below the threshold are AdamW, up to float32's rounding.
    for own, their in zip(ours[2:], theirs[2:], strict=True):
        assert_close(own, their, rtol=1e-5, atol=1e-6)


def test_maximize_negates_the_gradient():
    up, down = params_of(), params_of()
    train(optimizer_of(up, maximize=True), up, 3, size=-1.0)
    train(optimizer_of(down), down, 3)
    assert all(torch.equal(one, other) for one, other in zip(up, down, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_takes_a_quarter_of_adamws(dtype):
    params = params_of(dtype)
    optimizer = optimizer_of(params)
    train(optimizer, params, 1)
    counted = [sum(x.nbytes for x in optimizer.state[param].values()) - 4 for param in params]
    assert counted == [
        2 * 64 * 128 + 2 * 4 * 32,
        2 * 33 * 125 + 2 * 4 * 17,
        2 * 4 * 4095,
        2 * 4,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_has_the_same_bits(dtype, tmp_path):
    straight, resumed = params_of(dtype), params_of(dtype)
    first, second = optimizer_of(straight), optimizer_of(resumed)
    train(first, straight, 5)
    train(second, resumed, 3)
    torch.save(second.state_dict(), tmp_path / "state.pt")
    third = optimizer_of(resumed, lr=1.0)
    third.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for param in resumed:
        assert_same_state(third.state[param], second.state[param])
    train(third, resumed, 2, first=4)
    assert all(torch.equal(one, other) for one, other in zip(straight, resumed, strict=True))
    for one, other in zip(straight, resumed, strict=True):
        assert_same_state(first.state[one], third.state[other])


def test_a_deep_copy_goes_its_own_way():
    params = params_of()
    optimizer = optimizer_of(params)
    train(optimizer, params, 2)
    other_params, other = copy.deepcopy((params, optimizer))
    before = {key: x.clone() for key, x in optimizer.state[params[0]].items()}
    train(other, other_params, 1)
    assert_same_state(optimizer.state[params[0]], before)
    train(optimizer, params, 1)
    assert all(torch.equal(one, two) for one, two in zip(params, other_params, strict=True))


def test_a_non_finite_gradient_leaves_its_parameter_and_state_and_no_other():
    params, clean = params_of(), params_of()
    optimizer, reference = optimizer_of(params, nonfinite="skip"), optimizer_of(clean)
    train(optimizer, params, 1)
    train(reference, clean, 1)
    before = params[0].detach().clone(), copy.deepcopy(dict(optimizer.state[params[0]]))
    for own, grad in zip(params, draws(seed=2), strict=True):
        own.grad = grad
    for own, grad in zip(clean, draws(seed=2), strict=True):
        own.grad = grad.clone()
    params[0].grad[3, 5] = torch.nan
    optimizer.step()
    reference.step()
    assert torch.equal(params[0], before[0])
    assert_same_state(optimizer.state[params[0]], before[1])
    for own, other in zip(params[1:], clean[1:], strict=True):
        assert torch.equal(own, other)
    assert optimizer.skipped() == {"parameter 0 of group 0": 1}
    params[1].grad = torch.full_like(params[1], torch.inf)
    strict = optimizer_of(params)
    with pytest.raises(sinkgd.NonFiniteGradientError, match="parameter 1 of group 0"):
        strict.step()


def test_zero_gradients_only_decay():
    params, start = params_of(), draws()
    optimizer = optimizer_of(params)
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    for param, before in zip(params, start, strict=True):
        assert_close(param.detach(), before * (1 - 0.001) ** 3, rtol=1e-6, atol=1e-7)


def test_memory_order_does_not_matter():
    plain = nn.Parameter(draws([(64, 128)])[0])
    turned = nn.Parameter(plain.detach().t().contiguous().t())
    for param in (plain, turned):
        optimizer = optimizer_of([param])
        for seed in (1, 2):
            param.grad = draws([(64, 128)], seed)[0]
            optimizer.step()
    assert not turned.is_contiguous()
    assert torch.equal(plain, turned)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 80)
        self.blocks = nn.ModuleList(nn.Linear(80, 80) for _ in range(2))
        self.head = nn.Linear(80, 64)

    def forward(self, tokens):
        x = self.table(tokens)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(x).logsumexp(-1).mean()


def a_model():
    torch.manual_seed(0)
    return Model()


TOKENS = torch.arange(64)


def test_gradients_can_be_released():
    kept, released = a_model(), a_model()
    one, two = (
        sinkgd.SinkGD(sinkgd.param_groups(m, adamw_lr=1e-3, state_bits=8)) for m in (kept, released)
    )
    with sinkgd.GradientRelease(two):
        for _ in range(3):
            one.zero_grad()
            kept(TOKENS).backward()
            one.step()
            released(TOKENS).backward()
            two.step()
    for a, b in zip(kept.parameters(), released.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(param.grad is None for param in released.parameters())


def test_state_bits_changes_the_algorithm_of_adamws_groups_and_nothing_else():
    model = a_model()
    usual = sinkgd.param_groups(model, adamw_lr=1e-5, weight_decay=0.1)
    eight = sinkgd.param_groups(model, adamw_lr=1e-5, weight_decay=0.1, state_bits=8)
    renamed = [{**g, "algorithm": g["algorithm"].replace("adamw-8bit", "adamw")} for g in eight]
    assert renamed == usual
    assert {g["algorithm"] for g in eight} == {"sinkgd", "adamw-8bit"}
    assert "adamw-8bit" in sinkgd.describe_param_groups(model, eight)


def test_an_override_names_it_and_takes_adamws_rate_and_betas():
    groups = sinkgd.param_groups(
        a_model(), adamw_lr=1e-5, weight_decay=0.1, overrides={r"table|head\.weight": "adamw-8bit"}
    )
    (own,) = (g for g in groups if g["algorithm"] == "adamw-8bit")
    assert [name for name, _ in own["params"]] == ["table.weight", "head.weight"]
    assert (own["lr"], own["betas"], own["weight_decay"]) == (1e-5, (0.9, 0.999), 0.1)
    assert {g["algorithm"] for g in groups} == {"sinkgd", "adamw", "adamw-8bit"}


def test_a_run_of_adamw_continues_with_its_moments_encoded():
    model = a_model()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        adamw.zero_grad()
        model(TOKENS).backward()
        adamw.step()
    optimizer = sinkgd.from_adamw_state(model, adamw.state_dict(), state_bits=8)
    for param in (model.table.weight, model.head.bias):
        own, saved = optimizer.state[param], adamw.state[param]
        assert own["step"] == 3
        for number, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
            moment = own[f"state{number}"]
            if moment.dtype == torch.uint8:
                code = bnb.functional.create_dynamic_map(signed=number == "1")
                sizes = own[f"absmax{number}"].repeat_interleave(256).view_as(moment)
                moment = code[moment.int()] * sizes
                largest = sizes.max()
                assert (moment - saved[name]).abs().max() < 0.02 * largest
            else:
                assert torch.equal(moment, saved[name])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"state_bits": 4}, ValueError, "state_bits must be 8, or None .*, got 4"),
        (
            {"state_bits": 8, "overrides": {".": "normalize"}},
            ValueError,
            "state_bits=8 has no effect: no group runs 'adamw-8bit'",
        ),
        ({"overrides": {"table": "adamw8bit"}}, ValueError, "did you mean 'adamw-8bit'"),
    ],
)
def test_what_cannot_be_is_named(options, error, message):
    with pytest.raises(error, match=message):
        sinkgd.SinkGD(sinkgd.param_groups(a_model(), **options))


def test_other_types_of_weights_are_refused():
    with pytest.raises(TypeError, match=r"parameter 0 of group 0.*float64.*'adamw'"):
        optimizer_of([nn.Parameter(torch.ones(3, dtype=torch.float64))])


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[8bit\]'"):
        optimizer_of(params_of())


def refused_on_a_mesh():
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.ones(64, 128), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match=r"parameter 0 of group 0.*on a mesh.*'adamw'"):
        optimizer_of([weight])


def test_a_mesh_is_refused():
    on_ranks(2, refused_on_a_mesh)
