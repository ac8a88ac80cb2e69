"""The table of param_groups says whose rates it shows, and which parameters it leaves out."""

import pytest
import torch
from torch import nn

import sinkgd


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        blocks = (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.emb.weight


def lines_of(model, *args, **options):
    return sinkgd.describe_param_groups(model, *args, **options).splitlines()


def test_the_last_line_says_whose_rates_are_shown():
    model = Tied()
    assert "default rates; pass your groups to see yours" in lines_of(model)[-1]
    assert lines_of(model, lr=0.02)[-1] == "These are the groups of param_groups(model, lr=0.02)."
    groups = sinkgd.param_groups(model, lr=0.02)
    assert lines_of(model, groups)[-1] == "These are the rates of the groups that you passed."
    assert lines_of(model, iter(groups))[:-1] == lines_of(model, lr=0.02)[:-1]
    assert lines_of(model, groups)[1].split()[-2] == "0.0005"


def test_a_parameter_that_is_alone_in_its_line_keeps_its_name():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    rows = [line.split("  ")[0] for line in lines_of(model) if "weight" in line]
    assert rows == ["0.weight", "1.weight", "2.weight", "3.weight"]
    assert any(line.startswith("blocks.*.*.weight ×3") for line in lines_of(Tied()))


def test_a_tied_parameter_is_shown_with_all_its_names():
    (row,) = (line for line in lines_of(Tied()) if line.startswith("emb.weight"))
    assert row.endswith("embedding; tied to head.weight")


def test_parameters_in_no_group_are_counted():
    model = Tied()
    assert not any("in no group" in line for line in lines_of(model))
    model.blocks[1].requires_grad_(False)
    found = "4 frozen parameters are in no group: after unfreezing, such a parameter trains"
    assert any(found in line for line in lines_of(model))
    groups = sinkgd.param_groups(model)
    model.blocks[1][0].weight.requires_grad_(True)
    table = lines_of(model, groups)
    assert "In no group, and so not trained: blocks.1.0.weight." in table
    assert any("3 frozen parameters are in no group" in line for line in table)


def test_a_layer_that_is_unfrozen_trains_once_it_is_added():
    model = Tied()
    layer = model.blocks[1].requires_grad_(False)
    optimizer = sinkgd.SinkGD(sinkgd.param_groups(model))
    layer.requires_grad_(True)
    for group in sinkgd.param_groups(layer, overrides={r"0\.weight": "sinkgd"}):
        optimizer.add_param_group(group)
    assert "In no group" not in sinkgd.describe_param_groups(model, optimizer.param_groups)
    before = layer[0].weight.detach().clone()
    layer(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer[0].weight, before)


def test_groups_without_names_are_shown_with_those_of_the_model():
    model = Tied()
    optimizer = sinkgd.SinkGD(model.parameters(), lr=0.1)
    assert any("blocks.*.*.bias ×6" in line for line in lines_of(model, optimizer.param_groups))
    assert "not a parameter of this model" in lines_of(nn.Linear(1, 1), optimizer.param_groups)[1]


WRONG = {
    "a rate": (0.02, "list of groups, got float; pass the list of param_groups"),
    "an optimizer": (sinkgd.SinkGD([torch.ones(2, 2)], lr=0.1), "got SinkGD; .*optimizer.param_gr"),
    "torch's groups": (torch.optim.SGD([torch.ones(2)]).param_groups, "0 has no 'algorithm'; pass"),
    "tensors": ([torch.ones(2)], "groups must be dicts, got Tensor; pass"),
    "nothing": ([], "groups must be a list of groups, got list; pass"),
}


@pytest.mark.parametrize(("groups", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_list_of_groups_is_refused_with_the_remedy(groups, message):
    with pytest.raises(TypeError, match=message):
        sinkgd.describe_param_groups(Tied(), groups)


def test_groups_and_options_at_once_and_unknown_options_are_refused():
    model = Tied()
    with pytest.raises(TypeError, match="got groups and lr; leave one of them out"):
        sinkgd.describe_param_groups(model, sinkgd.param_groups(model), lr=0.02)
    with pytest.raises(TypeError, match="did you mean 'deflated_rank'"):
        sinkgd.describe_param_groups(model, deflate_rank=3)
