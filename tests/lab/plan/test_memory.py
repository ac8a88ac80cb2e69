"""Memory by part: what sharding divides, what release frees, and what a method's formula gives."""

from dataclasses import replace

import pytest
import torch

import sinkgd
from sinkgd.lab.bench.bench_memory import allocations
from sinkgd.lab.models.llama import Llama
from sinkgd.lab.models.presets import PRESETS
from sinkgd.lab.plan import METHODS, Grid, Work, find_architecture, find_method, rank_memory
from sinkgd.lab.plan.method import eight_bit_bytes
from sinkgd.lab.plan.peak_memory import update_scratch
from sinkgd.lab.plan.rank_model import weights_of
from sinkgd.lab.plan.step_time import flops_of
from sinkgd.lab.train.config import OptimizerConfig
from sinkgd.lab.train.machine import weight_dtype
from sinkgd.lab.train.recipes import RECIPES, build_optimizer, resolve_optimizer
from sinkgd.lab.train.state import state_tensors

NINE = Work(find_architecture("llama-9m"), sequence_length=64, precision="float32")
FEW_TOKENS = replace(NINE.architecture, vocab_size=64)


SMALL = replace(NINE.architecture, vocab_size=600, num_layers=2)


def planned_state(name, precision="float32"):
    work = replace(NINE, architecture=SMALL, precision=precision)
    return rank_memory(work, Grid(), find_method(name)).state


def kept_after_a_step(options):
    model = Llama(replace(PRESETS["llama-9m"], vocab_size=600, num_layers=2))
    optimizer = build_optimizer(model, resolve_optimizer(options))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return sum(tensor.nbytes for tensor in state_tensors(optimizer))


# Options that no recipe has.
VARIANTS = {
    "sinkgd-projected": {"weight_projection": True},
    "sinkgd-constant-norm": {"constant_norm": True},
}


def variant_after_a_step(name):
    model = Llama(replace(PRESETS["llama-9m"], vocab_size=600, num_layers=2))
    groups = sinkgd.param_groups(model, deflated_rank=0)
    optimizer = sinkgd.SinkGDVariant(groups, **VARIANTS[name])
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", VARIANTS)
def test_state_of_a_variant_is_what_it_keeps_after_a_step(name):
    kept = sum(tensor.nbytes for tensor in state_tensors(variant_after_a_step(name)))
    assert planned_state(name) == kept


@pytest.mark.parametrize("name", VARIANTS)
def test_scratch_of_a_variant_is_what_a_step_takes(name):
    used = allocations(variant_after_a_step(name).step, torch.device("cpu")).peak
    planned = update_scratch(
        weights_of(SMALL), Grid(), find_method(name), device="cpu", per_matrix=False
    )
    assert planned == pytest.approx(used, rel=0.04)  # without three float64 of each row


@pytest.mark.parametrize("name", [name for name in METHODS if name in RECIPES])
def test_state_is_what_the_recipe_keeps_after_a_step(name):
    assert planned_state(name) == kept_after_a_step(OptimizerConfig(recipe=name))


def test_every_method_but_three_is_a_recipe_or_one_with_an_option():
    others = [name for name in METHODS if name not in RECIPES]
    kept = ["sinkgd-momentum-8bit", "sinkgd-low-rank", "sinkgd-cross-fit", "sinkgd-averaged-scales"]
    kept += ["sinkgd-kept", "sinkgd-pinned", *VARIANTS]
    options = ["sinkgd-momentum", *kept, "sinkgd-table", "sron"]
    assert others == ["sinkgd-8bit", *options, "adamw-8bit", "lora"]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", ["sinkgd-8bit", "adamw-8bit"])
def test_state_of_8_bit_adam_is_what_it_keeps_after_a_step(name, precision):
    pytest.importorskip("bitsandbytes", reason="pip install 'sinkgd[8bit]'")
    model = Llama(replace(PRESETS["llama-9m"], vocab_size=600, num_layers=2))
    model.to(weight_dtype(precision))
    everywhere = {".": "adamw-8bit"} if name == "adamw-8bit" else None
    groups = sinkgd.param_groups(model, state_bits=8, overrides=everywhere)
    optimizer = sinkgd.SinkGD(groups, rounding="stochastic" if everywhere is None else "nearest")
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    kept = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    assert planned_state(name, precision) == kept


@pytest.mark.parametrize("vocab_size", [600, 32_000])
def test_scratch_of_8_bit_adam_is_what_a_step_takes(vocab_size):
    pytest.importorskip("bitsandbytes", reason="pip install 'sinkgd[8bit]'")
    sizes = {"vocab_size": vocab_size, "num_layers": 2}
    model = Llama(replace(PRESETS["llama-9m"], **sizes)).to(torch.bfloat16)
    groups = sinkgd.param_groups(model, overrides={".": "adamw-8bit"})
    optimizer = sinkgd.SinkGD(groups)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    used = allocations(optimizer.step, torch.device("cpu")).peak
    weights = weights_of(replace(NINE.architecture, **sizes))
    method = find_method("adamw-8bit")
    planned = update_scratch(weights, Grid(), method, device="cpu", per_matrix=False)
    assert planned == pytest.approx(used, rel=0.03)


def test_8_bit_adam_on_the_rest_keeps_nothing_for_matrices():
    weights = weights_of(NINE.architecture)
    table = 32_000 * 128
    vectors = [w.count for w in weights if len(w.shape) == 1]
    blocks = 2 * (2 * table + 8 * table // 256)
    steps = 4 * (2 + len(vectors))
    kept = rank_memory(NINE, Grid(), find_method("sinkgd-8bit")).state
    assert kept == blocks + 8 * sum(vectors) + steps


def test_lora_trains_adapters_alone():
    found = rank_memory(NINE, Grid(), find_method("lora"))
    blocks = NINE.architecture.num_layers
    per_block = 8 * (4 * (128 + 128) + 3 * (128 + 352))
    frozen = rank_memory(NINE, Grid(), find_method("adamw")).weights
    assert found.weights == frozen + 4 * blocks * per_block
    assert found.state == 2 * 4 * blocks * per_block + 4 * blocks * 7 * 2
    assert found.all_gradients == 4 * blocks * per_block


def test_frozen_weights_take_two_thirds_of_the_time_of_trained_ones():
    short = replace(NINE, sequence_length=1)
    assert flops_of(replace(short, adapter_rank=1)) / flops_of(short) == pytest.approx(
        2 / 3, rel=0.03
    )


@pytest.mark.parametrize(
    ("name", "recipe", "options"),
    [
        ("sinkgd-momentum", "sinkgd", {"momentum": 0.9}),
        (
            "sinkgd-momentum-8bit",
            "sinkgd",
            {"momentum": 0.9, "momentum_place": "after", "momentum_bits": 8},
        ),
        ("sinkgd-pinned", "sinkgd", {"operator_norm": "muon"}),
        ("sinkgd-table", "sinkgd", {"tables": "sinkgd-table"}),
        ("sron", "rows-only", {}),
    ],
)
def test_state_of_an_option_is_what_it_keeps_after_a_step(name, recipe, options):
    assert planned_state(name) == kept_after_a_step(OptimizerConfig(recipe=recipe, **options))


@pytest.mark.parametrize(
    ("name", "rank", "options"),
    [
        ("sinkgd-low-rank", 0, {"momentum_rank": 16}),
        ("sinkgd-averaged-scales", 0, {"averaged_scales": 0.9}),
        ("sinkgd-kept", 15, {"deflated_start": "kept"}),
    ],
)
def test_vectors_that_an_option_keeps_are_planned(name, rank, options):
    model = Llama(replace(PRESETS["llama-9m"], vocab_size=600, num_layers=2))
    groups = sinkgd.param_groups(model, deflated_rank=rank)
    optimizer = sinkgd.SinkGDVariant(groups, **options)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert planned_state(name) == sum(tensor.nbytes for tensor in state_tensors(optimizer))


def test_the_scales_that_are_held_out_are_planned():
    model = Llama(replace(PRESETS["llama-9m"], vocab_size=600, num_layers=2))
    optimizer = sinkgd.SinkGDVariant(sinkgd.param_groups(model, deflated_rank=0), cross_fit=True)
    for part in (optimizer.hold_out, optimizer.step):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        part()
        if part == optimizer.hold_out:
            held = [state.copy() for state in optimizer.state.values() if state]
    flags = sum(state.pop("held_is_finite").nbytes for state in held)
    assert flags == len(held)
    vectors = sum(tensor.nbytes for state in held for tensor in state.values())
    kept = sum(tensor.nbytes for tensor in state_tensors(optimizer))
    assert planned_state("sinkgd-cross-fit") == vectors + kept


@pytest.mark.parametrize(
    ("name", "options", "vocab_size"),
    [
        ("sron", {"recipe": "rows-only"}, 600),
        ("sron", {"recipe": "rows-only"}, 100_000),
        ("scale", {"recipe": "scale"}, 600),
        ("scale", {"recipe": "scale"}, 100_000),
        ("sinkgd-table", {"recipe": "sinkgd", "tables": "sinkgd-table"}, 100_000),
    ],
)
def test_scratch_is_what_a_step_takes(name, options, vocab_size):
    sizes = {"vocab_size": vocab_size, "num_layers": 2}
    model = Llama(replace(PRESETS["llama-9m"], **sizes))
    optimizer = build_optimizer(model, resolve_optimizer(OptimizerConfig(**options)))
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    used = allocations(optimizer.step, torch.device("cpu")).peak
    weights = weights_of(replace(NINE.architecture, **sizes))
    planned = update_scratch(weights, Grid(), find_method(name), device="cpu", per_matrix=False)
    assert planned == pytest.approx(used, rel=0.03)


def test_only_the_head_keeps_what_is_the_heads():
    scale = find_method("scale")
    assert scale.embedding_bytes(600, 128, 2, is_head=True) == 4 * 600 * 128
    assert scale.embedding_bytes(600, 128, 2, is_head=False) == 0


def test_soap_has_no_basis_for_a_long_side():
    assert find_method("soap").state_bytes(10_001, 8, 4, 1) == 4 * (2 * 8 * 10_001 + 2 * 8**2)


@pytest.mark.parametrize(
    ("method", "numbers"),
    # r = 2 on a matrix of 4 x 10: GaLore's table 1, APOLLO's table 1
    [("galore", 2 * 4 + 2 * 2 * 10), ("apollo", 2 * 2 * 10 + 2), ("apollo-mini", 2 * 10 + 2)],
)
def test_projected_states_are_the_papers_formulas(method, numbers):
    for shape in ((4, 10), (10, 4)):
        assert find_method(method).state_bytes(*shape, 2, 2) == 2 * numbers


def test_options_of_sinkgd_keep_float32_whatever_the_weights():
    for itemsize in (2, 4):
        assert find_method("sinkgd-momentum").state_bytes(4, 10, itemsize, 1) == 4 * 40
        assert find_method("sinkgd-pinned").state_bytes(4, 10, itemsize, 1) == 4 * 10
        assert find_method("sinkgd-constant-norm").state_bytes(4, 10, itemsize, 1) == 4
        assert find_method("sinkgd-kept").state_bytes(4, 10, itemsize, 1) == 4 * 16 * 10
        assert find_method("sinkgd-low-rank").state_bytes(4, 10, itemsize, 1) == 4 * 16 * 14
        assert find_method("sron").state_bytes(4, 10, itemsize, 1) == 0


def test_eight_bit_adam_keeps_small_tensors_in_float32():
    assert eight_bit_bytes(4095) == 8 * 4095
    assert eight_bit_bytes(4096) == 2 * 4096 + 2 * 4 * 16
    assert eight_bit_bytes(4097) == 2 * 4097 + 2 * 4 * 17  # the last block is short


@pytest.mark.parametrize("name", METHODS)
def test_a_mesh_divides_weights_and_state_evenly_but_for_numbers_of_columns(name):
    method = find_method(name)
    columns = sum(w.shape[1] for w in weights_of(NINE.architecture) if w.is_matrix)
    undivided = 4 * method.column * columns
    whole = rank_memory(NINE, Grid(), method)
    part = rank_memory(NINE, Grid(dp_shard=8), method)
    assert part.weights == pytest.approx(whole.weights / 8, rel=1e-3)
    divided = (whole.state - undivided) / 8
    assert part.state == pytest.approx(divided + undivided, rel=1e-2, abs=64)
    replicas = rank_memory(NINE, Grid(dp_replicate=2, dp_shard=8), method)
    assert replicas == part


def test_in_transit_are_embedding_head_and_two_blocks_with_their_gradients():
    method = find_method("sinkgd")
    found = rank_memory(NINE, Grid(dp_shard=8), method)
    block = 4 * 128 * 128 + 3 * 128 * 352 + 2 * 128
    outside = 2 * 32_000 * 128 + 128
    assert found.moment == "the embedding"
    assert found.transit == 4 * outside + 4 * 32_000 * 128
    without = rank_memory(replace(NINE, architecture=FEW_TOKENS), Grid(dp_shard=8), method)
    assert without.moment.startswith("backward")
    few = 64 * 128
    assert without.transit == 4 * (2 * few + 128 + 2 * block) + 4 * (few + 2 * block)
    assert rank_memory(NINE, Grid(), method).transit == 0


def test_released_gradients_leave_the_largest_one():
    released = replace(NINE, release=True)
    ours, theirs = (rank_memory(released, Grid(), find_method(m)) for m in ("sinkgd", "adamw"))
    assert ours.all_gradients == 4 * 32_000 * 128
    assert theirs.all_gradients == theirs.weights
    accumulated = rank_memory(replace(released, micro_batches=3), Grid(), find_method("sinkgd"))
    assert accumulated.all_gradients == accumulated.weights


def test_the_parts_add_up_to_the_peak():
    found = rank_memory(NINE, Grid(dp_shard=2), find_method("adamw"))
    parts = ("weights", "state", "gradients", "activations", "loss", "transit", "scratch")
    assert found.peak == sum(getattr(found, part) for part in parts)
