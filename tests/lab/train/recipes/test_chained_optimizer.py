"""A chained optimizer is one: its groups and its state are those of its parts; nothing is lost."""

import pytest
import pytorch_optimizer
import torch
from torch import nn

from lab.train.recipes.tiny import built, soon, tiny_model, train
from sinkgd.lab.train.config import OptimizerConfig
from sinkgd.lab.train.recipes import RECIPES
from sinkgd.lab.train.recipes.chained_optimizer import ChainedOptimizer
from sinkgd.lab.train.resolve import check_ranks
from sinkgd.lab.train.state import state_tensors


def pair():
    matrix, vector = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    parts = [torch.optim.Muon([matrix], lr=0.1), torch.optim.AdamW([vector], lr=0.2)]
    return matrix, vector, ChainedOptimizer(parts)


def stepped(matrix, vector, optimizer):
    matrix.grad, vector.grad = torch.ones(4, 4), torch.ones(4)
    optimizer.step()


def test_a_rate_that_is_set_in_it_is_the_parts():
    matrix, vector, optimizer = pair()
    optimizer.param_groups[0]["lr"] = 0.0
    stepped(matrix, vector, optimizer)
    assert torch.equal(matrix, torch.ones(4, 4))
    assert not torch.equal(vector, torch.ones(4))


def test_a_rate_that_is_set_after_loading_is_the_parts_too():
    matrix, vector, optimizer = pair()
    stepped(matrix, vector, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = matrix.detach().clone(), vector.detach().clone()
    stepped(matrix, vector, optimizer)
    assert torch.equal(matrix, before[0])
    assert torch.equal(vector, before[1])


def test_torchs_schedulers_take_it():
    _, _, optimizer = pair()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    stepped(*pair())
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [0.05, 0.1]


def test_a_closure_is_called_once():
    matrix, vector, optimizer = pair()
    calls = []

    def closure():
        calls.append(None)
        optimizer.zero_grad()
        loss = matrix.sum() + vector.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 20
    assert len(calls) == 1
    assert set(optimizer.state) == {matrix, vector}


def test_a_parameter_in_two_parts_is_refused():
    matrix = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match="more than one parameter group"):
        ChainedOptimizer([torch.optim.Muon([matrix]), torch.optim.AdamW([matrix])])


def test_a_group_that_no_part_would_step_is_refused():
    _, _, optimizer = pair()
    with pytest.raises(TypeError, match="add the group to one of its optimizers"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize("recipe", ["galore", "fira"])
def test_projections_are_counted(recipe):
    model = tiny_model()
    optimizer = built(model, recipe)
    train(model, optimizer, 1)
    matrix = model.model.layers[0].mlp.up_proj.weight
    assert optimizer.state[matrix]["projection"].shape == (4, 16)
    assert any(x is optimizer.state[matrix]["projection"] for x in state_tensors(optimizer))


def test_the_library_itself_forgets_its_projections_or_pickles_them():
    """Why projections are moved; should this fail, `WithProjections` is not needed any more."""
    weight = nn.Parameter(torch.ones(8, 4))
    projection = {"rank": 2, "update_proj_gap": 200, "scale": 1.0, "projection_type": "std"}
    optimizer = pytorch_optimizer.GaLore([{"params": [weight], **projection}])
    weight.grad = torch.ones(8, 4)
    optimizer.step()
    (state,) = optimizer.state_dict()["state"].values()
    assert not isinstance(state["projector"], torch.Tensor)


def test_stable_spam_counts_its_steps_in_the_groups():
    model = tiny_model()
    optimizer = built(model, "stable-spam", **soon("stable-spam"))
    train(model, optimizer, 7)
    assert optimizer.state_dict()["param_groups"][0]["total_step"] == 7
    other = tiny_model()
    resumed = built(other, "stable-spam", **soon("stable-spam"))
    resumed.load_state_dict(optimizer.state_dict())
    train(other, resumed, 1)
    assert resumed.param_groups[0]["total_step"] == 8


@pytest.mark.parametrize("recipe", RECIPES)
def test_several_ranks_are_refused_by_name_where_weights_must_be_whole(recipe):
    options = OptimizerConfig(recipe)
    check_ranks(options, 1)
    if RECIPES[recipe].can_shard:
        check_ranks(options, 2)
        return
    with pytest.raises(ValueError, match=rf"{recipe!r}, which needs .* 2 ranks .* use one of sink"):
        check_ranks(options, 2)


def test_the_recipes_that_take_pieces_are_known():
    able = [name for name, recipe in RECIPES.items() if recipe.can_shard]
    torchs = ["adam", "adamw", "adamw-one-lr", "sgd", "sgd-momentum"]
    spam = ["tempered", "spam", "adamw-spam"]
    norms = ["scale", "rows-only", "columns-only", "frobenius", "sign"]
    ours = ["sinkgd", "sinkgd-paper", "sinkgd-finetune", "sinkgd-stateless"]
    assert able == [*ours, *spam, *norms, *torchs]
