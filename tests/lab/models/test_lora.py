"""LoRA adapters: what is trained, how it begins, and what the whole layer computes."""

import pytest
import torch

import sinkgd
from sinkgd.lab.models import ModelError, add_adapters, build_model, draw_adapters
from sinkgd.lab.models.lora import LoRA, base_name

SIZES = {"vocab_size": 64, "max_sequence_length": 16}
models = pytest.mark.parametrize("preset", ["gpt2-nano", "llama-nano-64", "lens-nano"])


def adapted(preset: str, rank: int = 3):
    plain = build_model(preset, **SIZES)
    names = {name: param.detach().clone() for name, param in plain.named_parameters()}
    model = add_adapters(plain, rank)
    draw_adapters(model, seed=0)
    return model, names


@models
def test_only_adapters_are_trained_and_the_output_does_not_change(preset):
    tokens = torch.arange(12).view(1, 12)
    before = build_model(preset, **SIZES)(tokens)
    model, _ = adapted(preset)
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert trained
    assert all(base_name(name) is None for name in trained)
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=0)


@models
def test_names_without_adapters_are_those_of_the_plain_model(preset):
    model, plain = adapted(preset)
    found = {base: param for n, param in model.named_parameters() if (base := base_name(n))}
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@models
def test_a_layer_computes_its_own_matrix_plus_twice_the_product_of_the_factors(preset):
    model, _ = adapted(preset)
    layers = [module for module in model.modules() if isinstance(module, LoRA)]
    assert layers
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B.weight)
        x = torch.randn(5, layer.lora_A.in_features)
        expected = layer.base_layer(x) + 2 * x @ (layer.lora_B.weight @ layer.lora_A.weight).mT
        torch.testing.assert_close(layer(x), expected)


@models
def test_param_groups_gives_the_adapters_to_adamw_or_to_sinkgd_if_told(preset):
    model, _ = adapted(preset)
    groups = sinkgd.param_groups(model, adamw_lr=0.1)
    assert {group["algorithm"] for group in groups} == {"adamw"}
    own = sinkgd.param_groups(model, adamw_lr=0.1, overrides={r"\.lora_[AB]\.": "sinkgd"})
    assert {(group["algorithm"], round(group["lr"], 9)) for group in own} == {("sinkgd", 0.03)}
    count = sum(param.requires_grad for param in model.parameters())
    assert sum(len(group["params"]) for group in own) == count


def test_a_seed_draws_the_same_adapters_with_the_spread_of_pefts():
    first, second = (adapted("gpt2-nano")[0] for _ in range(2))
    for one, other in zip(first.modules(), second.modules(), strict=True):
        if isinstance(one, LoRA):
            A = one.lora_A.weight
            assert torch.equal(A, other.lora_A.weight)
            bound = A.shape[1] ** -0.5
            assert 0.9 * bound < A.abs().max() <= bound
            assert not one.lora_B.weight.any()


def test_a_rank_below_one_is_refused():
    with pytest.raises(ModelError, match="at least 1, got 0"):
        add_adapters(build_model("gpt2-nano", **SIZES), 0)
