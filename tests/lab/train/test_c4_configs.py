"""The C4 benchmark's configurations, sizes, memory and schedule, against counts made apart."""

import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sinkgd.lab.commands.train import Train
from sinkgd.lab.models import build_model, preset_config
from sinkgd.lab.plan import Grid, Work, find_architecture, find_method, rank_memory
from sinkgd.lab.train.config import RunConfig, SharedConfig, load_config
from sinkgd.lab.train.loop import lr_factor
from sinkgd.lab.train.resolve import resolve

CONFIGS = Path(__file__).parents[3] / "benchmarks" / "c4"
STEPS = {"60m": 10_000, "130m": 20_000, "350m": 60_000, "1b": 100_000}
# GaLore's configs/llama_*.json: hidden, intermediate, layers, heads
GALORE = {
    "9m": (128, 352, 4, 4),
    "20m": (256, 688, 4, 4),
    "35m": (384, 1024, 6, 8),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "7b": (4096, 11008, 32, 32),
}
VOCAB_SIZE = 32_000
sizes = pytest.mark.parametrize("size", STEPS)
every_size = pytest.mark.parametrize("size", GALORE)


def read(size: str) -> RunConfig:
    return resolve(Train.defaults(["--config", str(CONFIGS / f"llama-{size}.toml")]).settings)


def test_there_is_a_file_for_each_size():
    assert {path.stem for path in CONFIGS.glob("*.toml")} == {f"llama-{size}" for size in STEPS}


@sizes
def test_a_configuration_is_that_of_the_benchmark(size):
    config = read(size)
    training = config.training
    assert config.model.preset == f"llama-{size}"
    assert preset_config(config.model.preset).vocab_size == config.model.vocab_size == VOCAB_SIZE
    assert config.data.packing == "none"
    assert config.tokens_per_step == 131_072
    assert (training.batch_size, training.sequence_length) == (512, 256)
    assert training.steps == STEPS[size]
    assert training.precision == "bf16"
    assert (config.evaluation.every_steps, config.evaluation.tokens) == (1000, 10_000_000)
    assert config.optimizer.weight_decay == config.optimizer.clip_norm == 0


def test_batches_go_through_the_model_and_the_evaluator_as_they_did_there():
    found = {
        size: (read(size).training.micro_batch_size, read(size).evaluation.batch_size)
        for size in STEPS
    }
    assert found == {"60m": (256, 256), "130m": (128, 256), "350m": (128, 512), "1b": (32, 128)}


@sizes
def test_the_command_in_a_file_gives_the_papers_rates_and_leaves_the_rest(size, monkeypatch):
    monkeypatch.chdir(CONFIGS.parents[1])
    lines = (CONFIGS / f"llama-{size}.toml").read_text().splitlines()[1:3]
    words = shlex.split(" ".join(line.strip("# \\") for line in lines))
    assert words[:2] == ["sinkgd", "train"]
    settings = tyro.cli(Train, args=words[2:], default=Train.defaults(words[2:])).settings
    found = resolve(settings)
    assert (found.optimizer.lr, found.optimizer.matrix_lr) == (0.02, 0.001)  # 0.02 · 0.05
    assert (found.optimizer.beta1, found.optimizer.beta2) == (0.9, 0.999)
    assert replace(found, optimizer=read(size).optimizer) == read(size)


@sizes
def test_compare_takes_the_same_file(size):
    shared = load_config(CONFIGS / f"llama-{size}.toml", SharedConfig)
    assert shared.training == read(size).training


def galore_model(size: str) -> nn.Module:
    hidden, intermediate, layers, heads = GALORE[size]
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                tie_word_embeddings=False,
            )
        )


def numbers(size: str) -> tuple[int, int]:
    """All parameters and those of the blocks' matrices, by the formula."""
    h, i, layers, _ = GALORE[size]
    linear = layers * (4 * h * h + 3 * h * i)
    return linear + 2 * VOCAB_SIZE * h + (2 * layers + 1) * h, linear


def count(model: nn.Module) -> tuple[int, int]:
    """The same on a module, the matrices found as GaLore finds them: by attn and mlp in a name."""
    linear = [
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ("attn" in name or "mlp" in name)
    ]
    return sum(p.numel() for p in model.parameters()), sum(linear)


@every_size
def test_a_preset_has_the_parameters_of_the_benchmarks_model(size):
    with torch.device("meta"):
        ours = build_model(f"llama-{size}")
    assert count(ours) == count(galore_model(size)) == numbers(size)


@every_size
def test_a_preset_has_the_shapes_of_the_benchmarks_model(size):
    with torch.device("meta"):
        ours = build_model(f"llama-{size}").state_dict()
    theirs = galore_model(size).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


# What each method keeps: numbers an entry of the blocks' matrices, and of everything else.
KEPT = {"adamw": (2, 2), "sinkgd": (0, 2), "muon": (1, 2), "sgd": (0, 0)}
# tests/lab/plan/test_published.py holds the plan to the printed digits; here are the bytes.


@pytest.mark.parametrize("method", KEPT)
@pytest.mark.parametrize("size", ["60m", "7b"])
def test_the_planned_bytes_are_two_a_number(size, method):
    params, linear = numbers(size)
    matrices, rest = KEPT[method]
    expected = 2 * (params + matrices * linear + rest * (params - linear))
    work = Work(find_architecture(f"llama-{size}"), sequence_length=8, precision="bf16")
    found = rank_memory(work, Grid(), find_method(method)).weights_and_state
    # torch's Adam counts its steps in a float a parameter: below a kilobyte a layer
    assert 0 <= found - expected < 1024 * (GALORE[size][2] + 1)


def galore_factor(current_step: int, warmup: int, cycle: int, floor: float = 0.1) -> float:
    """GaLore's `_get_cyclical_cosine_schedule_with_min_lr_lambda`; its count starts at 0."""
    place = current_step % cycle
    if place < warmup:
        if current_step != place and place < 2:
            return 1e-7
        return place / max(1, warmup)
    done = (place - warmup) / max(1, cycle - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


@pytest.mark.parametrize("steps", [10_000, 20_000, 60_000, 100_000, 150_000])
def test_the_schedule_is_galores_one_step_earlier(steps):
    def ours(number):  # of the step, 1 for the first
        return lr_factor(number - 1, steps=steps)

    def theirs(number):
        return galore_factor(number - 1, warmup, steps)

    warmup = steps // 10
    for number in (1, 2, warmup - 1, warmup, warmup + 1, (warmup + steps) // 2, steps - 1):
        assert ours(number) == pytest.approx(theirs(number + 1), rel=1e-12)
    assert (ours(1), theirs(1)) == (1 / warmup, 0.0)  # theirs loses its first step
    assert ours(warmup) == theirs(warmup + 1) == 1.0
    assert ours((warmup + steps) // 2) == pytest.approx(0.55)
    assert ours(steps) == 0.1
    assert theirs(steps) == pytest.approx(0.1, rel=1e-6)  # and its last one is not quite at 10 %
    assert theirs(steps + 1) == 1e-7  # one more is taken there, at no rate to speak of
