"""ms-swift fine-tunes a tiny LLaMA with the plugin, saves and resumes it.

`make test-plugin-ms_swift` runs it, with the versions in pins/ms_swift.txt.
"""

import json

import pytest
import safetensors.torch
import torch

from tiny_llama import save_texts, save_tiny_llama

pytest.importorskip("swift", reason="`make test-plugin-ms_swift` runs it", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("ignore")  # of ms-swift and of what it imports


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    plugin = tmp_path / "sinkgd_plugin.py"
    plugin.write_text("import sinkgd.integrations.ms_swift\n")
    return {
        "model": save_tiny_llama(tmp_path / "model"),
        "model_type": "llama",
        "template": "dummy",
        "dataset": save_texts(tmp_path / "texts.jsonl"),
        "external_plugins": plugin,
        "optimizer": "sinkgd",
        "optim_args": "momentum=0.5,betas=(0.8,0.9)",
        "tuner_type": "full",
        "learning_rate": 1e-2,
        "torch_dtype": "float32",
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "split_dataset_ratio": 0,
        "use_cpu": "true",
        "report_to": "none",
        "add_version": "false",
        "use_hf": "true",
        "check_model": "false",
        "output_dir": tmp_path / "whole",
    }


def train(arguments):
    """Train as ``swift sft`` does."""
    from swift import sft_main

    return sft_main([part for key, value in arguments.items() for part in (f"--{key}", str(value))])


def test_a_run_trains_with_sinkgd_and_resumes(arguments, tmp_path):
    train(arguments)
    whole = tmp_path / "whole" / "checkpoint-4"
    groups = torch.load(whole / "optimizer.pt")["param_groups"]
    rates = {group["algorithm"]: group["initial_lr"] for group in groups}
    assert rates == {"sinkgd": pytest.approx(3e-3), "adamw": 1e-2}
    assert [group["momentum"] for group in groups if group["algorithm"] == "sinkgd"] == [0.5]
    assert {group["betas"] for group in groups if "betas" in group} == {(0.8, 0.9)}
    log = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < losses[0]

    resumed = tmp_path / "resumed"
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    train({**arguments, "output_dir": resumed, "resume_from_checkpoint": checkpoint})
    one, two = (
        safetensors.torch.load_file(folder / "model.safetensors")
        for folder in (whole, resumed / "checkpoint-4")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_argument_that_does_not_exist_is_refused(arguments):
    with pytest.raises(TypeError, match="momentum"):
        train({**arguments, "optim_args": "momentu=0.5"})
