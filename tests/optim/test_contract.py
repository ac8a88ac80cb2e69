"""Every optimizer keeps the promises of the package, row by row of one table."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import sinkgd
from optimizer_cases import ABSENT, OPTIMIZERS
from sinkgd.optim.methods import METHODS

every = pytest.mark.parametrize("case", OPTIMIZERS, ids=str)
stateless = pytest.mark.parametrize("case", [c for c in OPTIMIZERS if not c.has_state], ids=str)
unit_size = pytest.mark.parametrize(
    "case", [c for c in OPTIMIZERS if not (c.has_state or c.keeps_size)], ids=str
)
matrices_only = pytest.mark.parametrize(
    "case", [c for c in OPTIMIZERS if not c.takes_vectors], ids=str
)


def a_matrix(seed: int = 0, shape: tuple[int, ...] = (6, 10)) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def with_grad(param: nn.Parameter, seed: int = 1) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    return param


def test_the_table_covers_every_algorithm():
    assert len(OPTIMIZERS) == 29 - len(ABSENT)
    covered = {
        group["algorithm"] for case in OPTIMIZERS for group in case.build([a_matrix()]).param_groups
    }
    assert covered == set(METHODS) - ABSENT


@every
def test_a_quadratic_falls_tenfold(case):
    target, weight = a_matrix(0), nn.Parameter(torch.zeros(6, 10))
    optimizer = case.build([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    start = (weight - target).square().sum().item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = (weight - target).square().sum()
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert loss.item() < start / 10


@every
def test_two_runs_agree_bit_for_bit(case):
    def run():
        weight = a_matrix()
        optimizer = case.build([weight])
        for seed in range(3):
            with_grad(weight, seed)
            optimizer.step()
        return weight

    assert torch.equal(run(), run())


@every
def test_a_parameter_without_gradient_is_left_alone(case):
    idle, busy = a_matrix(0), with_grad(a_matrix(1))
    before = idle.detach().clone()
    case.build([idle, busy], weight_decay=0.1).step()
    assert torch.equal(idle, before)


@stateless
def test_no_state_is_kept(case):
    weight = with_grad(a_matrix())
    optimizer = case.build([weight])
    optimizer.step()
    assert not optimizer.state
    saved = optimizer.state_dict()["state"].values()
    assert sum(x.numel() for own in saved for x in own.values()) == 0


@every
def test_decay_is_decoupled(case):
    weight = a_matrix()
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    case.build([weight], lr=0.5, weight_decay=0.1).step()
    assert_close(weight.detach(), before * (1 - 0.5 * 0.1), rtol=1e-6, atol=0)


@every
def test_maximize_goes_the_other_way(case):
    up, down = with_grad(a_matrix()), with_grad(a_matrix())
    start = up.detach().clone()
    case.build([up], maximize=True).step()
    case.build([down]).step()
    assert_close(up.detach() - start, start - down.detach(), rtol=1e-3, atol=1e-6)


@every
def test_each_group_has_its_own_learning_rate(case):
    one, other = with_grad(a_matrix()), with_grad(a_matrix())
    start = one.detach().clone()
    case.build([{"params": [one]}, {"params": [other], "lr": 3e-3}], lr=1e-3).step()
    assert_close(3 * (one.detach() - start), other.detach() - start, rtol=1e-3, atol=1e-6)


@unit_size
def test_lr_is_the_root_mean_square_of_the_step(case):
    weight = with_grad(a_matrix())
    start = weight.detach().clone()
    case.build([weight], lr=0.5).step()
    assert_close((weight - start).square().mean().sqrt().item(), 0.5, rtol=1e-5, atol=0)


@every
def test_a_tensor_lr_is_the_same_number(case):
    one, other = with_grad(a_matrix()), with_grad(a_matrix())
    case.build([one], lr=0.25, weight_decay=0.1).step()
    case.build([other], lr=torch.tensor(0.25), weight_decay=0.1).step()
    assert_close(one, other, rtol=1e-6, atol=1e-7)


@every
def test_the_closure_is_called_with_gradients_on(case):
    weight, calls = a_matrix(), []

    def closure():
        weight.grad = None
        loss = weight.square().sum()
        loss.backward()
        calls.append(loss)
        return loss

    assert case.build([weight]).step(closure) is calls[0]
    assert len(calls) == 1


@every
def test_a_group_added_later_takes_the_defaults(case):
    first, second = a_matrix(0), with_grad(a_matrix(1))
    optimizer = case.build([first], lr=0.5)
    algorithm = optimizer.param_groups[0]["algorithm"]
    start = second.detach().clone()
    optimizer.add_param_group({"params": [second], "algorithm": algorithm})
    optimizer.step()
    assert optimizer.param_groups[1].keys() == optimizer.param_groups[0].keys()
    assert not torch.equal(second, start)


@matrices_only
def test_a_vector_is_refused_by_name(case):
    with pytest.raises(
        ValueError, match=r"'norm.weight' has shape \(512,\)\. Write \w+\(\w+_groups\("
    ):
        case.build([("norm.weight", nn.Parameter(torch.ones(512)))])


@every
def test_a_sparse_gradient_is_refused_by_name(case):
    table = nn.Embedding(4, 3, sparse=True)
    optimizer = case.build(list(table.named_parameters()))
    table(torch.tensor([1])).sum().backward()
    said = "'weight' has a sparse gradient, and .* needs dense ones, whichever algorithm"
    with pytest.raises(TypeError, match=said):
        optimizer.step()


@every
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
def test_only_real_floating_parameters_are_taken(case, dtype):
    weight = nn.Parameter(torch.ones(2, 2, dtype=dtype), requires_grad=dtype.is_complex)
    with pytest.raises(TypeError, match=f"'w' is {dtype}"):
        case.build([("w", weight)])


@every
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": torch.ones(2)}, r"lr must be one number, got a tensor of shape \(2,\)"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of .*, got 'ignore'"),
    ],
)
def test_options_out_of_range_are_named(case, options, message):
    with pytest.raises(ValueError, match=message):
        case.build([a_matrix()], **options)


def test_a_refused_group_leaves_no_trace():
    optimizer = sinkgd.SinkGD([a_matrix()])
    with pytest.raises(ValueError, match="did you mean 'sinkgd'"):
        optimizer.add_param_group({"params": [a_matrix(1)], "algorithm": "sinkdg"})
    with pytest.raises(ValueError, match="sinkhorn_iterations must be at least 1, got 0"):
        optimizer.add_param_group({"params": [a_matrix(1)], "sinkhorn_iterations": 0})
    assert len(optimizer.param_groups) == 1


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_take_the_same_step_rounded_once(case, dtype):
    if dtype == torch.float64 and not case.takes_float64:
        pytest.skip("it refuses float64")
    weight = with_grad(nn.Parameter(a_matrix().to(dtype)))
    wide = nn.Parameter(weight.detach().to(torch.promote_types(dtype, torch.float32)))
    wide.grad = weight.grad.to(wide.dtype)
    case.build([weight], lr=0.1, weight_decay=0.1).step()
    case.build([wide], lr=0.1, weight_decay=0.1).step()
    if case.has_state:  # AdamW's state has the parameter's dtype, so it rounds more than once
        assert_close(weight, wide.to(dtype), rtol=2e-2, atol=2e-2)
    else:
        assert torch.equal(weight, wide.to(dtype))


@stateless  # torch's AdamW needs gradients of the parameter's dtype
def test_gradients_may_have_another_dtype_than_weights(case):
    weight = a_matrix()
    weight.grad = torch.randn_like(weight)
    mixed, plain = nn.Parameter(weight.detach().double()), nn.Parameter(weight.detach().double())
    plain.grad = weight.grad.double()
    mixed.grad_dtype = None  # lets the gradient have a dtype of its own
    mixed.grad = weight.grad
    case.build([mixed]).step()
    case.build([plain]).step()
    assert_close(mixed, plain, rtol=1e-6, atol=1e-8)


@every
def test_an_empty_parameter_is_passed_over(case):
    empty = nn.Parameter(torch.zeros(0, 4))
    empty.grad = torch.zeros(0, 4)
    weight = with_grad(a_matrix())
    start = weight.detach().clone()
    case.build([empty, weight]).step()
    assert not torch.equal(weight, start)


@every
def test_a_transposed_parameter_takes_the_same_step(case):
    plain = with_grad(a_matrix())
    strided = nn.Parameter(plain.detach().t().contiguous().t())
    strided.grad = plain.grad.t().contiguous().t()
    case.build([plain]).step()
    case.build([strided]).step()
    assert_close(plain, strided)


@every
def test_a_step_changes_weights_in_place_and_not_gradients(case):
    weight = with_grad(a_matrix())
    pointer, grad = weight.data_ptr(), weight.grad.clone()
    case.build([weight]).step()
    assert weight.data_ptr() == pointer
    assert torch.equal(weight.grad, grad)


@every
def test_copies_go_on_as_the_original_would(case):
    weight = with_grad(a_matrix())
    optimizer = case.build([weight])
    optimizer.step()
    twin_weight, twin = copy.deepcopy((weight, optimizer))
    for w, o in ((weight, optimizer), (twin_weight, twin)):
        w.grad = with_grad(a_matrix(), 7).grad
        o.step()
    assert torch.equal(weight, twin_weight)
