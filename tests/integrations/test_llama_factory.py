"""LLaMA-Factory's new trainer takes SinkGD from its table of plugins, trains, saves and resumes.

`make test-plugin-llama_factory` runs it, with the versions in pins/llama_factory.txt.
"""

import json

import pytest
import safetensors.torch
import torch

from document_blocks import run_block_with
from sinkgd.integrations.transformers import SinkGDFactory
from tiny_llama import save_tiny_llama

pytest.importorskip(
    "llamafactory", reason="`make test-plugin-llama_factory` runs it", exc_type=ImportError
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of LLaMA-Factory and of what it imports


def part(role, text, weight):
    return {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": weight}


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    for name in ("USE_V1", "HF_HUB_OFFLINE", "DISABLE_VERSION_CHECK"):
        monkeypatch.setenv(name, "1")
    row = {"messages": [part("user", "one plus two is", 0.0), part("assistant", "three", 1.0)]}
    texts = tmp_path / "texts.jsonl"
    texts.write_text((json.dumps(row) + "\n") * 32)
    data = tmp_path / "data.yaml"
    data.write_text(f"texts:\n  path: {texts}\n  source: local\n")
    return {
        "model": str(save_tiny_llama(tmp_path / "model")),
        "train_dataset": str(data),
        "template": "qwen3_nothink",
        "optim_config": {"name": "sinkgd", "adamw_lr": "1e-2", "momentum": 0.5},
        "output_dir": str(tmp_path / "whole"),
        "max_steps": 4,
        "save_steps": 2,
        "micro_batch_size": 2,
        "global_batch_size": 2,
        "cutoff_len": 32,
        "bf16": False,
        "logging_steps": 1,
    }


@pytest.fixture
def built(monkeypatch):
    """Register the plugin by the block of docs/trainers.md, and collect what it builds."""
    optimizers = []
    build = SinkGDFactory.__call__

    def build_and_keep(*args, **kwargs):
        optimizers.append(build(*args, **kwargs))
        return optimizers[-1]

    monkeypatch.setattr(SinkGDFactory, "__call__", build_and_keep)
    run_block_with("llamafactory")
    return optimizers


def test_a_run_trains_with_sinkgd_and_resumes(arguments, built, tmp_path):
    from llamafactory.v1.trainers.sft_trainer import run_sft

    run_sft(arguments)
    (optimizer,) = built
    rates = {group["algorithm"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"sinkgd": pytest.approx(3e-3), "adamw": 1e-2}
    assert all(optimizer.state.values())  # momentum, and AdamW's moments
    before = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    whole = safetensors.torch.load_file(tmp_path / "whole" / "model.safetensors")
    assert not any(torch.equal(before[name], whole[name]) for name in before)

    resumed = tmp_path / "resumed"
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    run_sft({**arguments, "output_dir": str(resumed), "resume_from_checkpoint": checkpoint})
    again = safetensors.torch.load_file(resumed / "model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in again)
