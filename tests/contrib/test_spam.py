"""SPAM and AdamWSPAM are their descriptions, go on as saved, and no bad gradient reaches them."""

import copy
import io
import math

import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch.testing import assert_close

import sinkgd
from spam_reference import Reference, SpikeReference

SHAPES = [(4, 3), (5,), ()]
STEPS = 40
# Spikes, resets and warm-ups in a few steps.
AGES = {"clip_delay": 2, "reset_interval": 15, "warmup_steps": 4}
COMMON = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, **AGES}
both = pytest.mark.parametrize("kind", [sinkgd.SPAM, sinkgd.AdamWSPAM])


def with_threshold(theta):
    """Common options and a threshold; without one, a delay of clipping is refused."""
    options = {**COMMON, "theta": theta}
    return {k: v for k, v in options.items() if theta is not None or k != "clip_delay"}


def weights(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [nn.Parameter(x.to(dtype)) for x in drawn]


def gradients(step, shapes=SHAPES):
    """Of a step; each eleventh is ten times as long, and in all some entries are spikes."""
    generator = torch.Generator().manual_seed(100 + step)
    found = []
    for shape in shapes:
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        spikes = torch.rand(shape, generator=generator) < 0.1
        grad = torch.where(spikes, 30 * grad, grad)
        found.append(grad * 10 if step % 11 == 10 else grad)
    if len(found[0].shape) == 2:
        found[0][1, 2] = 0  # an entry that has no second moment
        if step == 33:
            found[0][1, 2] = 5
    return found


def walk(optimizer, params, steps=range(STEPS), scale=1.0):
    for step in steps:
        drawn = gradients(step, [param.shape for param in params])
        for param, grad in zip(params, drawn, strict=True):
            param.grad = (scale * grad).to(param.dtype)
        optimizer.step()


def flat(tensors):
    return [x.detach().flatten().tolist() for x in tensors]


def restated(kind, params, theta, **options):
    own = (COMMON["lr"], COMMON["betas"], COMMON["eps"], COMMON["weight_decay"])
    delay, interval, warmup = AGES.values()
    ages = {"delay": delay, "interval": interval, "warmup": warmup}
    return kind(flat(params), *own, theta=theta, **ages, **options)


def assert_weights(params, expected, **tolerance):
    for param, own in zip(params, expected, strict=True):
        wanted = torch.tensor(own, dtype=torch.float64)
        assert_close(param.detach().double().flatten(), wanted, **tolerance)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("theta", [None, 3.0])
def test_spam_is_adam_with_cut_spikes_resets_and_warm_ups(theta, fused):
    params = weights()
    expected = restated(Reference, params, theta)
    groups = [{"params": params, "fused": fused}]
    optimizer = sinkgd.SPAM(groups, **with_threshold(theta))
    for step in range(STEPS):
        walk(optimizer, params, [step])
        expected.spam(flat(gradients(step)))
        assert_weights(params, expected.weights, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("theta", [None, 3.0])
@pytest.mark.parametrize(("max_norm", "window"), [(1.0, 100), (math.inf, 12)])
def test_adamw_spam_is_its_description(theta, fused, max_norm, window):
    params = weights()
    expected = restated(SpikeReference, params, theta, max_norm=max_norm, z=2.0, window=window)
    groups = [{"params": params, "fused": fused}]
    options = {"max_norm": max_norm, "norm_window": window, **with_threshold(theta)}
    optimizer = sinkgd.AdamWSPAM(groups, **options)
    for step in range(STEPS):
        walk(optimizer, params, [step])
        expected.adamw_spam(flat(gradients(step)))
        assert_weights(params, expected.weights, rtol=1e-10, atol=1e-10)
    assert expected.spikes  # the claim is not empty


def test_a_window_that_is_changed_holds_from_the_next_step_on():
    params = weights()
    expected = restated(SpikeReference, params, None, max_norm=1.0, z=2.0, window=20)
    optimizer = sinkgd.AdamWSPAM(params, norm_window=20, **with_threshold(None))
    for step in range(STEPS):
        if step == STEPS // 3:
            optimizer.param_groups[0]["norm_window"] = expected.window = 11
        if step == STEPS // 2:
            # The norms that were forgotten stay so.
            expected.norms = expected.norms[-11:]
            optimizer.param_groups[0]["norm_window"] = expected.window = 30
        walk(optimizer, params, [step])
        expected.adamw_spam(flat(gradients(step)))
        assert_weights(params, expected.weights, rtol=1e-10, atol=1e-10)
    assert any(spike >= STEPS // 3 for spike in expected.spikes)
    history = optimizer.param_groups[0]["norm_history"]
    assert history[history.isfinite()].tolist() == pytest.approx(expected.norms[-30:])


def test_until_the_first_reset_spam_is_that_of_pytorch_optimizer():
    # Theirs resets one step earlier, leaves bias corrections as they were, warms up from 1 %, and
    # divides by eps before the correction; and where v is zero it cuts to zero. So: 28 steps of 30,
    # no eps, and no entry without a gradient. It cuts from the 20th step on, which ours counts as
    # 19 steps of delay.
    shapes = [(4, 3), (5,)]
    ours, theirs = weights(torch.float32, shapes), weights(torch.float32, shapes)
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 0.0}
    optimizer = sinkgd.SPAM(ours, theta=4.0, clip_delay=19, reset_interval=30, **options)
    reference = pytorch_optimizer.SPAM(
        theirs, threshold=4, grad_accu_steps=20, update_proj_gap=30, **options
    )
    uncut = weights(torch.float32, shapes)
    without = sinkgd.SPAM(uncut, theta=None, reset_interval=30, **options)
    for step in range(28):
        generator = torch.Generator().manual_seed(step)
        for params in zip(ours, theirs, uncut, strict=True):
            grad = torch.randn(params[0].shape, generator=generator) ** 3
            for param in params:
                param.grad = grad.clone()
        for one in (optimizer, reference, without):
            one.step()
    for own, their, other in zip(ours, theirs, uncut, strict=True):
        assert_close(own, their, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(own, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_without_spikes_and_before_a_reset_they_are_torch_bit_for_bit(fused):
    options = {"lr": 0.01, "weight_decay": 0.1}
    for kind, amsgrad, more in (
        (sinkgd.SPAM, False, {"theta": None}),
        (sinkgd.AdamWSPAM, True, {"max_norm": math.inf, "spike_z": math.inf}),
    ):
        ours, theirs = weights(torch.float32), weights(torch.float32)
        walk(kind([{"params": ours, "fused": fused}], **options, **more), ours)
        reference = torch.optim.AdamW(theirs, amsgrad=amsgrad, fused=fused, **options)
        walk(reference, theirs)
        assert all(torch.equal(own, their) for own, their in zip(ours, theirs, strict=True))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", [3, 15, 17, 33])  # young, at a reset, warming up, anew
def test_a_run_that_goes_on_is_the_run_that_was_not_cut(kind, dtype, first):
    options = with_threshold(3.0)
    whole, part = weights(dtype), weights(dtype)
    walk(kind(whole, **options), whole)
    optimizer = kind(part, **options)
    walk(optimizer, part, range(first))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    optimizer = kind(part)
    optimizer.load_state_dict(saved)
    walk(optimizer, part, range(first, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True))


@both
def test_a_reset_that_is_due_waits_for_a_good_gradient(kind):
    params = weights(torch.float32)
    optimizer = kind(params, nonfinite="skip", **{**with_threshold(3.0), "reset_interval": 5})
    walk(optimizer, params, range(5))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    for param in params:
        param.grad = torch.full_like(param, math.nan)
    optimizer.step()
    for now, then in zip(optimizer.state_dict()["state"].values(), before.values(), strict=True):
        assert all(torch.equal(now[key], then[key]) for key in then)
    walk(optimizer, params, range(5, 6))
    assert all(state["resets"] == 1 for state in optimizer.state_dict()["state"].values())


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_a_bad_gradient_leaves_weights_moments_and_norms_as_they_were(kind, bad, fused):
    params = weights(torch.float32)
    groups = [{"params": params, "fused": fused}]
    optimizer = kind(groups, nonfinite="skip", **with_threshold(3.0))
    walk(optimizer, params, range(12))
    before = copy.deepcopy((params, optimizer.state_dict()))
    for param, grad in zip(params, gradients(12), strict=True):
        param.grad = grad.float()
    params[0].grad[3, 1] = bad
    optimizer.step()
    assert optimizer.skipped() == {"parameter 0 of group 0": 1}
    held_back = [0] if kind is sinkgd.SPAM else [0, 1, 2]
    for i in range(3):
        same = torch.equal(params[i], before[0][i])
        assert same == (i in held_back)
    for i in held_back:
        now, then = optimizer.state_dict()["state"][i], before[1]["state"][i]
        assert all(torch.equal(now[key], then[key]) for key in then)
    if kind is sinkgd.AdamWSPAM:
        now, then = (
            o["param_groups"][0]["norm_history"] for o in (optimizer.state_dict(), before[1])
        )
        assert torch.equal(now.nan_to_num(-1), then.nan_to_num(-1))
    walk(optimizer, params, range(12, STEPS))
    assert all(param.isfinite().all() for param in params)


@both
def test_an_overflow_of_scaled_gradients_is_no_step(kind):
    def run(steps):
        params = weights(torch.float32)
        optimizer = kind(params, **with_threshold(3.0))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in steps:
            scale = scaler.get_scale()
            scaler.scale(torch.zeros(()))  # begins the scaler, as a loss does
            factor = math.inf if step is None else scale
            drawn = gradients(0 if step is None else step)
            for param, grad in zip(params, drawn, strict=True):
                param.grad = (grad * factor).nan_to_num(math.inf).float()
            scaler.step(optimizer)
            scaler.update()
        return params

    plain = run(range(20))
    interrupted = run([*range(9), None, *range(9, 15), None, *range(15, 20)])
    assert all(torch.equal(a, b) for a, b in zip(plain, interrupted, strict=True))


def test_a_flag_of_overflow_on_the_device_holds_everything_back():
    params = weights(torch.float32)
    optimizer = sinkgd.AdamWSPAM(params, **with_threshold(None))
    walk(optimizer, params, range(3))
    before = copy.deepcopy((params, optimizer.state_dict()))
    for param, grad in zip(params, gradients(3), strict=True):
        param.grad = grad.float()
    # As a scaler on an accelerator leaves it: `step` takes a flag of a CPU at its word.
    slots = optimizer._parameters.slots(optimizer.param_groups, optimizer.state, "AdamWSPAM")
    optimizer._update(slots, torch.tensor(4.0), torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(params, before[0], strict=True))
    assert str(optimizer.state_dict()) == str(before[1])


def test_huge_and_tiny_gradients_keep_their_norm():
    for scale in (1e-30, 1e30):
        params = weights(torch.float32)
        optimizer = sinkgd.AdamWSPAM(params, max_norm=math.inf, betas=(0.9, 0.99))
        walk(optimizer, params, range(1), scale=scale)
        norm = math.sqrt(sum(grad.square().sum().item() for grad in gradients(0)))
        assert_close(
            optimizer.param_groups[0]["norm_history"][-1].item(), scale * norm, rtol=1e-6, atol=0
        )


def test_released_gradients_step_spam_as_ever_and_are_refused_to_adamw_spam():
    def run(*, released):
        params = weights(torch.float32)
        optimizer = sinkgd.SPAM(params, **COMMON)
        release = sinkgd.GradientRelease(optimizer) if released else None
        for step in range(20):
            pairs = zip(params, gradients(step), strict=True)
            sum((param * grad.float()).sum() for param, grad in pairs).backward()
            assert (params[0].grad is None) == released
            optimizer.step()
            optimizer.zero_grad()
        del release
        return params

    pairs = zip(run(released=True), run(released=False), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    optimizer = sinkgd.AdamWSPAM(weights())
    with pytest.raises(TypeError, match=r"group 0 has algorithm='adamw-spam'.*algorithm='spam'"):
        sinkgd.GradientRelease(optimizer)
    with pytest.raises(TypeError, match="group 0 has algorithm='adamw-spam'"):
        optimizer.update([])


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\)"),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
        ({"theta": 0.0}, "theta must be positive and finite, or None to clip nothing, got 0.0"),
        ({"clip_delay": -1}, "clip_delay must be at least 0 steps, got -1"),
        ({"reset_interval": 0}, "reset_interval must be at least 1 step, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0 steps, got -1"),
    ],
)
def test_options_out_of_range_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(weights(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 0.0}, "max_norm must be positive, or inf for none, got 0.0"),
        ({"spike_z": -1.0}, "spike_z must be positive, or inf for none, got -1.0"),
        ({"norm_window": 9}, "norm_window must be at least 10 norms, got 9"),
    ],
)
def test_options_of_the_norm_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sinkgd.AdamWSPAM(weights(), **options)


def test_a_group_on_two_devices_is_refused_by_name():
    here, there = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match=r"'far' is on meta and others of its group on cpu"):
        sinkgd.AdamWSPAM([("near", here), ("far", there)])
