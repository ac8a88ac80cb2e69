"""Llama: it is Hugging Face's model, it sees only the past, it is safe in every precision."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import sinkgd
from sinkgd.lab.models import (
    Llama,
    LlamaConfig,
    ModelError,
    RotaryScaling,
    add_adapters,
    draw_adapters,
    language_model,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_layers": 3,
    "num_heads": 4,
    "max_sequence_length": 32,
}
# With a theta of 500, the six feature pairs of a head make 2.55 to 0.014 turns in 16 tokens: the
# fastest stays as it is, two are between, and the slower ones are divided by the whole factor.
SCALING = RotaryScaling(
    factor=8.0,
    low_freq_factor=0.5,
    high_freq_factor=2.0,
    original_max_position_embeddings=16,
)
GROUPED = {"num_key_value_heads": 2}
SCALED = {"rope_theta": 500.0, "rope_scaling": SCALING}
LLAMA_3 = {**GROUPED, **SCALED, "head_dim": 16, "tied_head": True}
# What LLaMA 3 has and LLaMA 1 has not, each alone and all together.
NEW = [
    GROUPED,
    {"num_key_value_heads": 1},
    {"tied_head": True},
    {"head_dim": 16},
    {"head_dim": 6, "num_heads": 5, "num_key_value_heads": 1},
    SCALED,
    LLAMA_3,
]
new = pytest.mark.parametrize("changes", NEW, ids="-".join)


def config(**changes):
    return LlamaConfig(**{**SIZES, **changes})


@pytest.fixture
def model():
    return Llama(config(), seed=0)


@pytest.fixture
def tokens():
    return torch.randint(97, (2, 29), generator=torch.Generator().manual_seed(1))


def huggingface_twin(model: Llama) -> nn.Module:
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    twin = LlamaForCausalLM(HFConfig(**model.config.huggingface())).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 500.0},
        {"norm_eps": 1e-2},
        {"num_heads": 1},
        {"num_heads": 24},
        # transformers 5 refuses heads that do not divide the hidden size
        *(changes for changes in NEW if "num_heads" not in changes),
    ],
    ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items()) or "default",
)
def test_logits_are_those_of_transformers(changes, tokens):
    model = Llama(config(initializer_std=0.3, **changes), seed=3)  # .3: attention far from uniform
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(4))
        ours, theirs = model(tokens), huggingface_twin(model)(tokens).logits
    # the same float32 operations up to their order: a few roundings of 6e-8, over 3 layers
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("changes", [{}, LLAMA_3], ids=["default", "llama 3"])
def test_gradients_are_those_of_transformers(changes, tokens):
    model = Llama(config(**changes), seed=0)
    twin = huggingface_twin(model)
    model(tokens).logsumexp(-1).sum().backward()
    twin(tokens).logits.logsumexp(-1).sum().backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        expected = theirs[name].grad
        scale = expected.abs().max().item()
        assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_a_token_changes_no_logits_before_it(model, tokens):
    changed = tokens.clone()
    changed[:, 17] = (changed[:, 17] + 1) % 97
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :17], after[:, :17])
    assert (before[:, 17:] != after[:, 17:]).any(-1).all()


def test_a_shared_head_of_keys_is_one_head_for_each_query_head(tokens):
    grouped = Llama(config(**GROUPED, initializer_std=0.3))
    whole = Llama(config())
    state = grouped.state_dict()
    for name in [name for name in state if "k_proj" in name or "v_proj" in name]:
        state[name] = state[name].view(2, 12, 48).repeat_interleave(2, dim=0).flatten(0, 1)
    whole.load_state_dict(state)
    with torch.no_grad():
        assert_close(grouped(tokens), whole(tokens), rtol=1e-5, atol=1e-5)


def test_scaled_rotations_are_kept_blended_or_divided():
    plain, scaled = (Llama(config(rope_theta=500.0, rope_scaling=s)) for s in (None, SCALING))
    ratios = []
    for model in (plain, scaled):
        rotation = model.model.rotation
        ratios.append(torch.atan2(rotation.sin[1], rotation.cos[1]))  # radians per token
    kept = ratios[1] / ratios[0]
    turns = 16 * 500.0 ** (-torch.arange(0, 12, 2) / 12) / (2 * torch.pi)
    assert_close(kept[turns > 2], torch.ones(1), rtol=1e-6, atol=0)
    assert_close(kept[turns < 0.5], torch.full((4,), 1 / 8), rtol=1e-4, atol=0)
    share = (turns[1] - 0.5) / 1.5
    assert_close(kept[1], share + (1 - share) / 8, rtol=1e-5, atol=0)


@new
def test_the_formulas_count_what_the_model_has(changes):
    sizes = config(**changes)
    model = Llama(sizes)
    groups = sinkgd.param_groups(model)
    weights = {g["algorithm"]: [] for g in groups}
    for group in groups:
        weights[group["algorithm"]] += group["params"]
    matrices = sum(weight.numel() for _, weight in weights["sinkgd"])
    assert matrices == sizes.linear_parameter_count
    others = [name for name, weight in weights["adamw"] if weight.ndim == 2]
    assert others == ["model.embed_tokens.weight", "lm_head.weight"][: 2 - sizes.tied_head]
    assert sum(p.numel() for p in model.parameters()) == sizes.parameter_count


@new
def test_recomputed_blocks_give_the_same_bits(changes, tokens):
    gradients = []
    for recompute in (False, True):
        model = Llama(config(**changes), seed=0).train()
        model.recompute = recompute
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens).float().logsumexp(-1).mean()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


@new
def test_adapters_fit_every_matrix(changes, tokens):
    model = Llama(config(**changes), seed=0)
    with torch.no_grad():
        before = model(tokens)
    add_adapters(model, rank=2)
    draw_adapters(model, seed=0)
    out = model(tokens)
    assert torch.equal(out, before)
    out.logsumexp(-1).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * 7 * 3  # A and B of seven matrices in three blocks


def test_a_tied_head_stays_tied_through_moves_and_casts(tokens):
    with torch.device("meta"):
        model = Llama(config(**LLAMA_3))
    model.to_empty(device="cpu").initialize(seed=0)
    real = Llama(config(**LLAMA_3), seed=0)
    with torch.no_grad():
        assert torch.equal(model(tokens), real(tokens))
    for moved in (model, real.bfloat16(), real.double()):
        assert moved.lm_head.weight is moved.model.embed_tokens.weight


def test_sequences_do_not_see_each_other(model, tokens):
    with torch.no_grad():
        assert_close(model(tokens)[1:], model(tokens[1:]), rtol=1e-5, atol=1e-6)


def test_the_order_of_the_past_matters():
    model = Llama(config(num_layers=1, initializer_std=0.3))
    with torch.no_grad():
        one, other = model(torch.tensor([[5, 7, 11], [7, 5, 11]]))[:, -1]
    # without positions, a single layer sees the past as a set and the two would agree
    assert (one - other).abs().max() > 1e-2 * one.abs().max()


def test_attention_depends_on_relative_positions_alone():
    rotation = Llama(config()).model.rotation
    q, k = torch.randn(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = rotation(q.expand(1, 1, 32, 12)) @ rotation(k.expand(1, 1, 32, 12)).mT
    for distance in range(32):
        diagonal = scores[0, 0].diagonal(distance)
        # the tables are float32: angles up to 32 carry 2e-6 of rounding
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert scores.std() > 0.1


def test_pure_bfloat16_stays_near_float32(model, tokens):
    with torch.no_grad():
        expected = model(tokens)
        low = Llama(config(), seed=0).bfloat16()(tokens)
    assert low.dtype == torch.bfloat16
    # 8 bits of mantissa, a dozen roundings in sequence: a few percent of the largest logit
    assert (low - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("precision", ["autocast", "pure"])
def test_a_bfloat16_training_step_is_finite(model, tokens, precision):
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


def test_norms_compute_in_float32():
    from sinkgd.lab.models.llama import RMSNorm

    # 300² is over float16's 65504
    x = torch.full((1, 8), 300.0, dtype=torch.float16)
    assert_close(RMSNorm(8, 1e-6).half()(x), torch.ones_like(x))


def test_the_position_tables_survive_casts_and_moves(model):
    cos, sin = model.model.rotation.cos.clone(), model.model.rotation.sin.clone()
    with torch.device("meta"):
        other = Llama(config())
    other.bfloat16().to_empty(device="cpu").initialize(seed=0)
    for rotation in (model.bfloat16().model.rotation, other.model.rotation):
        assert torch.equal(rotation.cos, cos)
        assert torch.equal(rotation.sin, sin)


def test_the_position_tables_are_not_saved(model):
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_a_meta_model_holds_no_memory_and_initializes_to_the_same_weights(model, tokens):
    with torch.device("meta"):
        meta = Llama(config())
    assert all(tensor.is_meta for tensor in [*meta.parameters(), *meta.buffers()])
    real = meta.to_empty(device="cpu").initialize(seed=0)
    with torch.no_grad():
        assert torch.equal(real(tokens), model(tokens))


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 63, 64, 65, 79, 80, 1000])
def test_weights_drawn_in_chunks_are_those_drawn_at_once(monkeypatch, rows):
    monkeypatch.setattr(language_model, "_CHUNK", 64)
    model = Llama(config(vocab_size=rows, hidden_size=2, num_heads=1), seed=5)
    whole = torch.empty(rows, 2).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(5))
    assert torch.equal(model.model.embed_tokens.weight, whole)


def test_a_seed_means_the_same_weights_and_moves_no_other_random_number(model):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    again, other = Llama(config(), seed=0), Llama(config(), seed=1)
    assert torch.equal(torch.rand(3), expected)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
        assert "norm" in name or not torch.equal(weight, other.state_dict()[name]), name


def test_initial_weights_have_the_configured_spread():
    model = Llama(config(vocab_size=512, hidden_size=128, intermediate_size=256), seed=0)
    for name, weight in model.state_dict().items():
        if "norm" in name:
            assert weight.eq(1).all(), name
        else:
            # 16384 draws or more: the standard error of the spread is below 0.6 %
            assert_close(weight.std().item(), 0.02, rtol=0.03, atol=0)
            assert abs(weight.mean()) < 1e-3, name


def test_it_learns_a_batch_by_heart(model, tokens):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "hidden_size 48 over num_heads 5 must be an even whole number"),
        ({"num_heads": 16}, "hidden_size 48 over num_heads 16 must be an even whole number"),
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        ({"vocab_size": -1}, "vocab_size must be positive, got -1"),
        ({"norm_eps": 0.0}, "norm_eps must be positive, got 0.0"),
        ({"head_dim": 7}, "head_dim must be even, .* got 7"),
        ({"head_dim": 0}, "head_dim must be positive, got 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be positive, got 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide the 4"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8, which does not divide the 4"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 0.5}, "factor of rotary positions must be at least 1, got 0.5"),
        ({"low_freq_factor": 2.0}, r"high_freq_factor .* is 2\.0; it must exceed low_.*, 2\.0"),
        ({"low_freq_factor": -1.0}, "low_freq_factor must be positive, got -1.0"),
        ({"original_max_position_embeddings": 0}, "original_max_.* must be positive, got 0"),
    ],
)
def test_scalings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        replace(SCALING, **changes)


def test_a_sequence_over_the_limit_is_refused_with_both_lengths(model):
    assert model(torch.zeros(1, 32, dtype=torch.long)).shape == (1, 32, 97)
    with pytest.raises(ModelError, match=r"33 tokens .* max_sequence_length of 32"):
        model(torch.zeros(1, 33, dtype=torch.long))


def test_tokens_without_a_batch_are_refused(model):
    with pytest.raises(ModelError, match=r"shape \(batch, time\), got \(7,\)"):
        model(torch.zeros(7, dtype=torch.long))
