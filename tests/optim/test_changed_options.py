"""Options that are changed after construction, or by loading, are checked before a step writes."""

import copy
import io
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import sinkgd
from one_matrix import heavy
from optim.test_arguments import CASES, NEEDS, VALUES, build

# Rates are left to schedulers, and norms cannot be changed.
LATER = [case for case in CASES if case[1] not in ("lr", "norms")]


def stepped(name, **options):
    """Return an optimizer of two matrices after a step, with gradients for the next one."""
    params = [nn.Parameter(heavy(i)) for i in range(2)]
    optimizer = build(name, params, **options)
    for i, param in enumerate(params):
        param.grad = heavy(i + 2)
    optimizer.step()
    return optimizer, params


def frozen(optimizer):
    """Return the weights and the state of an optimizer."""
    params = optimizer.param_groups[0]["params"]
    states = [dict(optimizer.state.get(param, {})) for param in params]
    return copy.deepcopy(([param.detach() for param in params], states))


def assert_same(before, after):
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "option"), LATER)
def test_a_value_out_of_range_is_refused_at_the_next_step(name, option):
    optimizer, _ = stepped(name, **NEEDS.get(option, {}))
    (group,) = optimizer.param_groups
    if option not in group:
        pytest.skip("an argument that makes the norms")
    good, before = group[option], frozen(optimizer)
    bad = VALUES[option][2]
    group[option] = "no" if bad is None else bad
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=rf"^group 0 was .*\b{option}\b"):
            optimizer.step()
    assert_same(before, frozen(optimizer))
    group[option] = good
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({"constant_norm": True}, {"weight_decay": 0.1}, "constant_norm=True keeps the norm"),
        (
            {"momentum": 0.5, "momentum_place": "after", "momentum_bits": 8},
            {"momentum_place": "before"},
            "momentum_bits=8 needs an average of updates, and the group of 'parameter 0 of group 0",
        ),
        ({"weight_decay": 0.1}, {"weight_decay": float("nan")}, "weight_decay must be at least 0"),
        ({"deflated_rank": 2, "deflated_start": "kept"}, {"split": 3}, "split was 1, now 3; build"),
        (
            {"operator_norm": "unit"},
            {"layout": "transposed"},
            "layout was 'auto', now 'transposed'",
        ),
        ({}, {"algorithm": "adamw"}, "algorithm was 'stateless', now 'adamw'; build a new"),
        ({}, {"algorithm": "sinkgdd"}, "algorithm was 'stateless', now 'sinkgdd'; build a new"),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_the_next_step(options, changes, words):
    optimizer, _ = stepped("SinkGDVariant", **options)
    before = frozen(optimizer)
    optimizer.param_groups[0].update(changes)
    with pytest.raises(ValueError, match=rf"^group 0 was changed: .*{words}"):
        optimizer.step()
    assert_same(before, frozen(optimizer))


@pytest.mark.parametrize("exchanges", [False, True])
def test_another_algorithm_is_refused_where_a_parameter_changed_its_dtype_too(exchanges):
    params = [nn.Parameter(heavy(i)) for i in range(2)]
    optimizer = sinkgd.SinkGD([{"params": params, "algorithm": "sinkgd"}], lr=0.1)
    if exchanges:
        params[0].data = params[0].data.bfloat16()
        params[0].grad = heavy().bfloat16()
        optimizer.step()
    optimizer.param_groups[0]["algorithm"] = "stateless"
    with pytest.raises(ValueError, match="group 0 was changed: algorithm was 'sinkgd', now"):
        optimizer.step()


def test_an_option_that_was_deleted_is_named():
    optimizer, _ = stepped("SinkGD")
    del optimizer.param_groups[0]["nonfinite"]
    with pytest.raises(ValueError, match="group 0 has lost its nonfinite"):
        optimizer.step()


def test_keys_of_others_and_rates_are_left_alone(monkeypatch):
    optimizer, _ = stepped("SinkGD")
    (group,) = optimizer.param_groups
    calls = []
    monkeypatch.setattr("sinkgd.optim.parameters.check_param", lambda *args: calls.append(args))
    for step in range(3):
        group["mine"], group["count"], group["lr"] = np.arange(step + 2), step, -0.1 * step
        optimizer.step()
    assert not calls
    group["lr"], group["weight_decay"] = torch.tensor(0.1, device="meta"), 0.1
    optimizer._begin_step()  # does not read the rate, which has no value
    assert len(calls) == 1


@pytest.mark.parametrize("shape", [(9, 14), (9, 9)], ids=str)
@pytest.mark.parametrize("last", ["row", "column"])
def test_kept_scales_are_forgotten_where_last_was_changed(last, shape):
    def update(optimizer, weight, seed):
        weight.data.zero_()
        weight.grad = heavy(seed, shape)
        optimizer.step()
        return weight.detach().clone()

    def begun(side):
        weight = nn.Parameter(torch.zeros(shape))
        options = {"warm_start": True, "sinkhorn_iterations": 1}
        return sinkgd.SinkGDVariant([weight], lr=0.1, last=side, **options), weight

    optimizer, weight = begun(last)
    update(optimizer, weight, 0)
    other = "row" if last == "column" else "column"
    optimizer.param_groups[0]["last"] = other
    torch.testing.assert_close(update(optimizer, weight, 1), update(*begun(other), 1))
    name = {"row": "row_scale", "column": "col_scale"}[other]
    assert set(optimizer.state[weight]) == {name}


def test_only_the_group_that_was_changed_is_named_and_none_is_updated():
    params = [nn.Parameter(heavy(i)) for i in range(2)]
    optimizer = sinkgd.SinkGD([{"params": [param], "lr": 0.1} for param in params])
    for param in params:
        param.grad = heavy(5)
    optimizer.param_groups[1]["rounding"] = "random"
    with pytest.raises(ValueError, match="group 1 was changed: rounding must be one of"):
        optimizer.step()
    assert all(torch.equal(param, heavy(i)) for i, param in enumerate(params))


def test_an_option_is_checked_where_a_parameter_was_exchanged_too():
    optimizer, params = stepped("SinkGD")
    fresh = nn.Parameter(params[0].detach().clone())
    fresh.grad = heavy(7)
    optimizer.param_groups[0]["params"][0] = fresh
    optimizer.param_groups[0]["nonfinite"] = "rise"
    before = frozen(optimizer)
    with pytest.raises(ValueError, match="group 0 was changed: nonfinite must be one of"):
        optimizer.step()
    assert_same(before, frozen(optimizer))


def test_stochastic_rounding_can_be_switched_on_later():
    param = nn.Parameter(heavy().bfloat16())
    optimizer = sinkgd.SinkGD([param], lr=0.1)
    for rounding in ("nearest", "stochastic"):
        optimizer.param_groups[0]["rounding"] = rounding
        param.grad = heavy(1).bfloat16()
        optimizer.step()
    assert optimizer.param_groups[0]["rounding_step"] == 1


RESIZED = [
    ({"deflated_rank": 3, "deflated_start": "kept"}, {"deflated_rank": 2}),
    ({"deflated_rank": 2, "deflated_start": "kept"}, {"deflated_rank": 8}),
    ({"momentum_rank": 2}, {"momentum_rank": 4}),
    ({"momentum_rank": 4}, {"momentum_rank": 2}),
    ({"warm_start": True}, {"last": "row"}),
]


@pytest.mark.parametrize(("options", "changes"), RESIZED, ids=str)
@pytest.mark.parametrize("loads", [False, True])
def test_a_rank_that_was_changed_can_be_saved_loaded_and_stepped(options, changes, loads):
    optimizer, params = stepped("SinkGDVariant", **options)
    optimizer.param_groups[0].update(changes)
    if loads:
        optimizer.load_state_dict(optimizer.state_dict())
        fresh = [nn.Parameter(param.detach().clone()) for param in params]
        other = build("SinkGDVariant", fresh, **options | changes)
        other.load_state_dict(optimizer.state_dict())
        for param, own in zip(fresh, params, strict=True):
            param.grad = own.grad.clone()
        other.step()
    optimizer.step()
    assert all(param.isfinite().all() for param in params)
    for param in params:
        param.data = param.data.double()
        param.grad = heavy().double()
    optimizer.step()


def test_kept_directions_of_another_number_of_columns_are_still_refused():
    optimizer, _ = stepped("SinkGDVariant", deflated_rank=3, deflated_start="kept")
    other = [nn.Parameter(torch.zeros(9, 15)) for _ in range(2)]
    loading = build("SinkGDVariant", other, deflated_rank=3, deflated_start="kept")
    with pytest.raises(ValueError, match="leading_directions was saved with another shape"):
        loading.load_state_dict(optimizer.state_dict())


def test_momentum_can_be_switched_on_while_resuming():
    optimizer, params = stepped("SinkGD")
    resumed = sinkgd.SinkGD(params, lr=0.1, momentum=0.9)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.param_groups[0]["momentum"] = 0.9
    resumed.step()
    assert "momentum_buffer" in resumed.state[params[0]]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SinkGD", {"lr": np.float64(0.1), "deflated_rank": np.int64(3)}),
        ("SinkGD", {"lr": Fraction(1, 10), "seed": np.int64(3), "rounding": "stochastic"}),
        ("SinkGD", {"lr": np.float32(0.1), "momentum": np.float32(0.5)}),
        ("SPAM", {"lr": 0.1, "betas": (np.float64(0.5), np.float64(0.75))}),
    ],
    ids=str,
)
def test_numbers_of_other_libraries_become_pythons(name, options):
    optimizer, params = stepped(name, **options)
    optimizer.param_groups[0]["lr"] = np.float64(0.05)  # as a scheduler may set it
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    resumed = build(name, params, **options)
    resumed.load_state_dict(loaded)
    assert type(resumed.param_groups[0]["lr"]) is float


@pytest.mark.parametrize(
    ("algorithm", "dtype", "other"),
    [
        ("adamw", torch.bfloat16, torch.float32),
        ("adamw", torch.float32, torch.bfloat16),
        ("spam", torch.bfloat16, torch.float32),
        ("adamw-spam", torch.bfloat16, torch.float32),
    ],
)
def test_a_gradient_of_another_dtype_is_refused_before_any_group_is_updated(
    algorithm, dtype, other
):
    check_gradients_of_another_dtype(algorithm, dtype, other)


def test_a_gradient_of_another_dtype_is_refused_by_8_bit_moments():
    pytest.importorskip("bitsandbytes")
    check_gradients_of_another_dtype("adamw-8bit", torch.bfloat16, torch.float32)


def check_gradients_of_another_dtype(algorithm, dtype, other):
    params = [nn.Parameter(heavy(i).to(dtype)) for i in range(2)]
    optimizer = sinkgd.SinkGD(
        [{"params": [(f"w{i}", p)], "algorithm": algorithm} for i, p in enumerate(params)], lr=0.1
    )
    params[1].grad_dtype = None
    params[0].grad, params[1].grad = heavy(3).to(dtype), heavy(4).to(other)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"'w1' is .* and its gradient .* needs one dtype"):
            optimizer.step()
    assert all(torch.equal(p, heavy(i).to(dtype)) for i, p in enumerate(params))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (torch.zeros(4, 8).to(torch.float8_e4m3fn), TypeError, "torch.float8_e4m3fn"),
        (torch.zeros(1, 8).expand(4, 8), ValueError, r"shape is \(4, 8\), its strides are \(0, 1"),
        (torch.zeros(20).as_strided((4, 8), (2, 1)), ValueError, "share memory"),
    ],
    ids=["float8", "expanded", "overlapping"],
)
@pytest.mark.parametrize("algorithm", ["sinkgd", "adamw", "stateless"])
def test_weights_that_no_step_can_write_are_refused_by_name(algorithm, weight, error, words):
    group = {"params": [("w", nn.Parameter(weight))], "algorithm": algorithm}
    with pytest.raises(error, match=rf"'w'.*{words}|{words}.*'w'"):
        sinkgd.SinkGD([group], lr=0.1)
    frozen_group = {**group, "params": [("w", nn.Parameter(weight, requires_grad=False))]}
    sinkgd.SinkGD([frozen_group], lr=0.1)  # is never written
