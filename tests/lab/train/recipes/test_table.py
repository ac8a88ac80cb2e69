"""The registry: every recipe is complete, builds what it says, and refuses what it does not."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import sinkgd
from lab.train.recipes.tiny import FASTER, built, tiny_model, train
from sinkgd.lab.models import add_adapters, build_model
from sinkgd.lab.recorded_names import recipe_now
from sinkgd.lab.train.config import ConfigError, OptimizerConfig
from sinkgd.lab.train.recipes import RECIPES, resolve_optimizer
from sinkgd.optim.grouped import GroupedOptimizer

GRID = Path(__file__).parents[4] / "benchmarks/learning_rates/2026-11-22-nano-sotu.jsonl"
OPTIONS = {field.name for field in fields(OptimizerConfig)} - {"recipe"}
recipes = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(scope="module")
def model():
    return build_model("llama-nano", vocab_size=64, max_sequence_length=16)


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}


def test_the_table_is_known_in_full():
    assert list(RECIPES) == [
        *("sinkgd", "sinkgd-paper", "sinkgd-finetune", "sinkgd-stateless", "swan", "tempered"),
        *("spam", "adamw-spam", "scale"),
        *("rows-only", "columns-only", "frobenius", "sign"),
        *("adam", "adamw", "adamw-one-lr", "sgd", "sgd-momentum", "muon"),
        *("galore", "fira", "apollo", "apollo-mini", "racs"),
        *("stable-spam", "adafactor", "lion", "soap"),
    ]


@recipes
def test_a_recipe_describes_itself_and_takes_known_options(name):
    recipe = RECIPES[name]
    assert recipe.name == name
    assert recipe.summary
    assert recipe.source
    assert "lr" in recipe.defaults
    assert set(recipe.defaults) <= OPTIONS


@pytest.mark.parametrize("name", ["scale", "stable-spam", "adafactor", "lion", "soap"])
def test_matrices_may_have_a_rate_of_their_own(model, name):
    one, two = (rates(built(model, name, lr=0.08, matrix_lr=rate)) for rate in (None, 0.005))
    assert set(one.values()) == {0.08}
    assert two == {
        weight: 0.005 if "layers" in weight and model.get_parameter(weight).ndim == 2 else 0.08
        for weight in two
    }


def test_a_rate_of_matrices_leaves_embeddings_out_that_are_normalized_like_them():
    gpt2 = build_model("gpt2-nano", vocab_size=64, max_sequence_length=16)
    found = rates(built(gpt2, "scale", lr=0.08, matrix_lr=0.005))
    assert {name for name, rate in found.items() if rate == 0.005} == {
        name for name, param in gpt2.named_parameters() if ".h." in name and param.ndim == 2
    }


@recipes
def test_every_parameter_is_in_one_group(model, name):
    optimizer = built(model, name)
    found = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in found} == {id(p) for p in model.parameters()}
    assert len(found) == len(list(model.parameters()))


# Other values than any recipe has; clipping is the trainer's, and adapters are tested below.
ELSEWHERE = {"clip_norm", "adapters", "cross_fit"}
OTHERS = {
    "lr": 0.0123,
    "matrix_lr": 0.0234,
    "weight_decay": 0.5,
    "cautious_decay": True,
    "beta1": 0.3,
    "beta2": 0.3,
    "sinkhorn_iterations": 2,
    "newton_schulz_steps": 3,
    "whitened": "mlp",
    "momentum": 0.5,
    "nesterov": True,
    "momentum_place": "after",
    "momentum_bits": 8,
    "momentum_rank": 2,
    "low_rank_momentum": 0.5,
    "averaged_scales": 0.5,
    "deflated_start": "kept",
    "weight_projection": True,
    "constant_norm": True,
    "last": "row",
    "deflated_rank": 3,
    "operator_norm": "muon",
    "base_width": 64,
    "tables": "sinkgd",
    "tables_lr": 0.0345,
    "tau": 0.3,
    "n_iter": 1,
    "rank": 2,
    "projection_every_steps": 2,
    "projection_scale": 0.5,
    "reset_every_steps": 3,
    "rounding": "stochastic",
}
# What an option needs beside it to mean something.
WITH = {
    "nesterov": {"momentum": 0.5},
    "cautious_decay": {"weight_decay": 0.5},
    "momentum_place": {"momentum": 0.5},
    "momentum_bits": {"momentum": 0.5, "momentum_place": "after"},
    "low_rank_momentum": {"momentum_rank": 2},
    "deflated_start": {"deflated_rank": 2},
}


def test_every_option_has_another_value():
    assert set(OTHERS) | ELSEWHERE == OPTIONS


def taken():
    return [(name, o) for name, r in RECIPES.items() for o in r.defaults if o not in ELSEWHERE]


@pytest.mark.parametrize(("name", "option"), taken())
def test_every_option_changes_the_training(name, option):
    dtype = torch.bfloat16 if option == "rounding" else torch.float32
    models = [tiny_model(dtype=dtype) for _ in range(2)]
    both = WITH.get(option, {})
    if option != "lr":  # bfloat16 would round the steps of some recipes' own rates away
        both = {**both, **FASTER.get(name, {})}
    train(models[0], built(models[0], name, **both), 4)
    train(models[1], built(models[1], name, **{option: OTHERS[option]}, **both), 4)
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert not all(torch.equal(own, other) for own, other in pairs)


@recipes
def test_a_recipe_with_decay_of_ours_takes_cautious_decay_and_no_other_does(model, name):
    ours = isinstance(built(model, name), GroupedOptimizer)
    assert ("cautious_decay" in RECIPES[name].defaults) == ours
    if ours:
        optimizer = built(model, name, weight_decay=0.5, cautious_decay=True)
        assert all(group["cautious_decay"] for group in optimizer.param_groups)


def test_cautious_decay_is_refused_where_nothing_decays(model):
    with pytest.raises(ConfigError, match=r"cautious_decay is True, but optimizer.weight_decay is"):
        built(model, "sinkgd", cautious_decay=True)


# What disables the option that another one needs.
OFF = {
    "tau": {"n_iter": 0},
    **{option: dict.fromkeys(needed, 0) for option, needed in WITH.items()},
}
OFF["momentum_bits"] = {"momentum": 0}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, o)
        for name, o in taken()
        if o in OFF and OFF[o].keys() <= RECIPES[name].defaults.keys()
    ],
)
def test_an_option_without_the_one_that_it_needs_is_refused(name, option):
    """What the optimizer would refuse is refused when the configuration is read."""
    ((needed, off),) = OFF[option].items()
    options = {option: OTHERS[option], needed: off}
    with pytest.raises(ConfigError, match=rf"{option} is {OTHERS[option]!r}, but .*{needed} is 0"):
        resolve_optimizer(OptimizerConfig(recipe=name, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum_bits": 16}, r"momentum_bits is 16; it must be one of \(8, 32\)"),
        ({"low_rank_momentum": 0.9}, "low_rank_momentum is 0.9, but optimizer.momentum_rank is 0"),
        ({"low_rank_momentum": 1.0, "momentum_rank": 4}, "must be at least 0 and less than 1"),
        ({"averaged_scales": 1.0}, "averaged_scales is 1.0; it must be at least 0 and less"),
        ({"deflated_start": "kept", "deflated_rank": 0}, "deflated_start is 'kept', but"),
        ({"momentum_rank": -1}, "momentum_rank is -1; it must be at least 0"),
    ],
)
def test_an_option_out_of_range_or_without_effect_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        resolve_optimizer(OptimizerConfig(recipe="sinkgd", **options))


@pytest.mark.parametrize(("given", "algorithm"), [(None, "adamw"), ("sinkgd", "sinkgd")])
def test_adapters_get_the_algorithm_that_is_asked_for(given, algorithm):
    model = add_adapters(build_model("gpt2-nano", vocab_size=64, max_sequence_length=16), 2)
    optimizer = built(model, "sinkgd-finetune", lr=0.5, adapters=given)
    assert {group["algorithm"] for group in optimizer.param_groups} == {algorithm}
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)


@recipes
def test_adapters_are_trained_or_refused_with_another_recipe(name):
    model = add_adapters(build_model("gpt2-nano", vocab_size=64, max_sequence_length=16), 2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    try:
        optimizer = built(model, name, **FASTER.get(name, {}))
    except ConfigError as error:
        assert "give optimizer.recipe sinkgd-finetune" in str(error)  # noqa: PT017
        assert name not in ("sinkgd-finetune", "adamw-one-lr")
        return
    train(model, optimizer, 2)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


@recipes
def test_frozen_weights_are_left_out(name):
    model = tiny_model()
    frozen = next(model.parameters()).requires_grad_(False)
    before = frozen.detach().clone()
    optimizer = built(model, name, **FASTER.get(name, {}))
    train(model, optimizer, 2)
    assert torch.equal(frozen, before)
    assert all(param is not frozen for group in optimizer.param_groups for param in group["params"])


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if "matrix_lr" in r.defaults])
def test_block_matrices_have_their_own_rate(model, name):
    found = rates(built(model, name, lr=0.5, matrix_lr=0.25))
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == 0.5
    assert found["model.norm.weight"] == 0.5
    assert found["model.layers.0.self_attn.q_proj.weight"] == 0.25
    assert found["model.layers.3.mlp.down_proj.weight"] == 0.25


@pytest.mark.parametrize("name", ["adamw", "adamw-one-lr"])
def test_the_baselines_are_torchs_own_fused_adamw(model, name):
    optimizer = built(model, name)
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["fused"] for group in optimizer.param_groups)


def test_the_papers_baseline_has_one_rate_and_no_clipping(model):
    assert len(set(rates(built(model, "adamw-one-lr")).values())) == 1
    assert resolve_optimizer(OptimizerConfig(recipe="adamw-one-lr")).clip_norm == 0
    assert resolve_optimizer(OptimizerConfig(recipe="adamw")).clip_norm == 1


def test_sinkgd_paper_is_the_papers_but_for_the_rates():
    options = resolve_optimizer(OptimizerConfig(recipe="sinkgd-paper"))
    assert options.deflated_rank == 0
    assert options.sinkhorn_iterations == 5
    assert options.weight_decay == options.clip_norm == 0


@pytest.mark.parametrize("name", ["sinkgd-paper", "adamw", "adamw-one-lr"])
def test_rates_are_the_best_of_the_recorded_grid_with_as_many_runs_for_each(name):
    rows = [json.loads(line) for line in GRID.read_text().splitlines()]
    runs = [row for row in rows if recipe_now(row["recipe"], 1) == name]
    assert len(runs) == 8
    assert all(row["finished"] for row in runs)
    best = min(runs, key=lambda row: row["final"]["val_loss"])["optimizer"]
    options = resolve_optimizer(OptimizerConfig(recipe=name))
    assert options.lr == best["lr"]
    assert options.matrix_lr == best.get("matrix_lr")


def test_algorithms_are_those_of_the_recipe(model):
    def algorithms(name: str) -> set[str]:
        return {group["algorithm"] for group in built(model, name).param_groups}

    assert algorithms("sinkgd") == {"sinkgd", "adamw"}
    assert algorithms("swan") == {"swan", "adamw"}
    assert isinstance(built(model, "sinkgd-stateless"), sinkgd.SinkGD)


def groups_of(optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    return {name: group for group in optimizer.param_groups for name in group["param_names"]}


@pytest.mark.parametrize("tables", ["sinkgd", "sinkgd-table", "sage"])
def test_embedding_and_head_may_have_an_algorithm_and_a_rate_of_their_own(model, tables):
    own = {"tables": tables, "tables_lr": 0.5}
    found = groups_of(built(model, "sinkgd", **own, lr=0.25, momentum=0.5))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert (found[name]["algorithm"], found[name]["lr"]) == (tables, 0.5)
        assert found[name].get("momentum") == {"sinkgd": 0.0, "sinkgd-table": 0.95}.get(tables)
        assert not found[name].get("deflated_rank")
    assert (found["model.norm.weight"]["algorithm"], found["model.norm.weight"]["lr"]) == (
        "adamw",
        0.25,
    )
    matrix = found["model.layers.0.mlp.up_proj.weight"]
    assert (matrix["momentum"], matrix["deflated_rank"]) == (0.5, 15)


@pytest.mark.parametrize(("whitened", "spared"), [("attention", "mlp"), ("mlp", "self_attn")])
def test_swan_may_whiten_a_part_of_a_block(model, whitened, spared):
    found = groups_of(built(model, "swan", whitened=whitened))
    for name, group in found.items():
        if ".layers." in name and group["algorithm"] != "adamw":
            assert group["algorithm"] == ("sinkgd" if f".{spared}." in name else "swan")


def test_wider_matrices_get_less_with_a_base_width(model):
    found = groups_of(built(model, "sinkgd", base_width=128, matrix_lr=0.01))
    assert found["model.layers.0.mlp.up_proj.weight"]["lr"] == pytest.approx(0.01)
    assert found["model.layers.0.mlp.down_proj.weight"]["lr"] == pytest.approx(0.01 * 128 / 352)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (OptimizerConfig(recipe="sinkgdd"), "optimizer.recipe is 'sinkgdd'; did you mean 'sinkgd'"),
        (
            OptimizerConfig(recipe="adamw-one-lr", matrix_lr=0.1),
            "optimizer.matrix_lr is 0.1, but recipe 'adamw-one-lr' does not take it",
        ),
        (OptimizerConfig(lr=0.0), "optimizer.lr is 0.0; it must be positive"),
        (OptimizerConfig(lr=float("nan")), "optimizer.lr is nan; it must be positive"),
        (OptimizerConfig(matrix_lr=-1.0), "optimizer.matrix_lr is -1.0; it must be positive"),
        (OptimizerConfig(beta2=1.0), "optimizer.beta2 is 1.0; it must be at least 0 and less"),
        (OptimizerConfig(clip_norm=-1.0), "optimizer.clip_norm is -1.0; it must be at least 0"),
        (OptimizerConfig(sinkhorn_iterations=0), "optimizer.sinkhorn_iterations is 0"),
        (OptimizerConfig(base_width=0), "optimizer.base_width is 0; it must be at least 1"),
        (OptimizerConfig(tables_lr=0.0), "optimizer.tables_lr is 0.0; it must be positive"),
        (OptimizerConfig("swan", newton_schulz_steps=0), "newton_schulz_steps is 0; it must be at"),
        (OptimizerConfig("muon", momentum=1.0), "optimizer.momentum is 1.0; it must be at least 0"),
        (OptimizerConfig("tempered", tau=0.0), "optimizer.tau is 0.0; it must be positive"),
        (OptimizerConfig("tempered", n_iter=-1), "optimizer.n_iter is -1; it must be at least 0"),
        (OptimizerConfig("galore", rank=-1), "optimizer.rank is -1; it must be at least 0"),
        (OptimizerConfig("fira", projection_scale=0.0), "projection_scale is 0.0; it must be posi"),
        (OptimizerConfig("soap", projection_every_steps=0), "projection_every_steps is 0; it must"),
        (OptimizerConfig("stable-spam", reset_every_steps=0), "reset_every_steps is 0; it must be"),
        (OptimizerConfig("adam", weight_decay=0.1), "weight_decay is 0.1, but recipe 'adam' does"),
    ],
)
def test_errors_name_option_and_value(options, message):
    with pytest.raises(ConfigError, match=message):
        resolve_optimizer(options)
