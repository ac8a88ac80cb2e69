"""Lens: it is its formula in loops, it sees only the past, and it begins as a GPT-2 of low rank."""

import math

import pytest
import torch
from torch.testing import assert_close

import sinkgd
from sinkgd.lab.models import GPT2, GPT2Config, Lens, LensConfig, ModelError, lens_from_gpt2

SIZES = {
    "vocab_size": 23,
    "hidden_size": 12,
    "num_layers": 2,
    "num_heads": 3,
    "max_sequence_length": 16,
    "initializer_std": 0.4,  # attention far from uniform
}


def config(**changes):
    return LensConfig(**{**SIZES, "key_value_rank": 5, "context_rank": 4, **changes})


@pytest.fixture
def model():
    model = Lens(config(), seed=0)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "context_share" not in name:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5, generator=draw))
    return model


@pytest.fixture
def tokens():
    return torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(1))


def layer_norm(x, weight, bias):
    mean, variance = x.mean(), x.var(unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mixed_attention(w, xs, heads):
    """One token, one head, one pair at a time; ``w`` has the weights of the attention."""
    size = len(xs[0]) // heads
    q = [x @ w["query.weight"] + w["query.bias"] for x in xs]
    k = [w["key.up.weight"] @ (w["key.down.weight"] @ x) for x in xs]
    v = [w["value.up.weight"] @ (w["value.down.weight"] @ x) for x in xs]
    out = []
    for i in range(len(xs)):
        mixed = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            gates = w["gates"][[head, heads + head, 2 * heads + head]]
            std, rec, disc = gates.exp() / gates.exp().sum()
            found = [w["direction"][own] @ key[own] for key in k]
            logits = torch.stack(
                [
                    std * (q[i][own] @ k[j][own]) / math.sqrt(size)
                    + rec * (q[j][own] @ k[i][own]) / math.sqrt(size)
                    + disc * (found[j] - sum(found) / len(found))
                    for j in range(i + 1)
                ]
            )
            weights = logits.exp() / logits.exp().sum()
            mixed.append(sum(p * v[j][own] for j, p in enumerate(weights)))
        out.append(torch.cat(mixed) @ w["c_proj.weight"] + w["c_proj.bias"])
    return out


def below(weights, prefix):
    return {k.removeprefix(prefix): x for k, x in weights.items() if k.startswith(prefix)}


def logits_by_loops(model, sequence, g):
    """The model's formula in float64, from its weights alone."""
    weights = {name: x.double() for name, x in model.state_dict().items()}
    body = below(weights, "transformer.")
    xs = [body["wte.weight"][token] + body["wpe.weight"][i] for i, token in enumerate(sequence)]
    for layer in range(model.config.num_layers):
        w = below(body, f"h.{layer}.")
        normed = [layer_norm(x, w["ln_1.weight"], w["ln_1.bias"]) for x in xs]
        attention = mixed_attention(below(w, "attn."), normed, model.config.num_heads)
        for i, x in enumerate(xs):
            y = layer_norm(x + attention[i], w["ln_2.weight"], w["ln_2.bias"])
            a = w["mlp.context_share"].clamp(0, 1)
            context = w["mlp.context.up.weight"] @ (w["mlp.context.down.weight"] @ attention[i])
            h = (1 - a) * gelu(y @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"]) + a * context
            mlp = h @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"]
            xs[i] = x + g * attention[i] + (1 - g) * mlp
    last = [layer_norm(x, body["ln_f.weight"], body["ln_f.bias"]) for x in xs]
    return torch.stack([body["wte.weight"] @ x for x in last])


@pytest.mark.parametrize(
    ("step", "bias"), [(0, 0.0), (60, -1.6), (100, -3.2)], ids=["start", "midway", "end"]
)
def test_logits_are_those_of_the_formula_in_loops(model, tokens, step, bias):
    model.at_step(step, steps=104)
    g = 1 / (1 + math.exp(-(2.2 + bias)))
    with torch.no_grad():
        ours = model.double()(tokens)
        for row, sequence in enumerate(tokens):
            assert_close(ours[row], logits_by_loops(model, sequence, g), rtol=1e-6, atol=1e-6)


def test_float32_is_near_the_formula_in_loops(model, tokens):
    with torch.no_grad():
        ours, expected = model(tokens)[0], logits_by_loops(model, tokens[0], model.attention_share)
    # a few roundings of 6e-8 a layer, at logits of a few units
    assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_token_changes_no_logits_before_it(model, tokens):
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 23
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert_close(before[:, :6], after[:, :6], rtol=1e-6, atol=1e-6)
    assert (before[:, 6:] - after[:, 6:]).abs().amax(-1).gt(1e-3).all()


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["standard", "reciprocity", "discoverability"])
def test_every_kind_of_logit_counts(model, tokens, kind):
    with torch.no_grad():
        before = model(tokens)
        for block in model.blocks:
            block.attn.gates.view(3, -1)[kind] += 2
        after = model(tokens)
    assert (before - after).abs().max() > 1e-2


def test_gates_and_shares_start_as_stated():
    model = Lens(config(num_heads=4), seed=0)
    for block in model.blocks:
        expected = torch.tensor([2.2, 0.6, 0.1]).softmax(0)
        for weights in block.attn.mixture().T:
            assert_close(weights, expected)
        assert_close(block.mlp.share().item(), 0.1)
    wide = Lens(LensConfig(11, 256, 1, 8), seed=0)
    assert wide.blocks[0].attn.direction.std().item() == pytest.approx(0.02, rel=0.15)


def test_factors_start_as_the_best_approximation_with_the_spectrum_halved(model):
    torch.manual_seed(0)
    weight = torch.randn(12, 12)
    factors = model.blocks[0].attn.key
    factors.approximate(weight)
    up, down = factors.up.weight.detach(), factors.down.weight.detach()
    sigma = torch.linalg.svdvals(weight)
    # Eckart and Young: no matrix of rank 5 is nearer
    error = torch.linalg.matrix_norm(weight - up @ down)
    assert_close(error, sigma[5:].square().sum().sqrt())
    assert_close(up.T @ up, sigma[:5].diag(), rtol=1e-4, atol=1e-4)
    assert_close(down @ down.T, sigma[:5].diag(), rtol=1e-4, atol=1e-4)


def test_keys_and_values_start_with_the_spectrum_of_gpt2s_draw():
    lens = Lens(LensConfig(23, 64, 1, 4, key_value_rank=64, context_rank=8), seed=0)
    for factors in (lens.blocks[0].attn.key, lens.blocks[0].attn.value):
        whole = factors.up.weight @ factors.down.weight
        assert whole.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_seed_means_the_same_weights_for_any_number_of_threads():
    sizes = LensConfig(23, 128, 1, 4, key_value_rank=21, context_rank=21)
    threads, models = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            models.append(Lens(sizes, seed=3))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for name, weight in models[0].state_dict().items():
        assert torch.equal(weight, models[1].state_dict()[name]), name


@pytest.fixture
def gpt2():
    gpt2 = GPT2(GPT2Config(**SIZES), seed=7)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in gpt2.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5, generator=draw))
    return gpt2


def test_a_lens_of_full_rank_has_the_attention_of_its_gpt2(gpt2):
    lens = lens_from_gpt2(gpt2, config(key_value_rank=12))
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(lens.blocks, gpt2.blocks, strict=True):
        _, key, value = theirs.attn.c_attn.weight.chunk(3, dim=1)
        assert_close(ours.attn.key(x), x @ key, rtol=1e-4, atol=1e-5)
        assert_close(ours.attn.value(x), x @ value, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            ours.attn.gates.view(3, -1)[0] = 50.0  # standard logits alone
        assert_close(ours.attn(x), theirs.attn(x), rtol=1e-4, atol=1e-5)


def test_a_lens_keeps_what_it_shares_with_its_gpt2(gpt2):
    lens, source = lens_from_gpt2(gpt2, config()).state_dict(), gpt2.state_dict()
    shared = source.keys() & lens.keys()
    own = {name for name in source if ".c_attn." in name}
    assert shared == source.keys() - own
    for name in shared:
        if not name.endswith("attn.c_proj.bias"):  # takes the bias of values, too
            assert torch.equal(lens[name], source[name]), name


def test_a_gpt2_of_another_size_is_refused(gpt2):
    with pytest.raises(ModelError, match="num_heads is 3 in the GPT-2 and 2 in config; use 3"):
        lens_from_gpt2(gpt2, config(num_heads=2))


def test_no_gradient_flows_through_the_context_to_attention(model):
    mlp = model.blocks[0].mlp
    y, attention = (torch.randn(1, 3, 12, requires_grad=True) for _ in range(2))
    mlp(y, attention).square().sum().backward()
    assert attention.grad is None
    assert y.grad.ne(0).any()
    for parameter in mlp.context.parameters():
        assert parameter.grad.ne(0).any()


def test_every_parameter_learns(model, tokens):
    model(tokens).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.ne(0).any(), name


@pytest.mark.parametrize(("raw", "share"), [(-0.3, 0.0), (0.4, 0.4), (1.7, 1.0)])
def test_the_share_of_the_context_is_clamped(model, raw, share):
    mlp = model.blocks[0].mlp
    with torch.no_grad():
        mlp.context_share.fill_(raw)
        y, attention = torch.randn(2, 3, 12)
        inner = (1 - share) * gelu(mlp.c_fc(y)) + share * mlp.context(attention)
        assert_close(mlp(y, attention), mlp.c_proj(inner), rtol=1e-4, atol=1e-5)


def test_recomputed_activations_give_the_same_gradients(model, tokens):
    model.at_step(60, steps=104)
    model(tokens).logsumexp(-1).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.recompute = True
    model(tokens).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize(
    ("step", "logit"), [(0, 2.2), (2000, 2.2), (6000, 0.6), (10_000, -1.0), (10_400, -1.0)]
)
def test_the_route_is_annealed_between_the_stated_steps(step, logit):
    expected = 1 / (1 + math.exp(-logit))
    assert config().attention_share(step, 10_400) == pytest.approx(expected, rel=1e-9)


def test_a_short_run_anneals_the_route_in_proportion():
    shares = [config().attention_share(step, 52) for step in range(53)]
    for step, share in enumerate(shares):
        assert share == pytest.approx(config().attention_share(200 * step, 10_400))
    assert shares == sorted(shares, reverse=True)


def test_a_lens_that_was_told_no_step_is_at_the_start(model):
    assert model.attention_share == pytest.approx(1 / (1 + math.exp(-2.2)))


def test_the_parameter_count_is_that_of_the_parts_added_by_hand():
    h, inner, heads, rank, layers = 768, 3072, 12, 128, 12
    attention = (h * h + h) + 2 * (rank * h + h * rank) + (h * h + h) + 3 * heads + heads * 64
    mlp = (h * inner + inner) + (h * rank + rank * inner) + 1 + (inner * h + h)
    block = attention + mlp + 2 * (h + h)
    total = 50_304 * h + 1024 * h + layers * block + (h + h)
    assert LensConfig(50_304, h, layers, heads).parameter_count == total == 120_928_188
    assert round(total / 1e6, 1) == 120.9  # the published figure


def test_routing_gives_matrices_to_sinkgd_and_all_of_the_lens_own_vectors_to_adamw(model):
    where = {n: g["algorithm"] for g in sinkgd.param_groups(model) for n, _ in g["params"]}
    matrices = {name for name, algorithm in where.items() if algorithm == "sinkgd"}
    parts = ["attn.query", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    factored = ("attn.key", "attn.value", "mlp.context")
    parts += [f"{part}.{factor}" for part in factored for factor in ("up", "down")]
    assert matrices == {f"transformer.h.{i}.{part}.weight" for i in range(2) for part in parts}
    for name in ("attn.gates", "attn.direction", "mlp.context_share"):
        assert where[f"transformer.h.1.{name}"] == "adamw"


def test_weight_decay_spares_gates_directions_and_shares(model):
    for group in sinkgd.param_groups(model, weight_decay=0.1):
        for name, parameter in group["params"]:
            own = name.endswith(("gates", "direction", "context_share", "wte.weight", "wpe.weight"))
            assert group["weight_decay"] == (0.0 if own or parameter.ndim < 2 else 0.1), name


def test_statistics_say_what_the_gates_are(model, tokens):
    model.at_step(60, steps=104)
    with torch.no_grad():
        model.blocks[1].mlp.context_share.fill_(0.7)
    figures = model.statistics(tokens)
    mixture = torch.stack([block.attn.mixture() for block in model.blocks]).double()
    for kind, name in enumerate(["standard", "reciprocity", "discoverability"]):
        weights = mixture[:, kind]
        assert figures[f"gate_{name}/mean"] == pytest.approx(weights.mean().item(), rel=1e-6)
        assert figures[f"gate_{name}/min"] == pytest.approx(weights.min().item(), rel=1e-6)
        assert figures[f"gate_{name}/max"] == pytest.approx(weights.max().item(), rel=1e-6)
    assert figures["context_share/block_0"] == pytest.approx(0.1)
    assert figures["context_share/block_1"] == pytest.approx(0.7)
    assert figures["attention_share"] == pytest.approx(1 / (1 + math.exp(-0.6)))
    assert 0 < figures["attention_entropy/block_0"] < math.log(9)
    assert -1 < figures["reciprocity/mean"] < 1


def test_scores_that_are_symmetric_are_reciprocal(model, tokens):
    attention = model.blocks[0].attn
    with torch.no_grad():
        attention.query.bias.zero_()
        attention.query.weight.copy_((attention.key.up.weight @ attention.key.down.weight).T)
    assert model.statistics(tokens)["reciprocity/block_0"] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_value_rank": 13}, "key_value_rank must be from 1 to hidden_size 12, got 13"),
        ({"context_rank": 0}, "context_rank must be from 1 to hidden_size 12, got 0"),
        ({"anneal_start": 0.5, "anneal_end": 0.5}, "before anneal_end, got 0.5 and 0.5"),
        ({"num_heads": 5}, "hidden_size 12 over num_heads 5"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        config(**changes)
