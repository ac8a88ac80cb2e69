"""GPT2: it is Hugging Face's model, it sees only the past, and its head stays its embedding."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import sinkgd
from sinkgd.lab.models import GPT2, GPT2Config, Lens, LensConfig, ModelError

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_layers": 3,
    "num_heads": 4,
    "max_sequence_length": 32,
}


def config(**changes):
    return GPT2Config(**{**SIZES, **changes})


@pytest.fixture
def model():
    return GPT2(config(), seed=0)


@pytest.fixture
def tokens():
    return torch.randint(97, (2, 29), generator=torch.Generator().manual_seed(1))


def huggingface_twin(model: GPT2) -> nn.Module:
    from transformers import GPT2Config as HFConfig
    from transformers import GPT2LMHeadModel

    twin = GPT2LMHeadModel(HFConfig(**model.config.huggingface())).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin


def give_every_vector_a_part(model: nn.Module) -> None:
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5, generator=draw))


@pytest.mark.parametrize(
    "changes",
    [{}, {"norm_eps": 1e-2}, {"num_heads": 1}, {"num_heads": 48}],
    ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items()) or "default",
)
def test_logits_are_those_of_transformers(changes, tokens):
    model = GPT2(config(initializer_std=0.3, **changes), seed=3)  # .3: attention far from uniform
    give_every_vector_a_part(model)
    with torch.no_grad():
        ours, theirs = model(tokens), huggingface_twin(model)(tokens).logits
    # the same float32 operations up to their order: a few roundings of 6e-8, over 3 layers
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_gradients_are_those_of_transformers(model, tokens):
    twin = huggingface_twin(model)
    model(tokens).logsumexp(-1).sum().backward()
    twin(tokens).logits.logsumexp(-1).sum().backward()
    theirs = dict(twin.named_parameters())
    largest = max(parameter.grad.abs().max().item() for parameter in theirs.values())
    for name, parameter in model.named_parameters():
        # the gradient of a key's bias is 0 but for rounding
        expected = theirs[name].grad
        assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_recomputed_activations_give_the_same_gradients(model, tokens):
    model(tokens).logsumexp(-1).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.recompute = True
    model(tokens).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_a_token_changes_no_logits_before_it(model, tokens):
    changed = tokens.clone()
    changed[:, 17] = (changed[:, 17] + 1) % 97
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :17], after[:, :17])
    assert (before[:, 17:] != after[:, 17:]).any(-1).all()


def test_the_head_stays_the_embedding_wherever_the_model_goes():
    with torch.device("meta"):
        model = GPT2(config())
    for moved in (model, model.bfloat16(), model.to_empty(device="cpu").initialize(seed=0)):
        assert moved.lm_head.weight is moved.transformer.wte.weight
    assert len({*model.parameters()}) == len(list(model.parameters()))


def test_a_meta_model_initializes_to_the_same_weights(model, tokens):
    with torch.device("meta"):
        meta = GPT2(config())
    assert all(tensor.is_meta for tensor in [*meta.parameters(), *meta.buffers()])
    real = meta.to_empty(device="cpu").initialize(seed=0)
    with torch.no_grad():
        assert torch.equal(real(tokens), model(tokens))


def test_initial_weights_have_gpt2s_spread():
    model = GPT2(config(vocab_size=512, hidden_size=128, max_sequence_length=256), seed=0)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert weight.eq(1.0 if ".ln_" in name and name.endswith("weight") else 0.0).all(), name
        else:
            expected = 0.02 / 6**0.5 if name.endswith("c_proj.weight") else 0.02
            # 16384 draws or more: the standard error of the spread is below 0.6 %
            assert_close(weight.std().item(), expected, rtol=0.03, atol=0, msg=name)


def test_the_published_size_is_met():
    counts = [GPT2Config(v, 768, 12, 12).parameter_count for v in (50_257, 50_304)]
    assert counts == [124_439_808, 124_475_904]


def test_routing_sees_matrices_as_out_by_in_and_splits_the_fused_one(model):
    groups = sinkgd.param_groups(model)
    layouts = {
        name: (group["algorithm"], group.get("layout"), group.get("split"))
        for group in groups
        for name, _ in group["params"]
    }
    matrices = {name for name, (algorithm, *_) in layouts.items() if algorithm == "sinkgd"}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert matrices == {f"transformer.h.{i}.{part}.weight" for i in range(3) for part in parts}
    assert layouts["transformer.h.0.attn.c_attn.weight"] == ("sinkgd", "transposed", 3)
    assert layouts["transformer.h.0.mlp.c_fc.weight"] == ("sinkgd", "transposed", 1)


@pytest.mark.parametrize("kind", [GPT2, Lens])
@pytest.mark.parametrize("precision", ["autocast", "pure"])
def test_a_bfloat16_training_step_is_finite(kind, precision, tokens):
    own = {"key_value_rank": 8, "context_rank": 8}
    model = GPT2(config()) if kind is GPT2 else Lens(LensConfig(**SIZES, **own))
    if precision == "pure":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        logits = model(tokens)
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.ne(0).any(), name


def test_attention_entropy_is_that_of_transformers_weights(tokens):
    model = GPT2(config(initializer_std=0.3), seed=3)
    twin = huggingface_twin(model)
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = twin(tokens, output_attentions=True).attentions
    figures = model.statistics(tokens)
    for number, weights in enumerate(attentions):
        p = weights.double()
        entropy = -(p * p.clamp_min(1e-300).log()).sum(-1).mean().item()
        assert figures[f"attention_entropy/block_{number}"] == pytest.approx(entropy, rel=1e-4)
    assert set(figures) == {
        f"attention_entropy/{what}"
        for what in ("mean", "min", "max", "block_0", "block_1", "block_2")
    }


def test_statistics_leave_no_hooks_and_no_gradients(model, tokens):
    with torch.no_grad():
        before = model(tokens)
    model.statistics(tokens)
    assert not any(block._forward_pre_hooks for block in model.blocks)
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(tokens), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "hidden_size 48 over num_heads 5 must be a whole number"),
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        ({"norm_eps": 0.0}, "norm_eps must be positive, got 0.0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        config(**changes)


def test_a_sequence_over_the_limit_is_refused_with_both_lengths(model):
    assert model(torch.zeros(1, 32, dtype=torch.long)).shape == (1, 32, 97)
    with pytest.raises(ModelError, match=r"33 tokens .* max_sequence_length of 32"):
        model(torch.zeros(1, 33, dtype=torch.long))
