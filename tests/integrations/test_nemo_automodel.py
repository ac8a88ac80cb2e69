"""NeMo Automodel reads the optimizer from a recipe's YAML, schedules, saves and loads it.

`make test-plugin-nemo_automodel` runs it, with the versions in pins/nemo_automodel.txt.

Whole recipes were not run: they need a GPU.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed import checkpoint

import sinkgd
from tiny_llama import save_tiny_llama

pytest.importorskip(
    "nemo_automodel",
    reason="`make test-plugin-nemo_automodel` runs it",
    exc_type=ImportError,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of NeMo and of what it imports

RECIPE = """
optimizer:
  _target_: sinkgd.integrations.nemo_automodel.SinkGDConfig
  options:
    adamw_lr: 1.0e-2
    weight_decay: 0.03
lr_scheduler:
  lr_decay_style: cosine
  lr_warmup_steps: 2
"""


def build(folder, recipe=RECIPE):
    """Build a model, its optimizers and schedulers, as recipes do."""
    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.recipes._typed_config import RecipeConfig
    from transformers import LlamaForCausalLM

    file = folder / "recipe.yaml"
    file.write_text(recipe)
    config = RecipeConfig(load_yaml_config(file))
    model = LlamaForCausalLM.from_pretrained(save_tiny_llama(folder / "model"))
    optimizers = config.optimizer.build(model, device_mesh=None, is_peft=False)
    steps = SimpleNamespace(epoch_len=None, max_steps=10)  # all that the scheduler reads
    return model, optimizers, config.lr_scheduler.build(optimizers, steps)


def train(model, optimizers, schedulers, seeds):
    for seed in seeds:
        tokens = torch.randint(10, (2, 8), generator=torch.Generator().manual_seed(seed))
        model(input_ids=tokens, labels=tokens).loss.backward()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step(1)
            optimizer.zero_grad()


def test_the_scheduler_keeps_the_ratios_of_rates_and_decays(tmp_path):
    model, optimizers, schedulers = build(tmp_path)
    (optimizer,) = optimizers
    assert isinstance(optimizer, sinkgd.SinkGD)
    plain = sinkgd.SinkGD(sinkgd.param_groups(model, adamw_lr=1e-2, weight_decay=0.03))
    for steps in (2, 3):  # the warmup ends, and then the rate decays
        train(model, optimizers, schedulers, range(steps))
        factor = optimizer.param_groups[0]["lr"] / plain.param_groups[0]["lr"]
        assert factor == pytest.approx(1) if steps == 2 else 0.1 < factor < 0.9
        for own, expected in zip(optimizer.param_groups, plain.param_groups, strict=True):
            assert own["param_names"] == expected["param_names"]
            assert own["lr"] == pytest.approx(factor * expected["lr"])
            assert own["weight_decay"] == pytest.approx(expected["weight_decay"])


def test_a_checkpoint_continues(tmp_path):
    from nemo_automodel.components.checkpoint.stateful_wrappers import OptimizerState

    model, optimizers, schedulers = build(tmp_path)
    train(model, optimizers, schedulers, range(3))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = OptimizerState(model, optimizers, schedulers)
    checkpoint.save({"optim": state}, checkpoint_id=tmp_path / "saved", no_dist=True)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    train(model, optimizers, schedulers, range(3, 6))
    expected = [param.detach().clone() for param in model.parameters()]

    model, optimizers, schedulers = build(tmp_path)
    model.load_state_dict(weights)
    state = OptimizerState(model, optimizers, schedulers)
    checkpoint.load({"optim": state}, checkpoint_id=tmp_path / "saved", no_dist=True)
    train(model, optimizers, schedulers, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "  param_group_overrides: [{pattern: norm, lr_mult: 2.0}]",
            "param_group_overrides=.*norm",
        ),
        ("    overrides: {q_proj: {weight_decay: 0.0}}", "first group has weight_decay=0.0"),
    ],
)
def test_settings_that_the_scheduler_would_undo_are_refused(tmp_path, line, message):
    recipe = RECIPE.replace("    weight_decay: 0.03", f"    weight_decay: 0.03\n{line}")
    with pytest.raises(ValueError, match=message):
        build(tmp_path, recipe)
