"""Stochastic rounding: right in the mean, decided by seed and step, and it goes on as saved."""

import copy
import io

import pytest
import torch
from torch import nn

import sinkgd
from optimizer_cases import optimizer_of
from sinkgd.kernels.rounding import keys_of_step, random_bits, round_to_bfloat16
from sinkgd.optim.methods import METHODS

ALGORITHMS = [name for name, method in METHODS.items() if "rounding" in method.options]
every = pytest.mark.parametrize("algorithm", ALGORITHMS)


def build(params, algorithm, **options):
    return optimizer_of(params, algorithm, **{"rounding": "stochastic", **options})


def a_weight(seed=0, shape=(24, 40), dtype=torch.bfloat16):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def walk(weight, optimizer, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 + step)
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()
    return weight


def test_only_methods_that_leave_the_step_to_others_have_no_rounding():
    assert {*METHODS} - {*ALGORITHMS} == {"spam", "adamw-spam", "adamw-8bit"}


class TestBits:
    def test_the_mean_over_many_draws_is_the_number(self):
        draws = 1 << 20
        for share in (0.01, 0.37, 0.5, 0.93):
            x = torch.full((draws,), 1 + share * 2.0**-7)
            up = (round_to_bfloat16(x, torch.tensor(5)) > 1).double().mean().item()
            lower = (x[0].view(torch.int32) & 0xFFFF).item() / 65536  # what is asked for, exactly
            assert abs(up - lower) < 5 * (lower * (1 - lower) / draws) ** 0.5

    def test_the_mean_over_many_keys_is_the_number_at_every_place(self):
        steps = 4096
        x = torch.linspace(1, 1 + 2.0**-7, 66)[1:-1]
        rounded = [
            round_to_bfloat16(x, keys_of_step(7, torch.tensor(step), 1)[0]).double()
            for step in range(steps)
        ]
        lower = (x.view(torch.int32) & 0xFFFF).double() / 65536
        spread = 2.0**-7 * (lower * (1 - lower) / steps).sqrt()
        assert ((torch.stack(rounded).mean(0) - x.double()).abs() < 5 * spread + 1e-12).all()

    def test_neighbors_and_successive_steps_are_uncorrelated(self):
        bits = [
            random_bits(torch.Size((1 << 16,)), keys_of_step(0, torch.tensor(step), 2)[number])
            for step, number in ((0, 0), (1, 0), (0, 1))
        ]
        first = bits[0].double() - 32767.5
        others = [bits[1], bits[2], bits[0].roll(1), bits[0].roll(64)]
        for other in others:
            correlation = (first * (other.double() - 32767.5)).mean() / (65536**2 / 12)
            assert abs(correlation) < 5 / 256  # five standard errors of 2^16 pairs

    def test_what_is_a_bfloat16_already_stays(self):
        x = torch.randn(1000).bfloat16()
        x[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
        rounded = round_to_bfloat16(x.float(), torch.tensor(3))
        assert torch.equal(rounded.isnan(), x.isnan())
        assert torch.equal(rounded.nan_to_num(), x.nan_to_num())

    def test_a_number_goes_to_one_of_the_two_beside_it(self):
        x = torch.randn(10_000)
        rounded = round_to_bfloat16(x, torch.tensor(11)).float()
        assert ((rounded - x).abs() < 2.0**-7 * x.abs()).all()
        assert (rounded > x).any()
        assert (rounded < x).any()


@pytest.mark.filterwarnings("ignore:.*rounding to the nearest loses")
@every
def test_updates_below_half_a_unit_are_not_lost(algorithm):
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = build([weight], algorithm, lr=2.0**-12)
    for _ in range(64):
        weight.grad = -torch.ones_like(weight)
        optimizer.step()
    # The update of equal entries is 1 for each, so 64 steps move by 64 / 4096, two units above 1.
    # SWAN's keeps that in its mean square alone: of a rank-one gradient all are equal too.
    spread = 2.0**-7 * (64 * 0.25 / weight.numel()) ** 0.5
    assert abs(weight.double().mean().item() - (1 + 64 * 2.0**-12)) < 5 * spread
    lost = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    lost.grad = -torch.ones_like(lost)
    build([lost], algorithm, lr=2.0**-12, rounding="nearest").step()
    assert lost.eq(1).all()


@every
def test_the_seed_and_the_step_decide(algorithm):
    def run(**options):
        weight = a_weight()
        return walk(weight, build([weight], algorithm, **options), 3).detach()

    assert torch.equal(run(seed=3), run(seed=3))
    assert not torch.equal(run(seed=3), run(seed=4))
    assert not torch.equal(run(seed=3), run(rounding="nearest"))


@every
def test_equal_parameters_are_rounded_apart(algorithm):
    one, other = a_weight(), a_weight()
    one.grad, other.grad = torch.randn_like(one), None
    other.grad = one.grad.clone()
    build([one, other], algorithm).step()
    assert not torch.equal(one, other)


@every
def test_float32_parameters_are_not_touched_by_it(algorithm):
    random, plain = a_weight(dtype=torch.float32), a_weight(dtype=torch.float32)
    walk(random, build([random], algorithm), 2)
    walk(plain, build([plain], algorithm, rounding="nearest"), 2)
    assert torch.equal(random, plain)


@every
def test_a_run_that_goes_on_draws_what_it_would_have_drawn(algorithm):
    whole = a_weight()
    walk(whole, build([whole], algorithm, seed=9), 5)

    part = a_weight()
    optimizer = build([part], algorithm, seed=9)
    walk(part, optimizer, 2)
    file = io.BytesIO()
    torch.save({"weight": part.detach(), "optimizer": optimizer.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()))

    resumed = nn.Parameter(saved["weight"])
    optimizer = build([resumed], algorithm)
    optimizer.load_state_dict(saved["optimizer"])
    walk(resumed, optimizer, 3, first=2)
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("shape", [(24, 40), (960,), (4, 6, 40), ()])
def test_adamw_draws_the_same_bits_in_parts(shape, monkeypatch):
    whole, parts = a_weight(shape=shape), a_weight(shape=shape)
    optimizer = build([whole], "adamw", seed=9)
    walk(whole, optimizer, 3)
    monkeypatch.setattr("sinkgd.optim.methods.adamw._CPU_CHUNK", 100)
    other = build([parts], "adamw", seed=9)
    walk(parts, other, 3)
    assert torch.equal(whole, parts)
    for name, value in optimizer.state[whole].items():
        assert torch.equal(value, other.state[parts][name])
    assert optimizer.state[whole]["step"] == 3


@every
def test_it_can_be_chosen_later(algorithm):
    group = {"seed": 3, "lr": 2.0**-9}
    late = a_weight()
    optimizer = build([late], algorithm, **{**group, "rounding": "nearest"})
    optimizer.param_groups[0]["rounding"] = "stochastic"
    early = a_weight()
    walk(late, optimizer, 2)
    walk(early, build([early], algorithm, **group), 2)
    assert torch.equal(late, early)


def test_a_group_made_from_another_counts_its_own_steps():
    weights = [a_weight(seed) for seed in range(2)]
    first = {"params": [weights[0]], "algorithm": "sinkgd", "rounding": "stochastic", "lr": 0.1}
    optimizer = sinkgd.SinkGD([first])
    optimizer.add_param_group({**optimizer.param_groups[0], "params": [weights[1]]})
    walk(weights[0], optimizer, 3)
    assert [int(group["rounding_step"]) for group in optimizer.param_groups] == [3, 3]


def test_a_copy_counts_its_own_steps():
    weight = a_weight()
    optimizer = build([weight], "sinkgd")
    twin_weight, twin = copy.deepcopy((weight, optimizer))
    walk(weight, optimizer, 2)
    walk(twin_weight, twin, 2)
    assert torch.equal(weight, twin_weight)


def test_the_parts_of_a_fused_parameter_are_rounded_apart():
    weight = nn.Parameter(torch.ones(48, 40, dtype=torch.bfloat16))
    part = torch.randn(16, 40).bfloat16()
    weight.grad = part.repeat(3, 1)
    group = {"params": [weight], "algorithm": "sinkgd", "split": 3}
    sinkgd.SinkGD([group], rounding="stochastic").step()
    assert not torch.equal(weight[:16], weight[16:32])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, r"rounding must be one of \('nearest', 'stochastic'\), got 'up'"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*63\), got -1"),
        ({"seed": 0.5}, r"seed must be a whole number, got 0.5"),
    ],
)
@every
def test_options_out_of_range_are_named(algorithm, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build([a_weight()], algorithm, **options)


@every
def test_float16_is_refused_with_the_remedy(algorithm):
    with pytest.raises(ValueError, match=r"'parameter 0 of group 0' is float16. Use bfloat16 or"):
        build([a_weight(dtype=torch.float16)], algorithm)


def of_weights(scale, lr, dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    weight = nn.Parameter((scale * torch.randn(32, 32)).to(dtype))
    return sinkgd.SinkGD([{"params": [("w", weight)], "lr": lr}], **options), weight


@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_a_rate_whose_updates_are_lost_warns_and_says_what_to_do(scale):
    with pytest.warns(UserWarning, match=r"'w' is bfloat16 .* Pass rounding='stochastic'") as said:
        optimizer, weight = of_weights(scale, 1e-4 * scale)
    assert said[0].filename == __file__
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    lost = (weight == before).float().mean()
    assert lost > 0.8


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("lr", "options"),
    [
        (2e-3, {}),  # of training from scratch
        (2e-6, {"rounding": "stochastic"}),
        (2e-6, {"dtype": torch.float32}),
        (0.0, {}),
    ],
)
def test_others_do_not_warn(lr, options):
    of_weights(0.02, lr, **options)
    with torch.device("meta"):
        weight = nn.Parameter(torch.empty(4, 4, dtype=torch.bfloat16))
    sinkgd.SinkGD([weight], lr=1e-9)
