"""Where the parameters of transformers' own models go: built small, with random weights."""

import re

import pytest

import sinkgd

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 61,
}
ONE_HEAD = {"num_key_value_heads": 1}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 24}
LLAMA4 = {
    "head_dim": 8,
    "num_local_experts": 4,
    "intermediate_size_mlp": 24,
    "interleave_moe_layer_step": 2,  # every other layer has experts
}
SPEECH = {
    f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DETECTOR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 32,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_feature_levels": 3,
    "with_box_refine": True,
    "two_stage": True,
    **SPEECH,
}


def backbone():
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )


# The model, its configuration, and the names of its hidden matrices. All else goes to AdamW.
ATTENTION = r"self_attn\.[qkvo]_proj"
MODELS = [
    ("GPT2LMHeadModel", "GPT2Config",
     {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 61, "n_positions": 32, **TOKENS},
     r"h\.\d\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight"),
    ("LlamaForCausalLM", "LlamaConfig", {**SMALL, **ONE_HEAD},
     rf"layers\.\d\.({ATTENTION}|mlp\.\w+)\.weight"),
    ("LlamaForSequenceClassification", "LlamaConfig", {**SMALL, **ONE_HEAD},
     rf"layers\.\d\.({ATTENTION}|mlp\.\w+)\.weight"),
    ("Gemma2ForCausalLM", "Gemma2Config", {**SMALL, **ONE_HEAD, "head_dim": 8},
     rf"layers\.\d\.({ATTENTION}|mlp\.\w+)\.weight"),
    ("MixtralForCausalLM", "MixtralConfig", {**SMALL, **ONE_HEAD, "num_local_experts": 4},
     rf"layers\.\d\.({ATTENTION}\.weight|mlp\.experts\.\w+)"),
    ("Qwen2MoeForCausalLM", "Qwen2MoeConfig",
     {**SMALL, **ONE_HEAD, **EXPERTS, "shared_expert_intermediate_size": 24},
     rf"layers\.\d\.({ATTENTION}\.weight|mlp\.experts\.\w+|mlp\.shared_expert\.\w+\.weight)"),
    ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**SMALL, **ONE_HEAD, **EXPERTS, "head_dim": 8},
     rf"layers\.\d\.({ATTENTION}\.weight|mlp\.experts\.\w+)"),
    ("GptOssForCausalLM", "GptOssConfig",
     {**SMALL, **ONE_HEAD, "head_dim": 8, "num_local_experts": 4},
     rf"layers\.\d\.({ATTENTION}\.weight|mlp\.experts\.(gate_up|down)_proj)"),
    ("Llama4ForCausalLM", "Llama4TextConfig",
     {**SMALL, **ONE_HEAD, **LLAMA4},
     rf"layers\.\d\.({ATTENTION}\.weight|feed_forward\.((shared_expert\.)?\w+_proj\.weight|experts\.\w+))"),
    ("XLNetLMHeadModel", "XLNetConfig",
     {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": 61},
     r"layer\.\d\.ff\.layer_[12]\.weight"),
    ("PhiForCausalLM", "PhiConfig", SMALL,
     r"layers\.\d\.(self_attn\.([qkv]_proj|dense)|mlp\.fc[12])\.weight"),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL,
     r"layers\.\d\.(attention\.(query_key_value|dense)|mlp\.dense_\w+)\.weight"),
    ("BertForSequenceClassification", "BertConfig", SMALL,
     r"layer\.\d\.(attention\.self\.\w+|attention\.output\.dense|(intermediate|output)\.dense)\.weight"),
    ("RobertaForSequenceClassification", "RobertaConfig", SMALL,
     r"layer\.\d\.(attention\.self\.\w+|attention\.output\.dense|(intermediate|output)\.dense)\.weight"),
    ("T5ForConditionalGeneration", "T5Config",
     {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 61},
     r"layer\.\d\.(\w+Attention\.[qkvo]|DenseReluDense\.w[io])\.weight"),
    ("WhisperForConditionalGeneration", "WhisperConfig",
     {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 61,
      "decoder_start_token_id": 1, **SPEECH, **TOKENS},
     r"layers\.\d\.((self|encoder)_attn\.\w+_proj|fc[12])\.weight"),
    ("MambaForCausalLM", "MambaConfig",
     {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 61, "time_step_rank": 2},
     r"layers\.\d\.mixer\.(in|x|dt|out)_proj\.weight"),
    ("ViTForImageClassification", "ViTConfig", {**SMALL, "image_size": 8, "patch_size": 4},
     r"layers\.\d\.(attention\.\w+|mlp\.\w+)\.weight"),
    ("DeformableDetrForObjectDetection", "DeformableDetrConfig", DETECTOR,
     r"layers\.\d\.((self|encoder)_attn|mlp)\.\w+\.weight|input_proj\.\d\.0\.weight"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of configurations as small as these
@pytest.mark.parametrize(
    ("model", "config", "options", "matrices"), MODELS, ids=[m[0] for m in MODELS]
)
def test_hidden_matrices_go_to_sinkgd_and_all_else_to_adamw(model, config, options, matrices):
    if "Detr" in model:
        options = {**options, "backbone_config": backbone()}
    options = {
        key: value for key, value in options.items() if key != "vocab_size" or "ViT" not in model
    }
    made = getattr(transformers, model)(getattr(transformers, config)(**options))
    groups = sinkgd.param_groups(made)
    routed = {name: group["algorithm"] for group in groups for name, _ in group["params"]}
    found = {name for name, algorithm in routed.items() if algorithm == "sinkgd"}
    trained = {name for name, param in made.named_parameters() if param.requires_grad}
    assert set(routed) == trained
    assert found == {name for name in trained if re.search(matrices + "$", name)}
    sinkgd.SinkGD(groups)


@pytest.mark.parametrize(
    ("model", "config"),
    [("GptOssForCausalLM", "GptOssConfig"), ("Llama4ForCausalLM", "Llama4TextConfig")],
)
def test_experts_that_are_stored_in_by_out_are_transposed(model, config):
    """gpt-oss and Llama 4 multiply tokens by their experts from the right."""
    options = {**SMALL, **ONE_HEAD, **LLAMA4}
    made = getattr(transformers, model)(getattr(transformers, config)(**options))
    groups = sinkgd.param_groups(made)
    layouts = {name: group.get("layout") for group in groups for name, _ in group["params"]}
    for name, layout in layouts.items():
        if layout is not None:
            assert layout == ("transposed" if ".experts." in name else "auto"), name
