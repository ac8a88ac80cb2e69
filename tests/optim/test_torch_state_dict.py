"""torch.distributed.checkpoint.state_dict serves our optimizers with its defaults, as its own.

It probes an optimizer without state by a step along zero gradients at a learning rate of zero, and
takes a parameter that it finds no state of for a loss.
"""

import copy
import warnings
from itertools import product

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sinkgd
from optimizer_cases import OPTIMIZERS
from spawn import on_ranks

ROUNDING = {"rounding": "stochastic", "seed": 7}
every_input = pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(case, options, id=f"{case}-{options}")
        for case in OPTIMIZERS
        for options in [*(case.options or [{}]), ROUNDING]
    ],
)


class Model(nn.Module):
    def __init__(self, takes_vectors=True, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(4, 6), (6, 4), (4,)] if takes_vectors else [(4, 6), (6, 4)]
        self.params = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes
        )


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    optimizer.step()
    optimizer.zero_grad()


def build(case, options):
    """Build a model and its optimizer; None where the method does not round stochastically."""
    is_rounded = options is ROUNDING
    model = Model(case.takes_vectors, torch.bfloat16 if is_rounded else torch.float32)
    try:
        return model, case.build(list(model.parameters()), **options)
    except (TypeError, ValueError):
        assert is_rounded, "every other option is the method's"
        return None, None


def same(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@every_input
def test_saving_changes_no_later_step(case, options):
    model, optimizer = build(case, options)
    if model is None:
        pytest.skip("rounds to the nearest alone")
    watched, saved = copy.deepcopy(model), None
    other = case.build(list(watched.parameters()), **options)
    for seed in range(3):
        for _ in range(3):
            saved = get_optimizer_state_dict(watched, other)
        step(model, optimizer, seed)
        step(watched, other, seed)
        assert same(model, watched)
    ours, theirs = optimizer.state_dict()["param_groups"], saved["param_groups"]
    assert len(ours) == len(theirs)


@every_input
def test_probing_changes_nothing_but_empty_state(case, options):
    model, optimizer = build(case, options)
    if model is None:
        pytest.skip("rounds to the nearest alone")
    before = str(optimizer.state_dict()["param_groups"]), copy.deepcopy(model)
    get_optimizer_state_dict(model, optimizer)
    assert str(optimizer.state_dict()["param_groups"]) == before[0]
    assert same(model, before[1])
    made = {key for own in optimizer.state.values() for key in own}
    step(model, optimizer, 0)
    assert made == {key for own in optimizer.state.values() for key in own}


@pytest.mark.parametrize("recipe", ["stochastic", "hybrid", "spam"])
def test_saving_changes_no_later_step_where_gradients_are_released(recipe):
    model, watched = a_model(), a_model()
    optimizer, other = RECIPES[recipe](model), RECIPES[recipe](watched)
    with sinkgd.GradientRelease(other):
        for seed in range(3):
            get_optimizer_state_dict(watched, other)
            train(model, optimizer, [seed])
            train(watched, other, [seed])
            assert same(model, watched)


def test_a_step_at_a_rate_of_zero_is_a_step():
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = sinkgd.SinkGD([weight], lr=0.0, momentum=0.5)
    weight.grad = torch.ones(3, 4)
    optimizer.step()
    assert optimizer.state[weight]["momentum_buffer"].ne(0).all()


@pytest.mark.parametrize("tensor_lr", [True, False])
def test_a_probe_is_known_by_its_rate_whatever_its_type(tensor_lr):
    weight = nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    optimizer = sinkgd.SinkGD([weight], lr=lr, **ROUNDING)
    get_optimizer_state_dict(nn.ParameterList([weight]), optimizer)
    assert optimizer.param_groups[0]["rounding_step"] == 0


# Strict, as by default ----------------------------------------------------------------------------

RECIPES = {
    "hybrid": lambda model: sinkgd.SinkGD(sinkgd.param_groups(model)),
    "stateless": lambda model: sinkgd.SinkGD(model.named_parameters(), lr=1e-3),
    "stochastic": lambda model: sinkgd.SinkGD(model.parameters(), lr=1e-3, **ROUNDING),
    "warm": lambda model: sinkgd.SinkGDVariant(sinkgd.param_groups(model), warm_start=True),
    "momentum": lambda model: sinkgd.SinkGD(sinkgd.param_groups(model), momentum=0.9),
    "swan": lambda model: sinkgd.SWAN(sinkgd.param_groups(model, matrix_algorithm="swan")),
    "mngd": lambda model: sinkgd.MNGD(
        sinkgd.param_groups(model, matrix_algorithm="mngd"), norms=[sinkgd.RowNorm()]
    ),
    "scale": lambda model: sinkgd.SCALE(sinkgd.scale_groups(model)),
    "tempered": lambda model: sinkgd.TemperedSinkGD(model.parameters()),
    "spam": lambda model: sinkgd.SPAM(model.parameters()),
    "adamw-spam": lambda model: sinkgd.AdamWSPAM(model.parameters()),
}
OPTIONS = [
    {},
    {"full_state_dict": True},
    {"cpu_offload": True},
    {"full_state_dict": True, "cpu_offload": True},
    {"flatten_optimizer_state_dict": True},
]  # "full" and "flatten" together are a KeyError of torch, for its own AdamW, too


def a_model(mesh=None):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)
    )
    return model if mesh is None else fully_shard(model, mesh=mesh)


def train(model, optimizer, steps):
    for seed in steps:
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        model(torch.randn(5, 6, generator=generator)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def local(x):
    return x.to_local() if hasattr(x, "to_local") else x


def resumed_is_uninterrupted(recipe, options, mesh=None):
    """Train, save, load into a new optimizer with torch's default options, and compare."""
    model = a_model(mesh)
    optimizer = RECIPES[recipe](model)
    train(model, optimizer, range(3))
    options = StateDictOptions(**options)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    if mesh is not None and options.full_state_dict and options.cpu_offload:
        lists = [saved]  # only rank 0 has it
        torch.distributed.broadcast_object_list(lists)
        (saved,) = lists

    other_model = a_model(mesh)
    with torch.no_grad():
        for own, param in zip(other_model.parameters(), model.parameters(), strict=True):
            own.copy_(param)
    other = RECIPES[recipe](other_model)
    set_optimizer_state_dict(other_model, other, saved, options=options)
    train(model, optimizer, range(3, 6))
    train(other_model, other, range(3, 6))
    pairs = zip(model.parameters(), other_model.parameters(), strict=True)
    return all(torch.equal(local(a), local(b)) for a, b in pairs)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "defaults")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_loaded_optimizer_goes_on(recipe, options):
    assert resumed_is_uninterrupted(recipe, options)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("has_gradients", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_distributed_checkpoint_goes_on(recipe, has_gradients, flatten, tmp_path):
    """It is saved after a step, with and without gradients, and loaded into a new optimizer."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, other_model = a_model(), a_model()
    optimizer, other = RECIPES[recipe](model), RECIPES[recipe](other_model)
    train(model, optimizer, range(3))
    if has_gradients:  # torch then creates no state
        for param in model.parameters():
            param.grad = torch.ones_like(param)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
    found = get_optimizer_state_dict(other_model, other, options=options)
    dcp.load({"optimizer": found}, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other_model, other, found, options=options)
    other_model.load_state_dict(model.state_dict())
    train(model, optimizer, range(3, 6))
    train(other_model, other, range(3, 6))
    assert same(model, other_model)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "defaults")
def test_an_optimizer_without_state_is_loaded_where_gradients_exist(options):
    model, options = a_model(), StateDictOptions(**options)
    optimizer = RECIPES["stateless"](model)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other = RECIPES["stateless"](model)
    other.param_groups[0]["lr"] = 1.0
    model(torch.ones(5, 6)).square().mean().backward()
    set_optimizer_state_dict(model, other, saved, options=options)
    assert other.param_groups[0]["lr"] == 1e-3


def test_loading_keeps_the_options_of_the_machine_and_loads_the_others():
    saved = sinkgd.SinkGD([nn.Parameter(torch.ones(4, 3))], lr=0.5, momentum=0.25).state_dict()
    own = {"backend": "eager", "nonfinite": "skip"}
    optimizer = sinkgd.SinkGD([nn.Parameter(torch.ones(4, 3))], lr=0.125, momentum=0.5, **own)
    optimizer.load_state_dict(saved)
    expected = {**own, "lr": 0.5, "momentum": 0.25}
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected


def test_a_state_dict_that_is_refused_is_not_kept():
    optimizer = sinkgd.SinkGD([nn.Parameter(torch.ones(4, 3))], lr=0.5)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["params"] = [0, 1]  # torch counts them
    before = {*vars(optimizer)}
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(saved)
    assert {*vars(optimizer)} == before


def test_empty_entries_that_were_loaded_do_not_outlive_their_parameters():
    """accelerate loads an optimizer's own state, and then replaces the parameters for FSDP2."""
    model = a_model()
    optimizer = RECIPES["stateless"](model)
    optimizer.load_state_dict(optimizer.state_dict())
    group = optimizer.param_groups[0]
    group["params"] = [nn.Parameter(param.detach().clone()) for param in group["params"]]
    assert len(optimizer.state_dict()["state"]) == len(group["params"])


def results_on_mesh():
    warnings.filterwarnings("ignore", category=FutureWarning)
    mesh = init_device_mesh("cpu", (2,))
    return {
        (recipe, *options): resumed_is_uninterrupted(recipe, options, mesh)
        for recipe, options in product(["hybrid", "stateless", "stochastic", "spam"], OPTIONS)
    }


def test_a_loaded_optimizer_goes_on_under_fsdp2():
    for found in on_ranks(2, results_on_mesh):
        assert all(found.values()), found
