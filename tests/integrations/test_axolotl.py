"""axolotl reads a configuration with the plugin, trains a tiny LLaMA, saves and resumes it.

It passed with axolotl 0.19.0, trl 1.9.0 and transformers 5.23.0 (axolotl pins 5.16.1). To run it,
in an environment of its own:

    pip install axolotl==0.19.0 && pytest tests/integrations/test_axolotl.py
"""

import pytest
import safetensors.torch
import torch

import sinkgd
from tiny_llama import save_texts, save_tiny_llama

pytest.importorskip("axolotl", reason="pip install axolotl==0.19.0", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("ignore")  # of axolotl and of what it imports


@pytest.fixture
def configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return {
        "base_model": str(save_tiny_llama(tmp_path / "model")),
        "plugins": ["sinkgd.integrations.axolotl.SinkGDPlugin"],
        "learning_rate": 1e-2,
        "sinkgd": {"momentum": "0.5", "weight_decay": 0.01},
        "datasets": [
            {
                "path": str(save_texts(tmp_path / "texts.jsonl")),
                "ds_type": "json",
                "type": "completion",
            }
        ],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": str(tmp_path / "whole"),
        "sequence_len": 32,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "save_steps": 2,
        "val_set_size": 0,
        "bf16": False,
        "use_cpu": True,
    }


def train(configuration, folder):
    """Train as axolotl's command does, and return its trainer."""
    import yaml
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    file = folder / "axolotl.yml"
    file.write_text(yaml.safe_dump(configuration))
    cfg = load_cfg(str(file))
    *_, trainer = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    return trainer


def test_a_run_trains_with_sinkgd_and_resumes(configuration, tmp_path):
    trainer = train(configuration, tmp_path)
    optimizer = trainer.optimizer.optimizer  # accelerate wraps it
    assert isinstance(optimizer, sinkgd.SinkGD)
    groups = {group["algorithm"]: group for group in optimizer.param_groups}
    rates = {name: group["initial_lr"] for name, group in groups.items()}
    assert rates == {"sinkgd": pytest.approx(3e-3), "adamw": 1e-2}
    assert groups["sinkgd"]["momentum"] == 0.5
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert float(losses[-1]) < float(losses[0])

    resumed = {
        **configuration,
        "output_dir": str(tmp_path / "resumed"),
        "resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-2"),
    }
    train(resumed, tmp_path)
    one, two = (
        safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        for name in ("whole", "resumed")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sinkgd"}, "optimizer: sinkgd chooses an optimizer of axolotl"),
        ({"embedding_lr": 1e-3}, "embedding_lr: 0.001 has no effect with SinkGDPlugin"),
        ({"sinkgd": {"momentu": 0.5}}, "momentum"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(configuration, tmp_path, changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        train({**configuration, **changes}, tmp_path)
