"""Presets: their sizes are the benchmark's, and a wrong name is met with the right one."""

import pytest
import torch

import sinkgd
from sinkgd.lab.models import LLAMAS, PRESETS, ModelError, build_model, preset_config

# millions of parameters, in all and in the blocks' matrices, as the benchmark reports them
PUBLISHED = {
    "llama-60m": (58.07, 25.30),
    "llama-130m": (134.11, 84.93),
    "llama-350m": (367.97, 302.38),
    "llama-1b": (1339.08, 1207.91),
    "llama-7b": (6738.42, 6476.01),
}
every_preset = pytest.mark.parametrize("preset", PRESETS)


def meta_model(preset):
    with torch.device("meta"):
        return build_model(preset)


def test_there_are_fourteen_llamas_three_gpt2_and_two_lenses():
    assert len(LLAMAS) == 14
    others = set(PRESETS) - set(LLAMAS)
    assert others == {"gpt2-nano", "gpt2-nano-256", "gpt2-124m", "lens-nano", "lens-121m"}
    assert preset_config("llama-10b").parameter_count == 9_976_549_376


@pytest.mark.parametrize("preset", PUBLISHED)
def test_sizes_are_the_published_ones(preset):
    config = preset_config(preset)
    counts = config.parameter_count, config.linear_parameter_count
    assert tuple(round(count / 1e6, 2) for count in counts) == PUBLISHED[preset]


@every_preset
def test_the_formula_counts_what_the_model_has(preset):
    model, config = meta_model(preset), preset_config(preset)
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count
    groups = [g for g in sinkgd.param_groups(model) if g["algorithm"] == "sinkgd"]
    linear = sum(weight.numel() for group in groups for _, weight in group["params"])
    assert linear == config.linear_parameter_count


@every_preset
def test_every_preset_is_as_deep_as_it_says(preset):
    assert len(meta_model(preset).blocks) == preset_config(preset).num_layers


@pytest.mark.parametrize("preset", LLAMAS)
def test_the_model_is_as_deep_and_wide_as_its_preset(preset):
    config, state = preset_config(preset), meta_model(preset).state_dict()
    assert state["lm_head.weight"].shape == (32_000, config.hidden_size)
    last = f"model.layers.{config.num_layers - 1}.mlp.down_proj.weight"
    assert state[last].shape == (config.hidden_size, config.intermediate_size)
    assert f"model.layers.{config.num_layers}.mlp.down_proj.weight" not in state


def test_vocabulary_and_length_can_be_chosen():
    model = build_model("llama-nano", vocab_size=500, max_sequence_length=16, seed=2)
    assert model(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 500)
    again = build_model("llama-nano", vocab_size=500, max_sequence_length=16, seed=2)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    other = build_model("llama-nano", vocab_size=500, max_sequence_length=16, seed=3)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("size", ["vocab_size", "max_sequence_length"])
def test_a_size_of_zero_is_refused_and_not_taken_for_the_default(size):
    with pytest.raises(ModelError, match=f"{size} must be positive, got 0"):
        build_model("llama-nano", **{size: 0})


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [("llama-nona", "llama-nano"), ("lama-60m", "llama-60m"), ("llama_130M", "llama-130m")],
)
def test_an_unknown_preset_is_met_with_the_nearest_name(typo, nearest):
    with pytest.raises(ModelError, match=f"model.preset is '{typo}'; did you mean '{nearest}'"):
        build_model(typo)
