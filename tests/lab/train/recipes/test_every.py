"""Every recipe trains, in float32 and in bfloat16, goes on from a checkpoint, and obeys a rate."""

import pytest
import torch

from lab.train.recipes.tiny import FASTER, built, soon, tiny_model, train
from sinkgd.lab.train.checkpoint import load_checkpoint, save_checkpoint
from sinkgd.lab.train.recipes import RECIPES
from sinkgd.lab.train.state import TrainingState

recipes = pytest.mark.parametrize("recipe", RECIPES)
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@precisions
@recipes
def test_the_loss_falls_and_every_parameter_moves(recipe, dtype):
    model = tiny_model(dtype=dtype)
    before = [param.detach().clone() for param in model.parameters()]
    losses = train(model, built(model, recipe, **FASTER.get(recipe, {})), 6)
    assert losses[-1] < losses[0]
    for (name, param), old in zip(model.named_parameters(), before, strict=True):
        # A norm's weights are at 1, where bfloat16 cannot hold a small step.
        assert name.endswith("norm.weight") or not torch.equal(param, old), name


@precisions
@recipes
def test_it_goes_on_bit_for_bit(tmp_path, recipe, dtype):
    def new_state(seed: int) -> TrainingState:
        model = tiny_model(dtype=dtype, seed=seed)
        return TrainingState(model, built(model, recipe, **soon(recipe), **FASTER.get(recipe, {})))

    whole, resumed = new_state(0), new_state(1)
    train(whole.model, whole.optimizer, 3)
    load_checkpoint(save_checkpoint(tmp_path, whole.as_dict(), keep=1), resumed)
    assert train(resumed.model, resumed.optimizer, 6) == train(whole.model, whole.optimizer, 6)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@recipes
def test_the_schedules_rate_reaches_every_parameter(recipe):
    model = tiny_model()
    optimizer = built(model, recipe)
    train(model, optimizer, 2)
    for group in optimizer.param_groups:
        assert group["initial_lr"] == group["lr"] > 0
        group["lr"] = 0.0
    before = [param.detach().clone() for param in model.parameters()]
    train(model, optimizer, 2)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@recipes
def test_the_state_is_tensors_and_numbers(recipe):
    """Objects would be pickled into checkpoints, and their bytes not counted."""
    model = tiny_model()
    optimizer = built(model, recipe)
    train(model, optimizer, 2)
    for state in optimizer.state.values():
        for value in state.values():
            for item in value if isinstance(value, list) else [value]:
                # SOAP has an empty list for a side without a basis.
                assert isinstance(item, torch.Tensor | int | float) or item == []


@recipes
def test_two_runs_have_the_same_bits(recipe):
    curves = []
    for _ in range(2):
        torch.rand(3)  # the global generator is elsewhere
        model = tiny_model()
        curves.append(train(model, built(model, recipe, **soon(recipe)), 5))
    assert curves[0] == curves[1]
