"""A parameter is known by its name in the model, whatever wraps the model or leaves it out."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import sinkgd


class Wrapper(nn.Module):
    """Holds a module under the name that a wrapper of torch gives it."""

    def __init__(self, name, inner):
        super().__init__()
        self.add_module(name, inner)


def model():
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 2))


def in_checkpoint_wrapper():
    wrapped = model()
    wrapped[1] = checkpoint_wrapper(wrapped[1])
    return wrapped


def in_compiled_layer():
    wrapped = model()
    wrapped[1] = torch.compile(wrapped[1], backend="eager")
    return wrapped


WRAPPED = {
    "bare": model,
    "compiled": lambda: torch.compile(model(), backend="eager"),
    "compiled layer": in_compiled_layer,
    "data parallel": lambda: nn.DataParallel(model()),
    "compiled data parallel": lambda: torch.compile(nn.DataParallel(model()), backend="eager"),
    "checkpoint wrapper": in_checkpoint_wrapper,
    "FSDP1": lambda: Wrapper("_fsdp_wrapped_module", model()),
}


def optimizer_of(made):
    names = [(name, param) for name, param in made.named_parameters()]
    matrices = [pair for pair in names if pair[1].ndim == 2]
    vectors = [pair for pair in names if pair[1].ndim < 2]
    groups = [
        {"params": matrices, "algorithm": "sinkgd", "momentum": 0.9},
        {"params": vectors, "algorithm": "adamw"},
    ]
    return sinkgd.SinkGD(groups)


@pytest.mark.parametrize(("saved", "loaded"), [*product(WRAPPED, repeat=2)])
def test_state_is_loaded_across_wrappers(saved, loaded):
    one, other = optimizer_of(WRAPPED[saved]()), optimizer_of(WRAPPED[loaded]())
    one.init_state()
    names = [group["param_names"] for group in other.param_groups]
    other.load_state_dict(one.state_dict())
    assert [group["param_names"] for group in other.param_groups] == names
    assert len(other.state) == len(one.state)


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("groups_of", [sinkgd.param_groups, sinkgd.scale_groups])
def test_overrides_find_parameters_in_wrappers(groups_of, wrapped):
    overrides = {r"^2\.weight$": "normalize", r"^1\.0\.bias$": {"lr": 0.5}}
    groups = groups_of(WRAPPED[wrapped](), overrides=overrides)
    found = {name: group for group in groups for name, _ in group["params"]}
    assert {name[-8:] for name in found if found[name]["algorithm"] == "normalize"} == {"2.weight"}
    assert {name[-4:] for name in found if found[name]["lr"] == 0.5} == {"bias"}


def test_another_order_is_still_refused():
    one, other = optimizer_of(model()), optimizer_of(model())
    saved = one.state_dict()
    saved["param_groups"][0]["param_names"].reverse()
    with pytest.raises(ValueError, match="group 0 of the checkpoint lists its parameters in anoth"):
        other.load_state_dict(saved)


def test_another_name_is_still_refused():
    one, other = optimizer_of(model()), optimizer_of(model())
    saved = one.state_dict()
    saved["param_groups"][1]["param_names"][0] = "module.head.bias"
    with pytest.raises(ValueError, match=r"'0\.bias' is in group 1 of this optimizer, but"):
        other.load_state_dict(saved)


BOTH = [*product([True, False], repeat=2)]  # whether the first and the second group have names


def extended(first_has_names, second_has_names):
    made, head = model(), nn.Linear(2, 2)
    given = made.named_parameters() if first_has_names else made.parameters()
    optimizer = sinkgd.SinkGD(given, lr=0.1)
    more = head.named_parameters(prefix="head") if second_has_names else head.parameters()
    optimizer.add_param_group({"params": more})
    return made, head, optimizer


@pytest.mark.parametrize(("first", "second"), BOTH)
def test_groups_with_and_without_names_can_be_mixed(first, second):
    made, head, optimizer = extended(first, second)
    before = head.weight.detach().clone()
    head(made(torch.randn(3, 4))).square().sum().backward()
    optimizer.step()
    assert head.weight.ne(before).all()
    names = [name for name, _ in optimizer.named_parameters()]
    assert names[0] == ("0.weight" if first else "parameter 0 of group 0")
    assert names[-1] == ("head.bias" if second else "parameter 1 of group 1")


@pytest.mark.parametrize(("saved", "loaded"), [*product(BOTH, repeat=2)])
def test_a_parameter_without_a_name_matches_any(saved, loaded):
    *_, one = extended(*saved)
    *_, other = extended(*loaded)
    known = other if any(loaded) else one  # torch gives unnamed groups the names that were saved
    names = [name for name, _ in known.named_parameters()]
    other.load_state_dict(one.state_dict())
    assert [name for name, _ in other.named_parameters()] == names


def test_a_single_tensor_and_a_set_are_taken_as_torch_takes_them():
    optimizer = sinkgd.SinkGD(nn.Linear(2, 2).named_parameters(), lr=0.1)
    with pytest.raises(TypeError, match="ordered collections"):
        optimizer.add_param_group({"params": {nn.Parameter(torch.ones(2, 2))}})
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(2, 2))})
    assert [name for name, _ in optimizer.named_parameters()][-1] == "parameter 0 of group 1"
