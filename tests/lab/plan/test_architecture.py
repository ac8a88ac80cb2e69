"""Architectures are the published ones, those of transformers' modules, or are refused clearly."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from lab.models.test_huggingface import LLAMA_3_2_1B, LLAMA_3_8B
from sinkgd.lab.devices import DEVICES
from sinkgd.lab.models import LLAMAS, ModelError
from sinkgd.lab.models.huggingface import read_config
from sinkgd.lab.plan import METHODS, Grid, find_architecture, find_device, find_method
from sinkgd.lab.plan.architecture import Architecture
from sinkgd.lab.plan.rank_model import weights_of
from sinkgd.lab.train.config import ConfigError

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "tie_word_embeddings": False,
}


def written(tmp_path, family, **changes):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": family, **SMALL, **changes}), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("model", LLAMAS)
def test_a_preset_has_the_weights_of_its_formula(model):
    weights = weights_of(find_architecture(model))
    assert sum(w.count for w in weights) == LLAMAS[model].parameter_count
    matrices = sum(w.count for w in weights if w.is_matrix)
    assert matrices == LLAMAS[model].linear_parameter_count


@pytest.mark.parametrize("model", ["gpt2-124m", "lens-nano"])
def test_presets_of_other_blocks_are_refused(model):
    with pytest.raises(ModelError, match=f"'{model}', whose blocks a plan does not know; .*llama-"):
        find_architecture(model)


@pytest.mark.parametrize(
    ("model", "billions"), [("llama-3-8b", 8.03), ("llama-3-70b", 70.55), ("llama-3-405b", 405.85)]
)
def test_published_models_have_the_size_of_their_weights_on_the_hub(model, billions):
    count = sum(w.count for w in weights_of(find_architecture(model)))
    assert round(count / 1e9, 2) == billions


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 16}], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_config_has_the_weights_of_the_module_of_transformers(tmp_path, family, changes):
    if family == "qwen2":
        changes = {**changes, "head_dim": 12}  # its heads are always as wide as hidden / heads
    path = written(tmp_path, family, **changes)
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    config, module = kinds[family]
    with torch.device("meta"):
        theirs = module(config(**{**SMALL, **changes}))
    theirs.tie_weights()
    expected = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert {w.name: w.shape for w in weights_of(find_architecture(path))} == expected


@pytest.mark.parametrize(
    ("family", "given"),
    [("llama", {}), ("mistral", {}), ("qwen2", {}), ("llama", {"num_key_value_heads": None})],
)
def test_the_heads_that_a_config_does_not_give_are_those_of_transformers(tmp_path, family, given):
    sizes = {"hidden_size": 512, "num_attention_heads": 64, "intermediate_size": 64}
    sizes |= {"vocab_size": 32, "num_hidden_layers": 1, **given}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": family, **sizes}), encoding="utf-8")
    theirs = transformers.AutoConfig.for_model(family, **sizes)
    expected = theirs.num_key_value_heads or theirs.num_attention_heads
    assert find_architecture(str(path)).num_kv_heads == expected


@pytest.mark.parametrize("fields", [LLAMA_3_2_1B, LLAMA_3_8B], ids=["3.2-1B", "3-8B"])
def test_the_plan_of_a_checkpoint_to_train_is_that_of_its_file(tmp_path, fields):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields), encoding="utf-8")
    theirs = find_architecture(str(path))
    ours = Architecture.of_config(theirs.name, read_config(tmp_path).sizes)
    assert replace(ours, source=theirs.source) == theirs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; a plan knows the blocks of llama, mistral"),
        ({"hidden_size": None}, "hidden_size must be a whole number from 1 .*, got None"),
        ({"num_key_value_heads": 3}, "num_kv_heads is 3, which does not divide the 4 heads"),
        ({"attention_bias": True}, "attention_bias is true, which a plan does not know"),
        ({"head_dim": None, "hidden_size": 50}, "num_attention_heads is 4, which does not divide"),
        ({"head_dim": 7}, "head_size is 7; rotary positions turn"),
        (
            {"num_hidden_layers": 0},
            "num_hidden_layers must be .* from 1 to 10000, got 0",
        ),
    ],
)
def test_a_config_that_is_not_known_is_refused(tmp_path, changes, message):
    family = changes.pop("model_type", "llama")
    with pytest.raises(ModelError, match=message):
        find_architecture(written(tmp_path, family, **changes))


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="is not a JSON file"):
        find_architecture(str(tmp_path))


def test_names_are_met_with_the_nearest_ones():
    with pytest.raises(ModelError, match="model is 'llama-70b'; did you mean 'llama-7b'"):
        find_architecture("llama-70b")
    with pytest.raises(ConfigError, match="optimizer is 'galor'; did you mean 'galore'"):
        find_method("galor")
    with pytest.raises(ConfigError, match="device is 'h10'; did you mean 'h100'"):
        find_device("h10")
    assert (len(METHODS), len(DEVICES)) == (35, 6)


def test_pieces_of_all_ranks_cover_a_model_once():
    eight = find_architecture("llama-3-8b")
    whole = sum(w.count for w in weights_of(eight))
    first = weights_of(eight, Grid(dp_shard=4, tp=8))
    held = sum(w.shard[0] * (w.shard[1] if len(w.shard) > 1 else 1) for w in first)
    norms = sum(w.count for w in first if len(w.shape) == 1)  # every tp rank holds them
    assert 32 * held == whole + 7 * norms


def test_a_mesh_that_cannot_divide_the_heads_is_refused():
    with pytest.raises(ConfigError, match=r"mesh.tp is 16, which does not divide the 8 key-value"):
        weights_of(find_architecture("llama-3-8b"), Grid(tp=16))
