"""axolotl reads a configuration with the plugin, trains a tiny LLaMA, saves and resumes it.

`make test-plugin-axolotl` runs it, with the versions in pins/axolotl.txt.
"""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from tiny_llama import save_texts, save_tiny_llama

if importlib.util.find_spec("axolotl") is None:
    pytest.skip("`make test-plugin-axolotl` runs it", allow_module_level=True)


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
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
    }


# What the command ``axolotl train`` does in its process.
TRAIN = """
import sys
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.train import train
cfg = load_cfg(sys.argv[1])
train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
"""


def train(configuration, folder):
    """Train in a process, and return what it printed and whether it succeeded."""
    file = folder / "axolotl.yml"
    file.write_text(json.dumps(configuration))  # JSON is YAML
    command = [sys.executable, "-c", TRAIN, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr, done.returncode == 0


def test_a_run_trains_with_sinkgd_and_resumes(configuration, tmp_path):
    printed, succeeded = train(configuration, tmp_path)
    assert succeeded, printed
    last = tmp_path / "whole" / "checkpoint-4"
    saved = torch.load(last / "optimizer.pt")["param_groups"]
    groups = {group["algorithm"]: group for group in saved}
    rates = {name: group["initial_lr"] for name, group in groups.items()}
    assert rates == {"sinkgd": pytest.approx(3e-3), "adamw": 1e-2}
    assert groups["sinkgd"]["momentum"] == 0.5
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    losses = [float(row["loss"]) for row in log if "loss" in row]
    assert losses[-1] < losses[0]

    resumed = {
        **configuration,
        "output_dir": str(tmp_path / "resumed"),
        "resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-2"),
    }
    printed, succeeded = train(resumed, tmp_path)
    assert succeeded, printed
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
        ({"optimizer": "adafactor"}, "optim='adafactor' of the trainer's arguments chooses"),
        ({"optim_args": "scale_parameter=True"}, "optim_args: .* has no effect with SinkGDPlugin"),
        ({"sinkgd": {"momentu": 0.5}}, "no argument 'momentu'"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(configuration, tmp_path, changes, message):
    printed, succeeded = train({**configuration, **changes}, tmp_path)
    assert not succeeded
    assert re.search(message, printed)
