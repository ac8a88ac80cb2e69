"""Checkpoints of Hugging Face: the model computes what transformers computes, or is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import GPT2Config as HuggingFaceGPT2
from transformers import GPT2LMHeadModel, LlamaForCausalLM
from transformers import LlamaConfig as HuggingFaceLlama

from sinkgd.lab.models import (
    GPT2Config,
    LlamaConfig,
    ModelError,
    RotaryScaling,
    add_adapters,
    model_of,
)
from sinkgd.lab.models.huggingface import read_config
from sinkgd.lab.models.huggingface_tensors import content_sha256, load_tensors, tensor_files

TOKENS = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0}
# Weights of 0.3 make attention far from uniform.
GPT2: dict[str, Any] = {
    **TOKENS,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 32,
    "initializer_range": 0.3,
}
LLAMA: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
GROUPED = {"num_key_value_heads": 2}
TIED = {"tie_word_embeddings": True}
ROTARY = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
SCALED = {"rope_parameters": {**ROTARY, "rope_theta": 500.0}}
# The files of meta-llama/Llama-3.2-1B and meta-llama/Meta-Llama-3-8B on the hub.
LLAMA_3_2_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


def random_model(family: str, **changes: Any) -> nn.Module:
    """Make a model of transformers with random weights, also of norms and biases."""
    torch.manual_seed(0)
    if family == "gpt2":
        model = GPT2LMHeadModel(HuggingFaceGPT2(**{**GPT2, **changes}))
    else:
        model = LlamaForCausalLM(HuggingFaceLlama(**{**LLAMA, **changes}))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
    return model.eval()


def saved(folder: Path, family: str, shards: str = "5GB", **changes: Any) -> nn.Module:
    model = random_model(family, **changes)
    model.save_pretrained(folder, max_shard_size=shards)
    return model


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of the config.json; ``...`` removes one."""
    path = folder / "config.json"
    fields = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    kept = {name: value for name, value in fields.items() if value is not ...}
    path.write_text(json.dumps(kept), encoding="utf-8")


def loaded(folder: Path) -> nn.Module:
    model = model_of(read_config(folder).sizes)
    load_tensors(folder, model)
    return model


def check_logits(ours: nn.Module, theirs: nn.Module) -> None:
    tokens = torch.randint(97, (2, 29), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.double()(tokens).logits
        found = ours.double()(tokens)
    # Rotations are computed in float32 by both.
    assert_close(found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("shards", ["5GB", "30KB"], ids=["one file", "sharded"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {}),
        ("gpt2", {"activation_function": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-2}),
        ("gpt2", {"n_inner": 192, "n_head": 1}),
        ("llama", {}),
        ("llama", {"rope_theta": 500.0, "rms_norm_eps": 1e-2}),
        ("llama", {"num_attention_heads": 24}),
        ("llama", GROUPED),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", TIED),
        ("llama", {"head_dim": 16}),
        ("llama", SCALED),
        ("llama", {**GROUPED, **TIED, **SCALED, "head_dim": 16}),
    ],
    ids=str,
)
def test_logits_are_those_of_transformers(tmp_path, family, changes, shards):
    theirs = saved(tmp_path, family, shards, **changes)
    assert (len({*tensor_files(tmp_path).values()}) > 1) is (shards == "30KB")
    check_logits(loaded(tmp_path), theirs)


def test_sizes_are_those_of_the_file(tmp_path):
    saved(tmp_path, "gpt2")
    found = read_config(tmp_path)
    assert found.sizes == GPT2Config(97, 48, 3, 4, max_sequence_length=32, initializer_std=0.3)
    assert found.dropout == {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
    saved(tmp_path, "llama", rope_theta=500.0, rms_norm_eps=1e-5)
    found = read_config(tmp_path)
    sizes = LlamaConfig(97, 48, 80, 3, 4, 32, norm_eps=1e-5, rope_theta=500.0, initializer_std=0.3)
    assert found.sizes == sizes
    assert not found.dropout


def test_a_config_written_before_transformers_5_is_read(tmp_path):
    theirs = saved(tmp_path, "llama", rope_theta=500.0)
    edit(
        tmp_path, rope_parameters=..., rope_theta=500.0, rope_scaling=None, dtype=..., head_dim=...
    )
    edit(tmp_path, torch_dtype="float32", num_key_value_heads=None)
    check_logits(loaded(tmp_path), theirs)
    theirs = saved(tmp_path, "llama", **SCALED)
    edit(tmp_path, rope_parameters=..., rope_theta=500.0, rope_scaling=ROTARY)
    check_logits(loaded(tmp_path), theirs)
    older = {**ROTARY, "rope_type": ..., "type": "llama3"}
    edit(tmp_path, rope_scaling={key: value for key, value in older.items() if value is not ...})
    check_logits(loaded(tmp_path), theirs)


@pytest.mark.parametrize(
    ("fields", "options", "millions"),
    [
        (
            LLAMA_3_2_1B,
            {"rope_scaling": RotaryScaling(32.0, 1.0, 4.0, 8192), "tied_head": True},
            (1235.81, 973.08),
        ),
        (LLAMA_3_8B, {}, (8030.26, 6979.32)),
    ],
    ids=["3.2-1B", "3-8B"],
)
def test_published_configs_of_llama_3_are_read(tmp_path, fields, options, millions):
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    sizes = read_config(tmp_path).sizes
    assert sizes == LlamaConfig(
        vocab_size=128_256,
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=32,
        max_sequence_length=fields["max_position_embeddings"],
        norm_eps=1e-5,
        rope_theta=500_000.0,
        num_key_value_heads=8,
        **options,
    )
    counts = sizes.parameter_count, sizes.linear_parameter_count
    assert tuple(round(count / 1e6, 2) for count in counts) == millions
    short = replace(sizes, max_sequence_length=8)  # no table of 131,072 positions
    with torch.device("meta"):
        ours = {name: p.shape for name, p in model_of(short).named_parameters()}
        theirs = LlamaForCausalLM(HuggingFaceLlama(**fields))
    theirs.tie_weights()
    assert ours == {name: p.shape for name, p in theirs.named_parameters()}


def test_names_and_buffers_of_the_published_gpt2_are_read(tmp_path):
    theirs = saved(tmp_path, "gpt2")
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): one for name, one in load_file(file).items()}
    mask = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(3)}
    save_file({**tensors, **mask}, file)
    edit(tmp_path, n_ctx=32, n_special=0, predict_special_tokens=True, output_past=True)
    check_logits(loaded(tmp_path), theirs)


@pytest.mark.parametrize(
    ("family", "changes", "embedding"),
    [("gpt2", {}, "transformer.wte.weight"), ("llama", TIED, "model.embed_tokens.weight")],
    ids=["gpt2", "llama"],
)
def test_a_stored_tied_head_must_be_the_embedding(tmp_path, family, changes, embedding):
    theirs = saved(tmp_path, family, **changes)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    head = tensors[embedding].clone()
    save_file({**tensors, "lm_head.weight": head}, file)
    check_logits(loaded(tmp_path), theirs)
    save_file({**tensors, "lm_head.weight": head + 1}, file)
    with pytest.raises(ModelError, match=rf"lm_head\.weight differs from {embedding}"):
        loaded(tmp_path)


def test_a_head_that_is_not_tied_must_be_stored(tmp_path):
    saved(tmp_path, "llama", **TIED)
    edit(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"lm_head\.weight missing, none unknown"):
        loaded(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_in_bfloat16_are_read_exactly(tmp_path, family):
    random_model(family).bfloat16().save_pretrained(tmp_path)
    theirs = {
        name: tensor.float()
        for name, tensor in load_file(next(iter(tensor_files(tmp_path).values()))).items()
    }
    for name, weight in loaded(tmp_path).named_parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, theirs[name])


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gpt2", {}), ("llama", {}), ("llama", {**GROUPED, **TIED, **SCALED, "head_dim": 16})],
    ids=["gpt2", "llama", "llama 3"],
)
def test_a_model_with_adapters_takes_the_weights_below_them(tmp_path, family, changes):
    theirs = saved(tmp_path, family, **changes)
    ours = add_adapters(model_of(read_config(tmp_path).sizes), rank=2)
    for name, weight in ours.named_parameters():
        if ".lora_" in name:
            nn.init.zeros_(weight)
    load_tensors(tmp_path, ours)
    check_logits(ours, theirs)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads is 3, .* divide the 4 heads"),
        ("llama", {"num_key_value_heads": 2.0}, "num_key_value_heads must be a whole number"),
        ("llama", {"tie_word_embeddings": "a"}, 'tie_word_embeddings is "a", .* true or false'),
        ("llama", {"attention_bias": True}, "attention_bias is true, .* needs false; .*Llama-3"),
        ("llama", {"mlp_bias": True}, "mlp_bias is true"),
        ("llama", {"hidden_act": "gelu"}, 'hidden_act is "gelu", but .* needs "silu"'),
        ("llama", {"head_dim": 7}, "config.json: head_dim must be even, .* got 7"),
        ("llama", {"head_dim": 0}, "head_dim must be a whole number from 1 to .*, got 0"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            r'rope_scaling\.type is "linear", but .* "default" or "llama3"; use a checkpoint',
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "type": "yarn"}},
            r'rope_parameters\.rope_type is "llama3" and "yarn"',
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 32.0}},
            r"rope_parameters\.low_freq_factor must be a positive number, got null",
        ),
        (
            "llama",
            {"rope_parameters": {**ROTARY, "original_max_position_embeddings": 16.0}},
            r"rope_parameters\.original_max_position_embeddings must be a whole number",
        ),
        (
            "llama",
            {"rope_parameters": {**ROTARY, "low_freq_factor": 4.0}},
            r"config\.json: rope_parameters: high_freq_factor .* must exceed low_freq_factor, 4",
        ),
        (
            "llama",
            {"rope_parameters": {**ROTARY, "attention_factor": 2.0}},
            r'rope_parameters\.attention_factor is 2\.0, .* of the type "llama3" do not have it',
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "factor": 2.0}},
            r'rope_parameters\.factor is 2\.0, but .* of the type "default" do not have it',
        ),
        (
            "llama",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            r"rope_parameters\.partial_rotary_factor is 0\.5",
        ),
        (
            "llama",
            {"rope_scaling": ROTARY},
            "rope_parameters and rope_scaling scale rotary positions differently; remove one",
        ),
        ("llama", {"rope_scaling": 2}, "rope_scaling is 2; it must be an object"),
        ("llama", {"rope_theta": 7.0}, r"rope_theta is 7\.0 and 10000\.0; give one"),
        ("llama", {"rope_theta": "a"}, 'rope_theta must be a positive number, got "a"'),
        ("llama", {"max_sequence_length": 64}, "max_sequence_length is 64, but .* needs 32"),
        ("llama", {"sliding_window": 64}, "sliding_window is 64, a field that .* does not know"),
        ("llama", {"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}'),
        ("llama", {"model_type": "mistral"}, 'model_type is "mistral", but .* gpt2, llama'),
        ("llama", {"model_type": ["llama"]}, "model_type is"),
        ("llama", {"architectures": ["LlamaModel"]}, r'architectures is \["LlamaModel"\]'),
        (
            "llama",
            {"hidden_size": 50, "head_dim": ...},
            "config.json: hidden_size 50 over num_heads 4 must be",
        ),
        ("llama", {"intermediate_size": ...}, "intermediate_size must be a whole number .* null"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, got 0"),
        ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings is false, .* needs true"),
        ("gpt2", {"activation_function": "relu"}, 'needs "gelu_new" or "gelu_pytorch_tanh"'),
        ("gpt2", {"n_inner": 100}, "n_inner is 100, but .* needs 192"),
        ("gpt2", {"n_ctx": 16}, "n_ctx is 16, but .* needs 32"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is false"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is true"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is true"),
        ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ],
    ids=str,
)
def test_a_field_that_the_model_cannot_represent_is_refused(tmp_path, family, changes, words):
    saved(tmp_path, family)
    edit(tmp_path, **changes)
    with pytest.raises(ModelError, match=words) as error:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_files_that_are_missing_or_damaged_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"there is no file .*config\.json"):
        read_config(tmp_path)
    saved(tmp_path, "gpt2", "30KB")
    files = sorted({*tensor_files(tmp_path).values()})
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-8])
    with pytest.raises(ModelError, match=r"is not a whole safetensors file .*; download it again"):
        loaded(tmp_path)
    files[1].unlink()
    for use in (loaded, content_sha256):
        with pytest.raises(ModelError, match=rf"there is no file {files[1]}; download the whole"):
            use(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"wte.weight": "../model.safetensors"}}', encoding="utf-8")
    with pytest.raises(ModelError, match="weight_map must give the name of a file"):
        loaded(tmp_path)
    index.unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor .*save_pretrained"):
        loaded(tmp_path)
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ModelError, match="holds no JSON object"):
        read_config(tmp_path)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    saved(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"model\.norm\.weight missing, none unknown"):
        loaded(tmp_path)
    save_file({**tensors, "norm.weight": norm, "model.norm.weight": norm.clone()}, file)
    with pytest.raises(ModelError, match=r"none missing, (model\.)?norm\.weight unknown"):
        loaded(tmp_path)
    bias = {f"model.layers.{i}.self_attn.q_proj.bias": torch.zeros(48) for i in range(3)}
    extra = {"visual.weight": torch.zeros(2), "model.norm.weight": norm}
    save_file({**tensors, **extra, **bias}, file)
    with pytest.raises(ModelError, match=r"none missing, model\.layers\.0.* and 1 more unknown"):
        loaded(tmp_path)
    save_file({**tensors, "model.norm.weight": norm[:-1].clone()}, file)
    with pytest.raises(ModelError, match=r"has the shape \(47,\), but config\.json gives it \(48"):
        loaded(tmp_path)
    save_file({**tensors, "model.norm.weight": norm.to(torch.int8)}, file)
    with pytest.raises(ModelError, match=r"the type torch\.int8; use a .* not quantized"):
        loaded(tmp_path)


def test_the_hash_changes_with_every_file(tmp_path):
    saved(tmp_path, "gpt2", "30KB")
    hashes = {content_sha256(tmp_path)}
    for path in [tmp_path / "config.json", *sorted({*tensor_files(tmp_path).values()})]:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        hashes.add(content_sha256(tmp_path))
    assert len(hashes) == 2 + len({*tensor_files(tmp_path).values()})
