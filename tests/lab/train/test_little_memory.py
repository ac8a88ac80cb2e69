"""What saves memory changes no number: released gradients, recomputed blocks, loss in chunks."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from sinkgd.lab.data import IGNORE_INDEX
from sinkgd.lab.models import build_model
from sinkgd.lab.results import Run
from sinkgd.lab.train import setup
from sinkgd.lab.train.checkpoint import load_checkpoint, save_checkpoint
from sinkgd.lab.train.config import ConfigError, OptimizerConfig, RunConfig, TrainingConfig
from sinkgd.lab.train.recipes import build_optimizer, resolve_optimizer
from sinkgd.lab.train.resolve import resolve
from sinkgd.lab.train.run import train
from sinkgd.lab.train.state import TrainingState
from sinkgd.lab.train.training_step import loss_of


def losses(config: RunConfig, path: Path, recipe: str = "sinkgd", **training) -> list[float]:
    config = replace(
        config,
        optimizer=OptimizerConfig(recipe=recipe),
        training=replace(config.training, **training),
    )
    train(config, path, echo=lambda _: None)
    return [step.loss for step in Run.read(path / "run.jsonl").steps]


@pytest.mark.parametrize("recipe", ["sinkgd", "sinkgd-stateless", "swan"])
@pytest.mark.parametrize("micro_batch_size", [4, 1])
def test_released_training_is_the_ordinary_one_bit_for_bit(
    config, tmp_path, recipe, micro_batch_size
):
    options = {"micro_batch_size": micro_batch_size}
    ordinary = losses(config, tmp_path / "ordinary", recipe, **options)
    released = losses(config, tmp_path / "released", recipe, **options, release_gradients=True)
    assert released == ordinary


def test_a_released_step_has_the_norm_and_the_seconds_of_an_ordinary_one(config, tmp_path):
    for name, release in (("ordinary", False), ("released", True)):
        losses(config, tmp_path / name, release_gradients=release)
    ordinary = Run.read(tmp_path / "ordinary" / "run.jsonl")
    released = Run.read(tmp_path / "released" / "run.jsonl")
    for one, other in zip(ordinary.steps, released.steps, strict=True):
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-6)
        assert 0 < other.optimizer_seconds < other.step_seconds
    assert ordinary.end.memory.gradients_bytes > 0
    assert released.end.memory.gradients_bytes == 0


def test_recomputed_activations_change_no_bit(config, tmp_path):
    plain = losses(config, tmp_path / "plain")
    assert losses(config, tmp_path / "recomputed", recompute_activations=True) == plain


def test_recomputed_blocks_keep_their_inputs_alone():
    def saved(recompute):
        model = build_model("llama-nano", vocab_size=64, max_sequence_length=32)
        model.model.recompute = recompute
        entries = 0

        def count(x):
            nonlocal entries
            entries += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            model(torch.zeros(4, 32, dtype=torch.int64))
        return entries

    assert saved(True) < saved(False) / 4


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 1000])
def test_the_loss_in_chunks_is_the_whole_loss(chunk_tokens):
    model = build_model("llama-nano", vocab_size=64, max_sequence_length=16)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (4, 17), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[2, 5:] = IGNORE_INDEX
    found = []
    for chunk in (None, chunk_tokens):
        own = copy.deepcopy(model)
        loss = loss_of(own, inputs, targets, chunk)
        loss.backward()
        found.append((loss.detach(), [param.grad for param in own.parameters()]))
    assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_logits_are_never_whole():
    model = build_model("llama-nano", vocab_size=4096, max_sequence_length=64)
    shapes = []
    model.lm_head.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape)))
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    loss_of(model, tokens, tokens, 16).backward()
    assert set(shapes) == {(1, 16, 4096)}
    assert len(shapes) == 2 * 8  # forward, and again in backward


def test_one_batch_is_the_same_in_every_step(config, tmp_path):
    found = losses(config, tmp_path / "one", one_batch=True)
    assert found[-1] < found[0] - 0.5


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_weights_are_drawn_as_build_model_draws_them(config, precision):
    config = replace(config, training=replace(config.training, precision=precision, seed=3))
    model = setup.set_up(resolve(config), print).state.model
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    expected = build_model("llama-nano", vocab_size=280, max_sequence_length=16, seed=3).to(dtype)
    assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("training", "optimizer", "message"),
    [
        ({}, {"recipe": "adamw"}, "recipe 'adamw' cannot. Those that can: sinkgd, "),
        ({}, {"clip_norm": 1.0}, "optimizer.clip_norm is 1.0, but training.release_gradients"),
    ],
)
def test_what_cannot_be_released_is_refused(training, optimizer, message):
    training = TrainingConfig(release_gradients=True, **training)
    with pytest.raises(ConfigError, match=message):
        resolve(RunConfig(training=training, optimizer=OptimizerConfig(**optimizer)))


def test_a_chunk_has_at_least_one_target():
    with pytest.raises(ConfigError, match=r"training\.loss_chunk_tokens is 0"):
        resolve(RunConfig(training=TrainingConfig(loss_chunk_tokens=0)))


@pytest.mark.parametrize("recipe", ["sinkgd", "sinkgd-stateless"])
def test_a_checkpoint_needs_no_gradients(tmp_path, recipe):
    """Saving and loading must not step along zero gradients, which are as large as the weights."""

    def new_state():
        model = build_model("llama-nano", vocab_size=64, max_sequence_length=16)
        options = resolve_optimizer(OptimizerConfig(recipe=recipe))
        state = TrainingState(model, build_optimizer(model, options))
        state.optimizer.register_step_pre_hook(refuse)
        return state

    def refuse(*_):
        raise AssertionError("a checkpoint took a step")

    path = save_checkpoint(tmp_path, new_state().as_dict(), keep=1)
    load_checkpoint(path, new_state())


def test_tied_weights_are_released_once():
    """A model whose head is its embedding: both gradients are one."""
    model = build_model("llama-nano", vocab_size=10)
    model.lm_head.weight = model.model.embed_tokens.weight
    twin = copy.deepcopy(model)
    tokens = torch.arange(10)[None]
    for own, release in ((model, False), (twin, True)):
        options = resolve_optimizer(OptimizerConfig(recipe="sinkgd"))
        optimizer = build_optimizer(own, options)
        if release:
            setup.ReleasedSteps(optimizer)
        loss_of(own, tokens, tokens).backward()
        optimizer.step()
    assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
