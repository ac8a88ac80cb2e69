"""Memory by part: what sharding divides, what release frees, and what a method's formula gives."""

from dataclasses import replace

import pytest
import torch

from sinkgd.lab.models import build_model
from sinkgd.lab.plan import METHODS, Grid, Work, find_architecture, find_method, rank_memory
from sinkgd.lab.plan.methods import eight_bit_bytes
from sinkgd.lab.train.config import OptimizerConfig
from sinkgd.lab.train.recipes import build_optimizer, resolve_optimizer

NINE = Work(find_architecture("llama-9m"), sequence_length=64, precision="float32")
FEW_TOKENS = replace(NINE.architecture, vocab_size=64)


@pytest.mark.parametrize("recipe", ["sinkgd", "sinkgd-stateless", "swan", "adamw", "sgd"])
def test_state_is_what_the_recipe_keeps(recipe):
    model = build_model("llama-9m")
    optimizer = build_optimizer(model, resolve_optimizer(OptimizerConfig(recipe=recipe)))
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    kept = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    assert rank_memory(NINE, Grid(), find_method(recipe)).state == kept


def test_muon_keeps_what_torchs_does():
    matrix = torch.nn.Parameter(torch.zeros(8, 24))
    matrix.grad = torch.ones_like(matrix)
    optimizer = torch.optim.Muon([matrix])
    optimizer.step()
    kept = sum(x.nbytes for x in optimizer.state[matrix].values() if isinstance(x, torch.Tensor))
    assert kept == find_method("muon").state_bytes(8, 24, 4, 1)


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
        assert find_method("sron").state_bytes(4, 10, itemsize, 1) == 0


def test_eight_bit_adam_keeps_small_tensors_in_float32():
    assert eight_bit_bytes(4095) == 8 * 4095
    assert eight_bit_bytes(4096) == 2 * 4096 + 2 * 4 * 16


@pytest.mark.parametrize("name", METHODS)
def test_a_mesh_divides_weights_and_state_evenly(name):
    method = find_method(name)
    whole = rank_memory(NINE, Grid(), method)
    part = rank_memory(NINE, Grid(dp_shard=8), method)
    assert part.weights == pytest.approx(whole.weights / 8, rel=1e-3)
    assert part.state == pytest.approx(whole.state / 8, rel=1e-2, abs=64)
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
