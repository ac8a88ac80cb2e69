"""Every group of `param_groups` has a name of its own, which says what is in it."""

import copy
import re

import pytest
import torch
from torch import nn

import sinkgd
from optimizer_cases import OPTIMIZERS


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 7)

    def get_output_embeddings(self):
        return self.head


OPTIONS = {
    "default": ({}, ["matrices-split-3", "matrices", "embeddings-head-vectors"]),
    "decay": (
        {"adamw_lr": 1e-3, "weight_decay": 0.1},
        ["matrices-split-3", "matrices", "embeddings-head", "vectors"],
    ),
    "width": (
        {"lr": 0.02, "matrix_lr_scale": 0.05, "base_width": 8},
        ["matrices-lr-0.001-split-3", "matrices-lr-0.001", "matrices-lr-0.0005",
         "embeddings-head-vectors"],
    ),
    "two algorithms": (
        {"overrides": {r"down\.weight": "swan", "table": "normalize"}},
        ["embeddings", "matrices-sinkgd-split-3", "matrices-sinkgd", "matrices-swan",
         "head-vectors"],
    ),
    "an option of an override": (
        {"overrides": {r"1\.up\.weight": {"momentum": 0.5, "split": 2}}},
        ["matrices-split-3", "matrices", "matrices-split-2-momentum-0.5",
         "embeddings-head-vectors"],
    ),
    "a tensor as the rate": (
        {"lr": torch.tensor(0.5), "overrides": {"table": {"lr": 0.25}}},
        ["matrices-split-3", "matrices", "embeddings", "head-vectors"],
    ),
    "a name of its own": (
        {"overrides": {"head": {"name": "classifier"}, r"norm": {"name": "classifier", "lr": 1.0}}},
        ["matrices-split-3", "matrices", "embeddings-vectors", "classifier-lr-1",
         "classifier-lr-0.08"],
    ),
    "a sequence as an option": (
        {"overrides": {r"1\.up\.weight": {"split": (4, 12)}}},
        ["matrices-split-3", "matrices", "matrices-split-4-12", "embeddings-head-vectors"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_a_name_says_what_is_in_the_group_and_how_it_differs(case):
    options, expected = OPTIONS[case]
    groups = sinkgd.param_groups(Model(), **options)
    assert sorted(group["name"] for group in groups) == sorted(expected)
    assert all(re.fullmatch(r"[\w.-]+", group["name"]) for group in groups)


@pytest.mark.parametrize("groups_of", [sinkgd.param_groups, sinkgd.scale_groups])
def test_rates_that_print_alike_still_give_two_names(groups_of):
    overrides = {r"0\.up\.weight": {"lr": 0.1}, r"1\.up\.weight": {"lr": 0.1 + 1e-12}}
    names = [group["name"] for group in groups_of(Model(), overrides=overrides)]
    assert len({*names}) == len(names)
    assert any(name.endswith("lr-0.1-2") for name in names)


def test_adapters_routers_and_what_is_unknown_have_names():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(8, 3, bias=False)
            self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
            self.adapter = Layer()
            self.unknown = nn.Module()
            self.unknown.weight = nn.Parameter(torch.ones(3, 4))

    model = nn.ModuleList(Mixture() for _ in range(2))
    found = [group["name"] for group in sinkgd.param_groups(model, adamw_lr=0.1, weight_decay=0.1)]
    assert found == ["matrices", "adapters-routers-others"]


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_an_optimizer_keeps_saves_and_loads_a_name(case):
    def build(name):
        group = {"params": [nn.Parameter(torch.ones(4, 6))], **name}
        return case.build([group])

    saved = copy.deepcopy(build({"name": "own"}).state_dict())
    assert saved["param_groups"][0]["name"] == "own"
    unnamed, other = build({}), build({"name": "other"})
    for optimizer in (unnamed, other):
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["name"] == "own"
    other.load_state_dict(build({}).state_dict())  # as versions without names saved it
    assert other.param_groups[0]["name"] == "own"
    assert copy.deepcopy(other).param_groups[0]["name"] == "own"


def test_a_group_that_is_added_gets_another_name():
    model = Model()
    optimizer = sinkgd.SinkGD(sinkgd.param_groups(model.blocks[0]))
    for group in sinkgd.param_groups(model.blocks[1]):
        optimizer.add_param_group(group)
    optimizer.add_param_group({"params": [("table", model.table.weight)], "algorithm": "adamw"})
    names = [group.get("name") for group in optimizer.param_groups]
    first = names[: len(names) // 2]
    assert names == [*first, *(f"{name}-2" for name in first), None]


def test_the_table_shows_the_group_of_each_parameter():
    model = Model()
    groups = sinkgd.param_groups(model)
    of = {name: group["name"] for group in groups for name, _ in group["params"]}
    rows = [line.split() for line in sinkgd.describe_param_groups(model, groups).splitlines()]
    assert rows[0] == ["parameter", "shape", "group", "algorithm", "lr", "why"]
    shown = {row[0]: row[2] for row in rows if row[0] in of}
    assert shown == {name: of[name] for name in shown}
    assert len(shown) == 3
    optimizer = sinkgd.SinkGD(model.named_parameters(), lr=0.1)
    table = sinkgd.describe_param_groups(model, optimizer.param_groups).splitlines()
    assert table[1].split()[2] == "0"  # its number


def test_continuing_adamw_names_the_groups_too():
    model = Model()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    optimizer = sinkgd.from_adamw_state(model, adamw.state_dict())
    assert [group["name"] for group in optimizer.param_groups] == OPTIONS["decay"][1]
