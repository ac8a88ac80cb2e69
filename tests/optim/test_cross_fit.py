"""Scales come from what was held out, the size from the step, and nothing is forgotten or kept."""

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import sinkgd
from every_step import normal
from one_matrix import heavy, optimizer_of
from option_reference import Expected

HELD = {"held_row", "held_column", "held_is_finite"}


def stepped(held, grad, *, scale=1.0, **options):
    """Return the update of a step whose scales come from ``held``, and the optimizer."""
    weight = nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype))
    optimizer = optimizer_of(weight, cross_fit=True, **options)
    if held is not None:
        weight.grad = held * scale
    optimizer.hold_out()
    assert weight.grad is None
    weight.grad = grad.clone()
    optimizer.step()
    return -weight.detach(), optimizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"last": "row"},
        {"first": "column"},
        {"deflated_rank": 2},
        {"averaged_scales": 0.5},
        {"tiny_rows": "mask", "tiny_row_threshold": 0.5},
        {"sinkhorn_iterations": 1, "momentum": 0.5, "momentum_place": "after"},
    ],
    ids=str,
)
def test_the_step_is_that_of_the_formula(every_backend, options):
    expected = Expected(torch.zeros(9, 14), cross_fit=True, **options)
    expected.hold_out(heavy(0))
    assert_close(
        stepped(heavy(0), heavy(1), **options)[0].double(),
        expected.step(heavy(1)),
        rtol=2e-5,
        atol=2e-6,
    )


@pytest.mark.parametrize("scale", [1e-12, 3.0, 1e12])
def test_the_size_of_what_is_held_out_does_not_matter(scale):
    expected, _ = stepped(heavy(0), heavy(1))
    assert_close(stepped(heavy(0), heavy(1), scale=scale)[0], expected, rtol=1e-4, atol=1e-5)


def usual_update(grad):
    weight = nn.Parameter(torch.zeros(grad.shape))
    weight.grad = grad.clone()
    optimizer_of(weight).step()
    return -weight.detach()


def test_without_a_held_out_gradient_the_step_is_the_usual_one():
    weights = [nn.Parameter(torch.zeros(9, 14)) for _ in range(3)]
    optimizer = sinkgd.SinkGDVariant(weights, lr=1.0, deflated_rank=0, cross_fit=True)
    weights[0].grad, weights[1].grad = heavy(0), torch.zeros(9, 14)
    optimizer.hold_out()
    for weight in weights:
        weight.grad = heavy(1)
    optimizer.step()
    expected = usual_update(heavy(1))
    assert [torch.equal(-own.detach(), expected) for own in weights] == [False, True, True]


@pytest.mark.parametrize("rarely", [1e-1, 1e-4, 1e-20, 1e-40])
@pytest.mark.parametrize("rare_rows", [1, 20, 63])
def test_rows_and_columns_change_by_bounded_factors_wherever_few_tokens_fall(rarely, rare_rows):
    for in_held in (True, False):
        held, grad = normal((64, 48), 0), normal((64, 48), 1)
        (held if in_held else grad)[:rare_rows] *= rarely
        (update, _), usual = stepped(held, grad), usual_update(grad)
        shown = usual.abs() > 1e-6
        factors = (update / usual)[shown]
        assert factors.min() >= 1 / 16.01  # 4 each for the row and the column
        assert factors.max() <= 16.01


@pytest.mark.parametrize("shape", [(64, 48), (5, 64, 48), (256, 16)])
@pytest.mark.parametrize("power", [1, 2, 3])
def test_the_update_is_as_large_as_without_it(shape, power):
    held, grad = ((x := normal(shape, seed)).sign() * x.abs() ** power for seed in (0, 1))
    update, _ = stepped(held, grad)
    assert update.square().mean().sqrt() == pytest.approx(1, abs=0.1)


def test_rows_and_columns_without_a_held_out_gradient_get_their_own_scales():
    held = heavy(0)
    held[2], held[:, 5] = 0, 0
    update, _ = stepped(held, heavy(1))
    expected = Expected(torch.zeros(9, 14), cross_fit=True)
    expected.hold_out(held)
    assert_close(update.double(), expected.step(heavy(1)), rtol=2e-5, atol=2e-6)
    assert update.ne(0).all()


def test_nothing_is_kept_after_the_step_and_every_step_must_hold_out():
    _, optimizer = stepped(heavy(0), heavy(1))
    (weight,) = optimizer.param_groups[0]["params"]
    assert optimizer.state[weight] == {}
    before = weight.detach().clone()
    weight.grad = heavy(2)
    with pytest.raises(ValueError, match=r"group 0 has cross_fit=True, .* call hold_out\(\)"):
        optimizer.step()
    assert torch.equal(weight, before)
    assert torch.equal(weight.grad, heavy(2))


def test_it_is_refused_where_no_group_takes_it():
    weight = nn.Parameter(torch.zeros(9, 14))
    weight.grad = heavy()
    optimizer = optimizer_of(weight)
    with pytest.raises(ValueError, match=r"hold_out\(\) keeps scales for groups with cross_fit"):
        optimizer.hold_out()
    assert torch.equal(weight.grad, heavy())


@pytest.mark.parametrize("options", [{"momentum": 0.5}, {"momentum_rank": 2}], ids=str)
def test_averages_of_gradients_are_refused(options):
    (option,) = options
    message = f"cross_fit=True takes scales from a part of the batch, and {option}="
    with pytest.raises(ValueError, match=message) as raised:
        optimizer_of(nn.Parameter(torch.zeros(9, 14)), cross_fit=True, **options)
    assert ("momentum_place" in str(raised.value)) == (option == "momentum")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_bad_gradient_that_is_held_out_is_reported_and_leaves_the_weight(bad, policy):
    weights = [nn.Parameter(torch.zeros(9, 14)) for _ in range(2)]
    group = {"params": [("good", weights[0]), ("ill", weights[1])], "algorithm": "sinkgd"}
    optimizer = sinkgd.SinkGD([{**group, "cross_fit": True}], lr=1.0, nonfinite=policy)
    for weight in weights:
        weight.grad = heavy(0)
    weights[1].grad[3, 4] = bad
    optimizer.hold_out()
    for weight in weights:
        weight.grad = heavy(1)
    if policy == "raise":
        with pytest.raises(sinkgd.NonFiniteGradientError, match="ill"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped() == {"ill": 1}
    assert weights[0].any()
    assert not weights[1].any()
    assert all(optimizer.state[weight] == {} for weight in weights)


def test_what_was_held_out_for_a_step_without_gradient_is_forgotten():
    weights = [nn.Parameter(torch.zeros(9, 14)) for _ in range(2)]
    optimizer = sinkgd.SinkGDVariant(weights, lr=1.0, cross_fit=True)
    for weight in weights:
        weight.grad = heavy(0)
    optimizer.hold_out()
    weights[0].grad = heavy(1)
    optimizer.step()
    assert all(optimizer.state[weight] == {} for weight in weights)


def test_what_was_held_out_for_a_step_that_the_scaler_skipped_is_forgotten():
    weights = [nn.Parameter(torch.zeros(9, 14)) for _ in range(2)]
    optimizer = sinkgd.SinkGDVariant(weights, lr=1.0, cross_fit=True)
    for weight in weights:
        weight.grad = heavy(0)
    optimizer.hold_out()
    for weight in weights:
        weight.grad = heavy(1)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    del optimizer.found_inf
    assert not any(weight.any() for weight in weights)
    assert all(optimizer.state[weight] == {} for weight in weights)


def test_a_step_that_fails_forgets_what_was_held_out():
    weight = nn.Parameter(torch.zeros(9, 14))
    optimizer = optimizer_of(weight, cross_fit=True)
    weight.grad = heavy(0)
    optimizer.hold_out()
    weight.grad = heavy(1) * torch.nan
    with pytest.raises(sinkgd.NonFiniteGradientError):
        optimizer.step()
    assert optimizer.state[weight] == {}


def test_scales_are_held_out_once_in_a_step_until_it_is_given_up():
    weight = nn.Parameter(torch.zeros(9, 14))
    optimizer = optimizer_of(weight, cross_fit=True)
    weight.grad = heavy(0)
    optimizer.hold_out()
    weight.grad = heavy(1)
    with pytest.raises(ValueError, match="called twice in a step"):
        optimizer.hold_out()
    assert torch.equal(weight.grad, heavy(1))
    optimizer.zero_grad()
    assert optimizer.state[weight] == {}
    weight.grad = heavy(2)
    optimizer.hold_out()
    assert optimizer.state[weight].keys() == HELD


def test_holding_out_nothing_is_refused():
    matrix, vector = nn.Parameter(torch.zeros(9, 14)), nn.Parameter(torch.zeros(9))
    optimizer = sinkgd.SinkGDVariant([matrix, vector], lr=1.0, cross_fit=True)
    for grad in (None, torch.ones(9)):
        vector.grad = grad
        with pytest.raises(ValueError, match=r"hold_out\(\) found no gradient of a matrix"):
            optimizer.hold_out()
        assert vector.grad is grad
    optimizer.step()  # vectors need nothing that is held out
    assert vector.any()
    matrix.requires_grad_(False)
    optimizer.hold_out()


def test_a_step_without_a_backward_pass_after_holding_out_is_refused():
    weight = nn.Parameter(torch.zeros(9, 14))
    optimizer = optimizer_of(weight, cross_fit=True)
    weight.grad = heavy(0)
    optimizer.hold_out()
    with pytest.raises(ValueError, match="no backward pass followed it"):
        optimizer.step()
    weight.grad = heavy(1)
    optimizer.step()
    assert torch.equal(-weight.detach(), stepped(heavy(0), heavy(1))[0])


@pytest.mark.parametrize("releases", [False, True])
def test_a_step_of_vectors_alone_is_refused_if_the_gradients_of_matrices_were_held_out(releases):
    matrix, vector = nn.Parameter(torch.zeros(9, 14)), nn.Parameter(torch.zeros(9))
    optimizer = sinkgd.SinkGDVariant([matrix, vector], lr=1.0, cross_fit=True)
    release = sinkgd.GradientRelease(optimizer) if releases else None
    with release.accumulate() if release else nullcontext():
        (matrix * heavy(0)).sum().backward()
        vector.sum().backward()
    optimizer.hold_out()
    with pytest.raises(ValueError, match="no backward pass followed it"):
        optimizer.step()


def test_a_matrix_whose_gradient_comes_only_after_holding_out_is_scaled_by_itself():
    weights = [nn.Parameter(torch.zeros(9, 14)) for _ in range(2)]
    optimizer = sinkgd.SinkGDVariant(weights, lr=1.0, deflated_rank=0, cross_fit=True)
    weights[0].grad = heavy(0)
    optimizer.hold_out()
    weights[1].grad = heavy(1)
    optimizer.step()
    assert not weights[0].any()
    assert torch.equal(-weights[1].detach(), usual_update(heavy(1)))


def test_vectors_take_their_step_if_matrices_are_frozen_after_holding_out():
    matrix, vector = nn.Parameter(torch.zeros(9, 14)), nn.Parameter(torch.zeros(9))
    optimizer = sinkgd.SinkGDVariant([matrix, vector], lr=1.0, cross_fit=True)
    matrix.grad = heavy(0)
    optimizer.hold_out()
    matrix.requires_grad_(False)
    vector.grad = torch.ones(9)
    optimizer.step()
    assert vector.any()
    assert optimizer.state[matrix] == {}


def test_a_group_may_be_added_after_gradients_were_released():
    weight, other = nn.Parameter(torch.zeros(128, 144)), nn.Parameter(torch.zeros(9, 14))
    optimizer = optimizer_of(weight, cross_fit=True)
    release = sinkgd.GradientRelease(optimizer)
    with release.accumulate():
        (weight * heavy(0, (128, 144))).sum().backward()
    optimizer.hold_out()
    (weight * heavy(1, (128, 144))).sum().backward()
    assert weight.any()
    optimizer.add_param_group({"params": [("other", other)]})
    optimizer.step()
    assert optimizer.state[weight] == {}


def test_an_abandoned_released_step_forgets_what_was_held_out():
    weight = nn.Parameter(torch.zeros(9, 14))
    optimizer = optimizer_of(weight, cross_fit=True)
    release = sinkgd.GradientRelease(optimizer)
    with release.accumulate():
        (weight * heavy(0)).sum().backward()
    optimizer.hold_out()
    release.reset()
    assert optimizer.state[weight] == {}


def test_a_released_gradient_without_held_scales_names_the_remedy_in_backward_and_in_the_step():
    weight = nn.Parameter(torch.zeros(128, 144))
    optimizer = optimizer_of(weight, cross_fit=True)
    release = sinkgd.GradientRelease(optimizer)
    with pytest.raises(ValueError, match=r"call hold_out\(\)"):
        weight.sum().backward()
    with pytest.raises(RuntimeError, match=r"updated 0 parameters\. Call release\.reset\(\)"):
        optimizer.step()
    release.reset()
    assert weight.grad is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_made_between_holding_out_and_the_step_takes_the_same_step(copied):
    weight = nn.Parameter(torch.zeros(9, 14))
    optimizer = optimizer_of(weight, cross_fit=True)
    weight.grad = heavy(0)
    optimizer.hold_out()
    other = copied(optimizer)
    (twin,) = other.param_groups[0]["params"]
    twin.grad = heavy(1)
    other.step()
    assert torch.equal(-twin.detach(), stepped(heavy(0), heavy(1))[0])
    assert optimizer.state[weight].keys() == HELD


def test_what_was_held_out_for_another_shape_is_not_loaded():
    weight, other = (nn.Parameter(torch.zeros(shape)) for shape in ((9, 14), (12, 20)))
    optimizer = optimizer_of(weight, cross_fit=True)
    weight.grad = heavy(0)
    optimizer.hold_out()
    with pytest.raises(ValueError, match="its held_row was saved with another shape"):
        optimizer_of(other, cross_fit=True).load_state_dict(optimizer.state_dict())


def test_only_matrices_of_the_groups_that_ask_for_it_are_cleared():
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, norm=nn.LayerNorm(8)
    )
    optimizer = sinkgd.SinkGDVariant(sinkgd.param_groups(model), cross_fit=True)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.hold_out()
    kept = {name for name, param in model.named_parameters() if param.grad is not None}
    assert kept == {name for name, param in model.named_parameters() if param.ndim < 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"split": 3}, {"layout": "transposed"}], ids=str)
def test_a_run_saved_after_holding_out_takes_the_step_it_would_have_taken(dtype, options):
    weights = [nn.Parameter(torch.zeros(9, 14, dtype=dtype)) for _ in range(2)]
    optimizers = [optimizer_of(own, cross_fit=True, **options) for own in weights]
    weights[0].grad = heavy(0).to(dtype)
    optimizers[0].hold_out()
    assert optimizers[0].state[weights[0]].keys() == HELD
    file = io.BytesIO()
    torch.save(optimizers[0].state_dict(), file)
    optimizers[1].load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    for weight, optimizer in zip(weights, optimizers, strict=True):
        weight.grad = heavy(1).to(dtype)
        optimizer.step()
    assert torch.equal(*weights)


def test_gradients_released_inside_backward_are_scaled_by_what_was_held_out():
    updates = []
    for releases in (False, True):
        weight = nn.Parameter(torch.zeros(9, 14))
        optimizer = optimizer_of(weight, cross_fit=True)
        release = sinkgd.GradientRelease(optimizer) if releases else None
        if release is None:
            (weight * heavy(0)).sum().backward()
        else:
            with release.accumulate():
                (weight * heavy(0)).sum().backward()
        optimizer.hold_out()
        (weight * heavy(1)).sum().backward()
        optimizer.step()
        updates.append(weight.detach())
    assert torch.equal(*updates)


def test_a_loss_scale_does_not_matter():
    updates = []
    for scale in (1.0, 1024.0):
        weight = nn.Parameter(torch.zeros(9, 14))
        optimizer = optimizer_of(weight, cross_fit=True)
        weight.grad = heavy(0) * scale
        optimizer.hold_out()
        weight.grad = heavy(1)  # as after GradScaler.unscale_
        optimizer.step()
        updates.append(weight.detach())
    assert_close(*updates, rtol=1e-5, atol=1e-6)
