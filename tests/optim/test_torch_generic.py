"""The checks that torch runs on every optimizer of its own, run on ours.

Modeled on ``TestOptimRenewed`` of pytorch's ``test/test_optim.py``, which loops over
``torch.testing._internal.common_optimizers.optim_db``; here it loops over our table, each row with
each of its options, as theirs does.
"""

import io
import math
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.testing import assert_close

import sinkgd
from optimizer_cases import OPTIMIZERS
from sinkgd.optim.arguments import ADDED_LATER

every_input = pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(case, options, id=f"{case}-{options}")
        for case in OPTIMIZERS
        for options in case.options
    ],
)
every = pytest.mark.parametrize("case", OPTIMIZERS, ids=str)


def problem(takes_vectors=True, dtype=torch.float32, contiguous=True):
    """A linear regression: weight (10, 5), bias (10,), input (5,)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 5, generator=generator, dtype=dtype)
    if not contiguous:
        weight = torch.stack([weight, weight], dim=-1)[..., 0]
        assert not weight.is_contiguous()
    weight = nn.Parameter(weight)
    bias = nn.Parameter(torch.randn(10, generator=generator, dtype=dtype))
    x = torch.randn(5, generator=generator, dtype=dtype)
    params = [weight, bias] if takes_vectors else [weight]

    def closure(optimizer):
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        return loss

    return params, closure


@every_input
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("tensor_lr", [True, False])
def test_goes_right_direction(case, options, contiguous, tensor_lr):
    params, closure = problem(case.takes_vectors, contiguous=contiguous)
    lr = options.get("lr", 1e-3)
    optimizer = case.build(params, **{**options, "lr": torch.tensor(lr) if tensor_lr else lr})
    first = closure(optimizer).item()
    for _ in range(20):
        optimizer.step(lambda: closure(optimizer))
    last = closure(optimizer).item()
    assert last > first if options.get("maximize") else last < first


SCHEDULERS = [
    lambda o: [StepLR(o, step_size=10, gamma=0.9)],
    lambda o: [ExponentialLR(o, gamma=0.9), LinearLR(o, start_factor=0.4, total_iters=4)],
    lambda o: [CosineAnnealingLR(o, T_max=20)],
    lambda o: [LambdaLR(o, lambda step: 1 / (1 + step))],
    lambda o: [OneCycleLR(o, max_lr=2e-3, total_steps=30, cycle_momentum=False)],
    lambda o: [
        SequentialLR(o, [LinearLR(o, 0.1, total_iters=3), CosineAnnealingLR(o, 20)], milestones=[3])
    ],
    lambda o: [ReduceLROnPlateau(o)],
]


@every
@pytest.mark.parametrize("schedulers", SCHEDULERS, ids=range(len(SCHEDULERS)))
def test_goes_right_direction_with_schedulers(case, schedulers):
    params, closure = problem(case.takes_vectors)
    optimizer = case.build(params, lr=1e-3)
    running = schedulers(optimizer)
    first = closure(optimizer).item()
    for _ in range(20):
        loss = optimizer.step(lambda: closure(optimizer))
        for scheduler in running:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(loss.detach())
            else:
                scheduler.step()
    assert closure(optimizer).item() < first


@every
def test_param_groups_lr_and_weight_decay(case):
    frozen, moving = (
        nn.Parameter(torch.ones(3, 2)),
        nn.Parameter(torch.ones(3, 2)),
    )
    optimizer = case.build([{"params": [frozen], "lr": 0.0}, {"params": [moving]}], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        (frozen * moving).square().sum().backward()
        optimizer.step()
    assert frozen.eq(1).all()
    assert moving.ne(1).all()


@every_input
def test_step_is_noop_when_params_have_no_grad(case, options):
    params, _ = problem(case.takes_vectors)
    before = deepcopy(params)
    case.build(params, **options).step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@every_input
def test_step_is_noop_for_zero_grads(case, options):
    params, _ = problem(case.takes_vectors)
    for param in params:
        param.grad = torch.zeros_like(param)
    before = deepcopy(params)
    optimizer = case.build(params, **options)
    optimizer.step()
    # Cautious decay follows the update, which is zero.
    decay = 0 if options.get("cautious_decay") else options.get("weight_decay", 0)
    keep = 1 - options.get("lr", 1e-3) * decay
    for param, old in zip(params, before, strict=True):
        assert_close(param, nn.Parameter(old * keep), rtol=1e-6, atol=0)


@every_input
def test_optimizer_can_be_printed(case, options):
    params, _ = problem(case.takes_vectors)
    text = str(case.build(params, **options))
    for option in options:
        assert option in text


@every_input
@pytest.mark.parametrize("is_named", [True, False])
def test_state_dict_deterministic(case, options, is_named):
    def build():
        params, closure = problem(case.takes_vectors)
        given = [(f"p{i}", p) for i, p in enumerate(params)] if is_named else params
        return params, closure, case.build(given, **options)

    params, closure, optimizer = build()
    for _ in range(3):
        optimizer.step(lambda: closure(optimizer))
    other_params, other_closure, other = build()
    with torch.no_grad():
        for own, param in zip(other_params, params, strict=True):
            own.copy_(param)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for _ in range(3):
        assert optimizer.step(lambda: closure(optimizer)) == other.step(
            lambda: other_closure(other)
        )
        assert all(torch.equal(a, b) for a, b in zip(params, other_params, strict=True))
    assert str(optimizer.state_dict()) == str(other.state_dict())


@every_input
def test_save_load_equality_with_weights_only(case, options):
    params, closure = problem(case.takes_vectors)
    optimizer = case.build(params, **options)
    optimizer.step(lambda: closure(optimizer))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert str(loaded) == str(optimizer.state_dict())
    case.build(deepcopy(params), **options).load_state_dict(loaded)


@every
def test_can_load_from_and_to_named_state_dict(case):
    params, closure = problem(case.takes_vectors)
    named = case.build([(f"p{i}", p) for i, p in enumerate(params)])
    named.step(lambda: closure(named))
    plain = case.build(params)
    plain.load_state_dict(named.state_dict())
    named.load_state_dict(plain.state_dict())
    assert named.param_groups[0]["param_names"] == [f"p{i}" for i in range(len(params))]


@every
def test_mixed_dtypes_in_one_group(case):
    wide = nn.Parameter(torch.ones(3, 4))
    narrow = nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    optimizer = case.build([wide, narrow], lr=1e-2)
    for _ in range(2):
        wide.grad, narrow.grad = torch.ones(3, 4), torch.ones(3, 4, dtype=torch.bfloat16)
        optimizer.step()
    assert_close(narrow.float(), wide.bfloat16().float(), rtol=1e-2, atol=0)
    assert wide.ne(1).all()


@every
def test_step_and_state_dict_hooks_are_called(case):
    params, closure = problem(case.takes_vectors)
    optimizer = case.build(params)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))
    optimizer.register_state_dict_pre_hook(lambda *_: called.append("state pre"))
    optimizer.register_state_dict_post_hook(lambda *_: called.append("state post"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: called.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: called.append("load post"))
    optimizer.step(lambda: closure(optimizer))
    assert called == ["pre", "post"]
    saved = optimizer.state_dict()
    assert called[2:] == ["state pre", "state post"]
    optimizer.load_state_dict(saved)
    assert called[-2:] == ["load pre", "load post"]


@every
def test_state_dict_post_hooks_see_what_is_returned(case):
    params, closure = problem(case.takes_vectors)
    optimizer = case.build(params)
    optimizer.step(lambda: closure(optimizer))
    seen = []
    for prepend in (True, False):
        optimizer.register_state_dict_post_hook(
            lambda _, state_dict: seen.append(str(state_dict)), prepend=prepend
        )
    returned = optimizer.state_dict()
    assert seen == [str(returned)] * 2


@every
def test_a_load_pre_hook_can_migrate_any_dict(case):
    params, closure = problem(case.takes_vectors)
    optimizer = case.build(params)
    optimizer.step(lambda: closure(optimizer))
    saved = optimizer.state_dict()
    foreign = {"theirs": [{"of another time": group} for group in saved["param_groups"]]}

    def migrate(_, state_dict):
        groups = [group["of another time"] for group in state_dict["theirs"]]
        return {"state": saved["state"], "param_groups": groups}

    other = case.build(deepcopy(params))
    other.register_load_state_dict_pre_hook(migrate)
    other.load_state_dict(foreign)
    assert str(other.state_dict()) == str(saved)


@every
def test_load_post_hooks_see_the_finished_optimizer(case):
    params, closure = problem(case.takes_vectors)
    optimizer = case.build(params)
    optimizer.step(lambda: closure(optimizer))
    other = case.build(deepcopy(params))
    seen = []
    for prepend in (True, False):
        other.register_load_state_dict_post_hook(
            lambda own: seen.append(str((own.param_groups, own.state_dict()))), prepend=prepend
        )
    other.load_state_dict(optimizer.state_dict())
    assert seen == [str((other.param_groups, other.state_dict()))] * 2


# What names the routing; without it another optimizer saved the state.
ROUTING = {"params", "algorithm", "layout", "split", "norms"}


@every
def test_an_option_that_an_older_version_did_not_save_keeps_its_value_or_is_off(case):
    params, closure = problem(case.takes_vectors)
    optimizer = case.build(params)
    optimizer.step(lambda: closure(optimizer))
    for option in optimizer.param_groups[0].keys() - ROUTING:
        older = deepcopy(optimizer.state_dict())
        for group in older["param_groups"]:
            del group[option]
        other_params, other_closure = problem(case.takes_vectors)
        other = case.build(other_params)
        # An option that versions without it behaved as if it was off is off in what they saved.
        expected = str(ADDED_LATER.get(option, other.param_groups[0][option]))
        other.load_state_dict(older)
        assert str(other.param_groups[0][option]) == expected
        other_closure(other)
        other.step()


def test_a_group_whose_parameters_were_taken_out_is_loaded():
    params = [nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16)) for _ in range(2)]
    groups = [{"params": [param]} for param in params]
    optimizer = sinkgd.SinkGD(groups, rounding="stochastic")
    optimizer.param_groups[0]["params"].clear()
    optimizer.load_state_dict(optimizer.state_dict())
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()


@every
def test_loading_leaves_the_saved_optimizer_alone(case):
    params, closure = problem(case.takes_vectors)
    optimizer = case.build(params)
    optimizer.step(lambda: closure(optimizer))
    before = str(optimizer.state_dict())
    other_params, other_closure = problem(case.takes_vectors)
    other = case.build(other_params)
    other.load_state_dict(optimizer.state_dict())
    other.step(lambda: other_closure(other))
    assert str(optimizer.state_dict()) == before


@every
@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=str)
def test_a_learning_rate_of_one_element_has_any_shape(case, shape):
    def run(lr):
        params, closure = problem(case.takes_vectors)
        optimizer = case.build(params, lr=lr, weight_decay=0.1)
        for _ in range(8):
            optimizer.step(lambda: closure(optimizer))
        return params

    shaped, plain = run(torch.full(shape, 0.01)), run(torch.tensor(0.01))
    assert all(torch.equal(a, b) for a, b in zip(shaped, plain, strict=True))


@every_input
@pytest.mark.parametrize("kind", [int, float])
def test_a_step_count_that_is_a_number_is_loaded(case, options, kind):
    params, closure = problem(case.takes_vectors)
    optimizer = case.build(params, **options)
    for _ in range(3):
        optimizer.step(lambda: closure(optimizer))
    saved = deepcopy(optimizer.state_dict())
    for own in saved["state"].values():
        for key in own.keys() & {"step", "resets"}:
            own[key] = kind(own[key])
    other_params, other_closure = problem(case.takes_vectors)
    with torch.no_grad():
        for own, param in zip(other_params, params, strict=True):
            own.copy_(param)
    other = case.build(other_params, **options)
    other.load_state_dict(saved)
    for _ in range(8):
        optimizer.step(lambda: closure(optimizer))
        other.step(lambda: other_closure(other))
    assert all(torch.equal(a, b) for a, b in zip(params, other_params, strict=True))


WARM = [{"last": last, "warm_start": warm} for last in ("row", "column") for warm in (True, False)]
WARM.append({"momentum": 0.9})
with_empty = pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(case, options, id=f"{case}-{options}")
        for case in OPTIMIZERS
        for options in (WARM if case.name == "SinkGD-last-row" else [{}])
    ],
)


@with_empty
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_parameters_without_entries_have_state_and_steps(case, options, shape):
    # Such is a rank's piece of a parameter with fewer rows than ranks.
    full, empty = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(shape))
    optimizer = case.build([full, empty], **options)
    optimizer.init_state()
    for _ in range(2):
        full.grad, empty.grad = torch.ones_like(full), torch.ones_like(empty)
        optimizer.step()
    case.build([full, empty], **options).load_state_dict(optimizer.state_dict())
    assert full.ne(1).all()


@every
def test_deepcopy_keeps_what_was_set_on_the_optimizer(case):
    params, _ = problem(case.takes_vectors)
    optimizer = case.build(params)
    optimizer.register_step_post_hook(lambda *_: None)
    twin = deepcopy(optimizer)
    assert twin.state_dict().keys() == optimizer.state_dict().keys()
    assert len(twin.param_groups) == len(optimizer.param_groups)
    twin.step()


@every
def test_a_loaded_lr_counts(case):
    params, _ = problem(case.takes_vectors)
    optimizer = case.build(params, lr=0.5)
    optimizer.load_state_dict(case.build(params, lr=0.125).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.125


@every
def test_duplicate_params_are_refused(case):
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = case.build([weight])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [weight]})


def test_an_empty_parameter_list_is_refused():
    with pytest.raises(ValueError, match="empty parameter list"):
        sinkgd.SinkGD([])


@every
def test_zero_grad_sets_to_none(case):
    params, closure = problem(case.takes_vectors)
    optimizer = case.build(params)
    closure(optimizer)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)


in_step_or_before = pytest.mark.parametrize("in_step", [True, False])


@every
@in_step_or_before
def test_grad_scaler_scales_nothing_but_overflow(case, in_step):
    # The gradients stay multiplied by 2**10, which is exact, until the optimizer reads them.
    def run(scaler):
        params, _ = problem(case.takes_vectors)
        optimizer = case.build(params)
        optimizer._step_supports_amp_scaling = in_step
        for _ in range(3):
            optimizer.zero_grad()
            loss = sum(param.square().sum() for param in params)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return params

    scaled = run(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    plain = run(torch.amp.GradScaler("cpu", enabled=False))
    assert all(torch.equal(a, b) for a, b in zip(scaled, plain, strict=True))


@every
@in_step_or_before
@pytest.mark.parametrize("unscale_first", [True, False])
def test_grad_scaler_skips_an_overflow(case, unscale_first, in_step):
    params, _ = problem(case.takes_vectors)
    optimizer = case.build(params)
    optimizer._step_supports_amp_scaling = in_step
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = deepcopy(params)
    scaler.scale(sum((param * math.inf).sum() for param in params)).backward()
    if unscale_first:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert scaler.get_scale() == 2.0
    assert optimizer.skipped() == {}


def test_grad_scaler_may_find_no_gradient_at_all():
    used, unused = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    group = {"params": [unused], "algorithm": "adamw", "fused": True}
    optimizers = [sinkgd.SinkGD([used], lr=0.1), sinkgd.SinkGD([group], lr=0.1)]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(used.sum()).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert used.ne(1).all()
    assert unused.eq(1).all()


@pytest.mark.parametrize("attributes", [{"found_inf": 0}, {"grad_scale": torch.ones(())}])
def test_what_grad_scaler_sets_does_not_outlive_a_step_that_fails(attributes):
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = sinkgd.SinkGD([weight], lr=0.1)
    weight.grad = torch.full((4, 3), math.nan)
    vars(optimizer).update(attributes)
    with pytest.raises(sinkgd.NonFiniteGradientError):
        optimizer.step()
    assert not vars(optimizer).keys() & {"found_inf", "grad_scale"}


# What torch.amp.GradScaler and Lightning look at --------------------------------------------------


def refuses_to_clip(optimizer):
    """Whether Lightning refuses to clip, as MixedPrecision.clip_gradients of its plugins asks."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


@every
def test_lightning_clips_under_mixed_precision(case):
    params, _ = problem(case.takes_vectors)
    assert not refuses_to_clip(case.build(params))


@pytest.mark.parametrize("fused", [None, False, True])
def test_a_group_that_asks_for_the_fused_kernel_takes_the_scale_as_torchs_adamw_does(fused):
    params, _ = problem()
    optimizer = sinkgd.SinkGD([{"params": params, "algorithm": "adamw", "fused": fused}])
    reference = torch.optim.AdamW(deepcopy(params), fused=fused)
    assert refuses_to_clip(optimizer) == refuses_to_clip(reference)


@every
@in_step_or_before
def test_a_scaled_gradient_is_clipped_as_a_plain_one(case, in_step):
    # Gradients are powers of two times the plain ones, so the bits are equal.
    def run(scaler):
        params, _ = problem(case.takes_vectors)
        optimizer = case.build(params)
        optimizer._step_supports_amp_scaling = in_step
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(sum(param.square().sum() for param in params)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, 0.5)
            scaler.step(optimizer)
            scaler.update()
        return params

    scaled = run(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    plain = run(torch.amp.GradScaler("cpu", enabled=False))
    assert all(torch.equal(a, b) for a, b in zip(scaled, plain, strict=True))
