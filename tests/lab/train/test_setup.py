"""The seed decides the weights, the order and every random number; the device is checked."""

from dataclasses import replace

import pytest
import torch

from sinkgd.lab.train import setup
from sinkgd.lab.train.config import ConfigError, OptimizerConfig, RunConfig
from sinkgd.lab.train.machine import select_device
from sinkgd.lab.train.resolve import resolve
from sinkgd.lab.train.setup import Job, set_up
from sinkgd.lab.train.world import World


def job(config: RunConfig, **training: object) -> Job:
    changed = replace(config, training=replace(config.training, **training))
    return set_up(resolve(changed), pytest.fail)


def test_the_same_seed_gives_the_same_weights_and_order(config):
    first, second = job(config, seed=3), job(config, seed=3)
    assert torch.equal(first.batches.at(7).inputs, second.batches.at(7).inputs)
    assert torch.equal(first.state.model.lm_head.weight, second.state.model.lm_head.weight)


def test_another_seed_gives_other_weights_another_order_and_other_random_numbers(config):
    first, second = job(config, seed=3), job(config, seed=4)
    assert torch.initial_seed() == 4
    assert not torch.equal(first.batches.at(7).inputs, second.batches.at(7).inputs)
    assert not torch.equal(first.state.model.lm_head.weight, second.state.model.lm_head.weight)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("float32", torch.float32),
        ("bf16-autocast", torch.float32),
        ("bf16", torch.bfloat16),
    ],
)
def test_only_pure_bf16_casts_the_weights(config, precision, dtype):
    model = job(config, precision=precision).state.model
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("recipe", "held", "compiled", "said"),
    [
        ("sinkgd", False, True, ["compiling the loops of the optimizer for this processor"]),
        ("sinkgd", True, True, []),
        ("swan", False, True, ["compiling the loops of the optimizer for this processor"]),
        ("adamw", False, False, []),
    ],
)
def test_the_loops_are_compiled_before_the_first_step(
    config, monkeypatch, recipe, held, compiled, said
):
    pytest.importorskip("numba")
    compilations, told = [], []
    monkeypatch.setattr(setup, "compile_loops", lambda: compilations.append(recipe))
    monkeypatch.setattr(setup, "loops_are_compiled", lambda: held)
    set_up(resolve(replace(config, optimizer=OptimizerConfig(recipe=recipe))), told.append)
    assert bool(compilations) == compiled
    assert [line.partition(" (")[0] for line in told] == said


def test_threads_are_set(config):
    job(config, threads=1)
    assert torch.get_num_threads() == 1


def test_an_absent_cuda_is_an_error_and_auto_does_without(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device is 'cuda', but torch finds no CUDA device"):
        select_device("cuda")


def test_ranks_are_refused_before_anything_is_done_where_the_recipe_needs_whole_weights(config):
    resolved = resolve(replace(config, optimizer=OptimizerConfig(recipe="galore")))
    with pytest.raises(ConfigError, match="'galore', which needs every weight in one piece, but 2"):
        set_up(resolved, pytest.fail, World(size=2))
