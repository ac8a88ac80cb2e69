"""accelerate prepares, scales, saves and resumes our optimizers as it does torch's."""

import math

import pytest
import torch
from torch import nn

import sinkgd
from same_state import differences

accelerate = pytest.importorskip("accelerate")

RECIPES = {
    "hybrid": lambda model: sinkgd.SinkGD(sinkgd.param_groups(model)),
    "stateless": lambda model: sinkgd.SinkGD(model.named_parameters(), lr=1e-3),
    "momentum": lambda model: sinkgd.SinkGD(model.parameters(), lr=1e-3, momentum=0.9),
    "spam": lambda model: sinkgd.SPAM(model.parameters()),
    "torch": lambda model: torch.optim.AdamW(model.parameters()),
}


@pytest.fixture
def accelerator():
    # A trainer of an earlier test may have left the state of its process group behind.
    forget = accelerate.state.AcceleratorState._reset_state
    forget(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True)
    forget(reset_partial_state=True)


def a_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))


def train(accelerator, model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
        accelerator.backward(model(x).square().mean())
        optimizer.step()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_saved_state_goes_on(accelerator, recipe, tmp_path):
    def prepared():
        model = a_model()
        return accelerator.prepare(model, RECIPES[recipe](model))

    model, optimizer = prepared()
    train(accelerator, model, optimizer, range(3))
    accelerator.save_state(tmp_path)
    train(accelerator, model, optimizer, range(3, 6))
    expected = [param.detach().clone() for param in model.parameters()]
    accelerator.load_state(tmp_path)
    train(accelerator, model, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_another_process_goes_on_from_a_saved_state(recipe, precision, tmp_path):
    """With a schedule, accumulation and clipping, into objects that have not taken a step."""

    def run(steps, *, load=False, save=False):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
        )
        model = a_model()
        optimizer = RECIPES[recipe](model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        if load:
            accelerator.load_state(tmp_path)
        for seed in steps:
            with accelerator.accumulate(model):
                x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
                accelerator.backward(model(x).square().mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if save and seed == 5:
                accelerator.save_state(tmp_path)
        return [own.state_dict() for own in (model, optimizer, schedule)]

    expected = run(range(12), save=True)
    assert differences(run(range(6, 12), load=True), expected) == []


@pytest.mark.parametrize("factor", [1.0, math.inf])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_skipped_step_is_known(accelerator, recipe, factor):
    del accelerator
    model = a_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(RECIPES[recipe](model), scaler=scaler)
    before = [param.detach().clone() for param in model.parameters()]
    scaler.scale(sum((param * factor).sum() for param in model.parameters())).backward()
    optimizer.step()
    assert optimizer.step_was_skipped == (factor == math.inf)
    kept = [torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True)]
    assert all(kept) if factor == math.inf else not any(kept)
