"""A parameter that a trainer exchanged is looked at by the first step that meets it."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sinkgd
from optimizer_cases import OPTIMIZERS
from spawn import on_ranks

ELEMENTWISE = {"SinkGD-adamw", "SinkGD-adamw-8bit", "SPAM"} & {case.name for case in OPTIMIZERS}
every = pytest.mark.parametrize("case", OPTIMIZERS, ids=str)
refusing = pytest.mark.parametrize(
    "case", [case for case in OPTIMIZERS if case.name not in ELEMENTWISE], ids=str
)


def weights(count=2):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(count)]


def named(params):
    return [(f"layers.{i}", param) for i, param in enumerate(params)]


def with_grads(params):
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def one_flat_piece(params):
    """Make what DeepSpeed ZeRO-1 and ZeRO-2 make of a group: this rank's share, one vector."""
    return [nn.Parameter(torch.cat([param.detach().flatten() for param in params])[:13])]


def flat_pieces(params):
    return [nn.Parameter(param.detach().flatten()) for param in params]


@refusing
@pytest.mark.parametrize("exchange", [one_flat_piece, flat_pieces])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_flat_pieces_are_refused_by_name(case, exchange, steps_before):
    params = with_grads(weights())
    optimizer = case.build(named(params))
    for _ in range(steps_before):
        optimizer.step()
    pieces = with_grads(exchange(params))
    before = copy.deepcopy(pieces)
    optimizer.param_groups[0]["params"] = pieces
    for _ in range(2):
        with pytest.raises(TypeError, match=r"'layers\.0' had shape \(3, 4\) .* ZeRO-1"):
            optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(pieces, before, strict=True))


def flat_data(params):
    for param in params:
        param.grad = None
        param.data = param.data.flatten()


def no_data(params):
    """What partitioning leaves of a parameter whose piece lies elsewhere."""
    for param in params:
        param.grad = None
        param.data = param.data.new_empty(0)


@refusing
@pytest.mark.parametrize("change", [flat_data, no_data])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_parameter_that_became_a_flat_piece_is_refused_by_name(case, change, steps_before):
    params = with_grads(weights())
    optimizer = case.build(named(params))
    for _ in range(steps_before):
        optimizer.step()
    change(params)
    before = copy.deepcopy(with_grads(params))
    for _ in range(2):
        with pytest.raises(TypeError, match=r"'layers\.0' had shape \(3, 4\) .* shape \((12|0),\)"):
            optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(params, before, strict=True))


with_state = pytest.mark.parametrize("case", [c for c in OPTIMIZERS if c.has_state], ids=str)
other_shape = pytest.mark.parametrize("shape", [(5, 7), (3000, 400)], ids=str)


@with_state
@other_shape
def test_state_of_another_shape_is_refused_by_name(case, shape):
    """Fused kernels read other memory than that of the moments, and may end the process."""
    params = with_grads(weights())
    optimizer = case.build(named(params))
    optimizer.step()
    params[1].grad = None
    params[1].data = torch.ones(shape)
    before = copy.deepcopy(with_grads(params))
    for _ in range(2):
        with pytest.raises(TypeError, match=r"'layers\.1' .*shape"):
            optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(params, before, strict=True))


@with_state
@other_shape
def test_saved_state_of_another_shape_is_refused_by_name(case, shape):
    saved = case.build(named(with_grads(weights())))
    saved.step()
    first, _ = weights()
    optimizer = case.build(named([first, nn.Parameter(torch.ones(shape))]))
    with pytest.raises(ValueError, match=r"'layers\.1' has shape \(\d+, \d+\), and its \w+ was"):
        optimizer.load_state_dict(saved.state_dict())
    assert not optimizer.state


def test_a_parameter_that_became_float16_is_checked_again():
    model = nn.Linear(4, 3, bias=False).bfloat16()
    optimizer = sinkgd.SinkGD(model.named_parameters(), rounding="stochastic")
    model.half()
    with_grads(model.parameters())
    with pytest.raises(ValueError, match="'weight' is float16"):
        optimizer.step()


@every
@pytest.mark.parametrize(
    ("dtype", "other"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_a_model_that_changed_its_dtype_is_trained(case, dtype, other):
    if other == torch.float64 and not case.takes_float64:
        pytest.skip("it refuses float64")
    params = with_grads([nn.Parameter(param.detach().to(dtype)) for param in weights()])
    optimizer = case.build(named(params), lr=0.1)
    optimizer.step()
    for param in params:
        param.grad, param.data = None, param.data.to(other)
    before = copy.deepcopy(with_grads(params))
    optimizer.step()
    assert all(one.ne(was).any() for one, was in zip(params, before, strict=True))
    assert all(param.dtype == other for param in params)


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_goes_on_from_moments_of_another_dtype_as_after_loading(fused):
    def walk(changed):
        params = with_grads(weights())
        groups = [{"params": params, "algorithm": "adamw", "fused": fused}]
        optimizer = sinkgd.SinkGD(groups, lr=0.1)
        optimizer.step()
        for param in params:
            param.grad, param.data = None, param.data.bfloat16()
        if not changed:
            loaded = sinkgd.SinkGD([{**groups[0], "params": params}], lr=0.1)
            loaded.load_state_dict(optimizer.state_dict())
            optimizer = loaded
        with_grads(params)
        optimizer.step()
        return params

    for one, other in zip(walk(changed=True), walk(changed=False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_flat_pieces_are_as_good_where_entries_go_by_themselves(name):
    (case,) = (case for case in OPTIMIZERS if case.name == name)
    params = with_grads(weights())
    whole, flat = case.build(params, lr=0.1), case.build(weights(), lr=0.1)
    piece = with_grads(one_flat_piece(params))
    flat.param_groups[0]["params"] = piece
    whole.step()
    flat.step()
    assert torch.equal(piece[0], one_flat_piece(params)[0])


@every
def test_a_parameter_of_a_lazy_module_is_refused_by_name(case):
    lazy = nn.LazyLinear(5, bias=False)
    message = "'proj.weight' .* run one forward pass first"
    with pytest.raises(ValueError, match=message):
        case.build([("proj.weight", lazy.weight)], lr=0.1)
    optimizer = case.build([("proj.first", weights(1)[0])], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(
            {**optimizer.param_groups[0], "params": [("proj.weight", lazy.weight)]}
        )
    assert len(optimizer.param_groups) == 1


@every
def test_parameters_of_the_same_shape_are_taken(case):
    params = weights()
    optimizer = case.build(named(params), lr=0.1)
    others = with_grads(weights())
    optimizer.param_groups[0]["params"] = others
    optimizer.step()
    assert all(other.ne(own).any() for own, other in zip(params, others, strict=True))


@every
def test_what_does_not_fit_is_refused_at_the_step(case):
    params = weights()
    optimizer = case.build(named(params))
    optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.ones(3, 4, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"'layers\.1' is torch\.complex64"):
        optimizer.step()


def test_parameters_can_be_added_to_the_list_and_taken_from_it():
    params = with_grads(weights(3))
    optimizer = sinkgd.SinkGD(params[:2], lr=0.1)
    optimizer.param_groups[0]["params"].append(params[2])
    optimizer.step()
    assert params[2].ne(weights(3)[2]).all()
    del optimizer.param_groups[0]["params"][0]
    before = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], before)


def test_a_parameter_can_be_taken_from_the_list_while_another_changes_its_dtype():
    kept, gone = with_grads(weights(2))
    optimizer = sinkgd.SinkGD([kept, gone], lr=0.1)
    del optimizer.param_groups[0]["params"][1]
    kept.data = kept.data.bfloat16()
    kept.grad = torch.ones_like(kept)
    optimizer.step()
    assert kept.ne(weights(2)[0].bfloat16()).all()


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: x], ids=["copied", "itself"])
def test_groups_can_be_removed_and_optimizers_copied(twin):
    params = with_grads(weights())
    optimizer = sinkgd.SinkGD([{"params": [param]} for param in params], lr=0.1)
    optimizer = twin(optimizer)
    del optimizer.param_groups[0]
    optimizer.step()


def exchanged_by_accelerate():
    """Shard a model after its optimizer was made, as accelerate does, and train it."""
    from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))

    def train(made, optimizer):
        torch.manual_seed(1)
        for _ in range(3):
            made(torch.randn(5, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, pieces = model(), model()
    expected = sinkgd.SinkGD(sinkgd.param_groups(whole, deflated_rank=0))
    train(whole, expected)
    optimizer = sinkgd.SinkGD(sinkgd.param_groups(pieces, deflated_rank=0))
    old = {name: param.data_ptr() for name, param in pieces.named_parameters()}
    fully_shard(pieces, mesh=init_device_mesh("cpu", (2,)))
    new = dict(pieces.named_parameters())
    for group in optimizer.param_groups:  # as Accelerator._prepare_fsdp2 does before it switches
        for i, param in enumerate(group["params"]):
            group["params"][i] = torch.empty_like(param)
            group["params"][i].data_ptr = param.data_ptr()
    fsdp2_switch_optimizer_parameters(optimizer, {old[name]: new[name] for name in old})
    train(pieces, optimizer)
    return max(
        (param.full_tensor() - dict(whole.named_parameters())[name]).abs().max().item()
        for name, param in new.items()
    )


def test_what_accelerate_exchanges_for_fsdp2_is_trained():
    pytest.importorskip("accelerate")
    assert max(on_ranks(2, exchanged_by_accelerate)) < 1e-5
