"""torchtitan's configuration builds SinkGD for its own LLaMA, schedules and saves it.

`make test-plugin-torchtitan` runs it, with the versions in pins/torchtitan.txt.

torchtitan's ``Trainer`` was not run: its attention and its data need a GPU and a download.
"""

import pytest
import torch
from torch.distributed import checkpoint

import sinkgd
from document_blocks import run_block_with

registry = pytest.importorskip(
    "torchtitan.models.llama3.config_registry",
    reason="`make test-plugin-torchtitan` runs it",
    exc_type=ImportError,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of torchtitan and of what it imports

RECIPES = {
    "hybrid": {"lr": 0.04},
    "stateless": {"lr": 0.04, "overrides": {"norm": "normalize", "emb|head": "sinkgd-table"}},
    "stochastic": {"adamw_lr": 1e-3, "rounding": "stochastic"},
}


def build(options):
    """Build the model, the optimizer and the scheduler, as torchtitan's ``Trainer`` does."""
    from sinkgd.integrations.torchtitan import SinkGDContainer

    config = registry.llama3_debugmodel()
    config.optimizer = SinkGDContainer.Config(options=options)
    config.model_spec.model.layers = config.model_spec.model.layers[:2]
    model = config.model_spec.model.build()
    torch.manual_seed(0)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.02)
    if "rounding" in options:
        model.to(torch.bfloat16)
    container = config.optimizer.build(model_parts=[model])
    return model, container, config.lr_scheduler.build(optimizers=container, training_steps=10)


def train(model, container, scheduler, seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        container.step()
        scheduler.step()
        container.zero_grad()


def copy_of(model):
    return [param.detach().clone() for param in model.parameters()]


def are_equal(model, expected):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))


def test_the_configuration_in_the_documents_builds_the_container():
    config = run_block_with("torchtitan")["llama3_sinkgd"]()
    config.model_spec.model.layers = config.model_spec.model.layers[:2]
    container = config.optimizer.build(model_parts=[config.model_spec.model.build()])
    rates = sorted({group["lr"] for optimizer in container for group in optimizer.param_groups})
    assert rates == pytest.approx([0.04 / 40, 0.04])


def test_the_blocks_matrices_train_with_sinkgd_and_all_else_with_adamw():
    model, container, scheduler = build({"lr": 0.04})
    (optimizer,) = container
    assert isinstance(optimizer, sinkgd.SinkGD)
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            is_matrix = name.startswith("layers.") and param.ndim == 2
            assert (group["algorithm"] == "sinkgd") == is_matrix, name
    before = copy_of(model)
    train(model, container, scheduler, range(2))
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    rates = {group["algorithm"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"sinkgd": pytest.approx(0.001), "adamw": pytest.approx(0.04)}
    assert container.state_dict().keys() >= {
        "param_groups.layers.0.attention.wo.weight.lr",
        "state.norm.weight.exp_avg",
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_checkpoint_continues_and_saving_changes_nothing(recipe, tmp_path):
    model, container, scheduler = build(RECIPES[recipe])
    before = copy_of(model)
    container.state_dict()
    assert are_equal(model, before)
    train(model, container, scheduler, range(3))
    before = copy_of(model)
    checkpoint.save(
        {"model": model.state_dict(), "optimizer": container, "scheduler": scheduler},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    assert are_equal(model, before)
    train(model, container, scheduler, range(3, 5))
    expected = copy_of(model)

    model, container, scheduler = build(RECIPES[recipe])
    own = {"model": model.state_dict(), "optimizer": container, "scheduler": scheduler}
    checkpoint.load(own, checkpoint_id=tmp_path, no_dist=True)
    model.load_state_dict(own["model"])  # its state dict has copies of fused weights
    assert are_equal(model, before)
    train(model, container, scheduler, range(3, 5))
    assert are_equal(model, expected)


def test_saving_makes_no_gradients(monkeypatch):
    """torchtitan would step along zero gradients, as large as the weights, at every save."""
    _, container, _ = build(RECIPES["stateless"])
    for optimizer in container:
        monkeypatch.setattr(optimizer, "step", lambda **_: pytest.fail("a step was taken"))
    container.load_state_dict(container.state_dict())


def test_patterns_of_torchtitan_are_refused():
    from torchtitan.components.optimizer import ParamGroupConfig

    from sinkgd.integrations.torchtitan import SinkGDContainer

    patterns = [ParamGroupConfig(pattern=".*", optimizer_name="AdamW")]
    config = SinkGDContainer.Config(param_groups=patterns)
    with pytest.raises(ValueError, match=r"param_groups=.* has no effect.*overrides"):
        config.build(model_parts=[torch.nn.Linear(2, 2)])
