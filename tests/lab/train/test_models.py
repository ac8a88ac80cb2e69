"""GPT-2 and Lens train as LLaMA does: they learn, they go on exactly, they lie on ranks."""

import json
import signal
from dataclasses import replace

import pytest

from sinkgd.lab.models import build_model, preset_config
from sinkgd.lab.results import Run
from sinkgd.lab.train import loop
from sinkgd.lab.train.config import ConfigError, MeshConfig, ModelConfig, OptimizerConfig
from sinkgd.lab.train.run import Outcome, train
from spawn import on_ranks
from stopping import stopping_at

PRESETS = ["gpt2-nano", "lens-nano"]
presets = pytest.mark.parametrize("preset", PRESETS)


def of(config, preset, steps=4, **training):
    return replace(
        config,
        model=ModelConfig(preset=preset),
        training=replace(config.training, steps=steps, **training),
        evaluation=replace(config.evaluation, every_steps=2),
    )


def curve(path):
    """All that must repeat bit for bit: everything recorded but times."""
    result = Run.read(path / "run.jsonl")
    steps = [(s.step, s.loss, s.gradient_norm) for s in result.steps]
    return steps, [(e.step, e.val_loss) for e in result.evaluations], result.statistics


@presets
def test_a_run_learns_and_records_its_statistics_after_each_evaluation(config, tmp_path, preset):
    config = of(config, preset, recompute_activations=True, loss_chunk_tokens=16)
    assert train(config, tmp_path) == Outcome(4)
    result = Run.read(tmp_path / "run.jsonl")
    assert result.steps[-1].loss < result.steps[0].loss
    lines = (tmp_path / "run.jsonl").read_text(encoding="utf-8").splitlines()
    both = ["evaluation", "statistics"]
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["start", "step", "step", *both, "step", "step", *both, "end"]
    assert result.start.parameters == sum(
        p.numel() for p in build_model(preset, vocab_size=280, max_sequence_length=16).parameters()
    )
    for statistics in result.statistics:
        # of 16 keys at most
        assert 0 < statistics.values["attention_entropy/mean"] < 2.78


@pytest.mark.parametrize(("preset", "recipe"), [("gpt2-nano", "adamw"), ("lens-nano", "sinkgd")])
def test_a_stopped_run_goes_on_bit_for_bit(config, tmp_path, preset, recipe):
    config = replace(of(config, preset, steps=3), optimizer=OptimizerConfig(recipe=recipe))
    train(config, tmp_path / "whole")
    with stopping_at(2):
        assert train(config, tmp_path / "stopped") == Outcome(2, signal.SIGTERM)
    assert train(config, tmp_path / "stopped") == Outcome(3)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")


@presets
def test_released_gradients_are_the_same_step(config, tmp_path, preset):
    config = of(config, preset, steps=2, micro_batch_size=2)
    train(config, tmp_path / "kept")
    released = replace(config, training=replace(config.training, release_gradients=True))
    train(released, tmp_path / "released")
    kept, freed = (Run.read(tmp_path / name / "run.jsonl") for name in ("kept", "released"))
    for ours, theirs in zip(freed.steps, kept.steps, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)


def test_the_route_follows_the_steps_taken(config, tmp_path, monkeypatch):
    shares = []

    def take_step(model, *arguments, **options):
        shares.append(model.attention_share)
        return original(model, *arguments, **options)

    original = loop.take_step
    monkeypatch.setattr(loop, "take_step", take_step)
    train(of(config, "lens-nano", steps=6), tmp_path)
    lens = preset_config("lens-nano")
    assert shares == [lens.attention_share(taken, 6) for taken in range(6)]
    assert shares[0] > shares[-1]
    found = [
        (s.step, s.values["attention_share"]) for s in Run.read(tmp_path / "run.jsonl").statistics
    ]
    assert found == [(taken, lens.attention_share(taken, 6)) for taken in (2, 4, 6)]


def test_a_llama_has_no_statistics(config, tmp_path):
    train(of(config, "llama-nano", steps=1), tmp_path)
    result = Run.read(tmp_path / "run.jsonl")
    assert (len(result.evaluations), result.statistics) == (1, [])


def train_and_refuse(configs, folder):
    for name, config in configs.items():
        train(config, folder / name, echo=lambda _: None)
    with pytest.raises(ConfigError, match=r"mesh.tp is 2, .* only a LLaMA .* is a GPT2; use mesh"):
        train(
            replace(configs["gpt2-nano"], mesh=MeshConfig(tp=2)), folder / "tp", echo=lambda _: None
        )


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns(config, tmp_path):
    configs = {preset: of(config, preset) for preset in PRESETS}
    on_ranks(2, train_and_refuse, configs, tmp_path)
    for preset in PRESETS:
        train(configs[preset], tmp_path / f"{preset}-alone", echo=lambda _: None)
        ours, alone = (
            Run.read(tmp_path / f"{preset}{end}" / "run.jsonl") for end in ("", "-alone")
        )
        assert ours.start.environment["mesh"]["dp_shard"] == 2
        for own, other in zip(ours.steps, alone.steps, strict=True):
            assert own.loss == pytest.approx(other.loss, abs=5e-5)
        for own, other in zip(ours.statistics, alone.statistics, strict=True):
            assert own.values == pytest.approx(other.values, abs=1e-4)
