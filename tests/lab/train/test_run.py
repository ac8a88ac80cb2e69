"""A run in its folder: what it writes, that it repeats itself, that it goes on exactly."""

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lab.train.conftest import twelve_steps
from sinkgd.lab.data import Batches, DataError, TokenDataset
from sinkgd.lab.models import ModelError, build_model
from sinkgd.lab.results import Run
from sinkgd.lab.train import checkpoint, loop, run, setup
from sinkgd.lab.train.checkpoint_validation import CheckpointError
from sinkgd.lab.train.config import (
    ConfigError,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    load_config,
)
from sinkgd.lab.train.folder import RunFolderError
from sinkgd.lab.train.recipes import RECIPES
from sinkgd.lab.train.resolve import resolve
from sinkgd.lab.train.run import Outcome, train
from sinkgd.lab.train.training_step import NonFiniteLossError
from stopping import stopping_at


def curve(path: Path) -> list[tuple]:
    """All that must repeat bit for bit: everything recorded but times."""
    result = Run.read(path / "run.jsonl")
    steps = [("step", s.step, s.tokens, s.loss, s.lr, s.gradient_norm) for s in result.steps]
    evaluations = [
        ("evaluation", e.step, e.tokens, e.val_loss, e.bits_per_byte, e.eval_tokens)
        for e in result.evaluations
    ]
    return steps + evaluations


def kinds(path: Path) -> list[str]:
    lines = (path / "run.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["kind"] for line in lines]


def change(config: RunConfig, table: str, **values: object) -> RunConfig:
    return replace(config, **{table: replace(getattr(config, table), **values)})


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed; only to be read."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(twelve_steps(shards), folder) == Outcome(12)
    return folder


def test_the_results_are_written_in_order(whole):
    step, evaluation = ["step"], ["evaluation"]
    expected = ["start", *3 * (4 * step + evaluation), "end"]
    assert kinds(whole) == expected


def test_the_records_agree_with_each_other_and_the_model_learns(whole):
    result = Run.read(whole / "run.jsonl")
    assert result.finished
    assert [s.step for s in result.steps] == list(range(1, 13))
    assert [s.tokens for s in result.steps] == [64 * i for i in range(1, 13)]
    assert result.steps[-1].seconds == pytest.approx(sum(s.step_seconds for s in result.steps))
    assert all(0 < s.optimizer_seconds < s.step_seconds for s in result.steps)
    assert [e.eval_tokens for e in result.evaluations] == [100, 100, 100]
    assert result.evaluations[-1].val_loss < result.evaluations[0].val_loss
    end = result.end
    assert end is not None
    assert (end.step, end.tokens) == (12, 768)
    assert end.wall_seconds > end.seconds > 0
    assert end.memory.weights_bytes == end.memory.gradients_bytes == 4 * result.start.parameters
    assert end.memory.peak_bytes > end.memory.weights_bytes


def test_the_last_step_is_always_followed_by_an_evaluation_and_a_checkpoint(config, tmp_path):
    train(change(config, "evaluation", every_steps=5), tmp_path)
    assert [e.step for e in Run.read(tmp_path / "run.jsonl").evaluations] == [5, 10, 12]
    checkpoints = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert checkpoints == ["step-00000010", "step-00000012"]


def test_the_curve_is_that_of_a_loop_written_by_hand(config, tmp_path):
    config = replace(config, optimizer=OptimizerConfig(recipe="adamw-one-lr", lr=0.01))
    train(config, tmp_path)
    split = TokenDataset.open(Path(config.data.corpus)).split("train")
    batches = Batches(split, sequence_length=16, batch_size=4, seed=0)
    model = build_model("llama-nano", vocab_size=280, max_sequence_length=16, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), weight_decay=0.0)
    losses = []
    for step in range(12):
        # One step of warm-up, then the cosine over eleven.
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / 11)
        optimizer.param_groups[0]["lr"] = 0.01 * cosine
        batch = batches.at(step)
        loss = nn.functional.cross_entropy(
            model(batch.inputs).flatten(0, 1), batch.targets.flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Fused and plain AdamW round differently, and twelve steps make it grow.
    recorded = [step.loss for step in Run.read(tmp_path / "run.jsonl").steps]
    assert recorded == pytest.approx(losses, rel=1e-4)


def test_the_start_says_what_the_run_is(config, tmp_path):
    config = replace(config, optimizer=OptimizerConfig(recipe="sinkgd"))
    train(config, tmp_path / "named")
    start = Run.read(tmp_path / "named" / "run.jsonl").start
    assert (start.name, start.recipe, start.seed) == ("named", "sinkgd", 0)
    assert start.tokens_per_step == 64
    assert start.config["optimizer"]["lr"] == RECIPES["sinkgd"].defaults["lr"]
    assert start.command.startswith(f"sinkgd train --out {tmp_path / 'named'} ")
    assert start.environment["threads"] == 1


def test_the_resolved_configuration_is_saved(config, whole):
    assert load_config(whole / "config.toml", RunConfig) == resolve(config)


def test_the_same_seed_gives_the_same_bits(config, whole, tmp_path):
    train(config, tmp_path)
    assert curve(tmp_path) == curve(whole)


def test_another_seed_gives_another_curve(config, whole, tmp_path):
    train(change(config, "training", seed=1), tmp_path)
    assert curve(tmp_path) != curve(whole)


@pytest.mark.parametrize("step", [1, 4, 5, 7])
def test_a_stopped_run_goes_on_bit_for_bit(config, whole, tmp_path, step):
    said: list[str] = []
    with stopping_at(step):
        outcome = train(config, tmp_path / "stopped", echo=said.append)
    assert outcome == Outcome(step, signal.SIGTERM)
    assert f"stopped by SIGTERM after step {step} of 12" in said[-1]
    assert f"--out {tmp_path / 'stopped'}" in said[-1]
    assert Run.read(tmp_path / "stopped" / "run.jsonl").end.status == "interrupted"
    assert train(config, tmp_path / "stopped") == Outcome(12)
    assert curve(tmp_path / "stopped") == curve(whole)
    assert Run.read(tmp_path / "stopped" / "run.jsonl").finished


def test_a_signal_in_the_last_step_changes_nothing(config, tmp_path):
    with stopping_at(12):
        assert train(config, tmp_path) == Outcome(12)
    assert Run.read(tmp_path / "run.jsonl").finished


# One of each kind; tests of the recipes have all of them.
@pytest.mark.parametrize(
    "recipe",
    [
        *("sinkgd", "muon"),
        *(
            pytest.param(recipe, marks=pytest.mark.slow)
            for recipe in ("sinkgd-stateless", "swan", "adamw", "fira")
        ),
    ],
)
@pytest.mark.parametrize("precision", ["bf16-autocast", "bf16"])
def test_recipes_go_on_bit_for_bit(config, tmp_path, recipe, precision):
    config = replace(config, optimizer=OptimizerConfig(recipe=recipe))
    config = change(config, "training", precision=precision, steps=4, micro_batch_size=2)
    train(config, tmp_path / "whole")
    with stopping_at(2):
        train(config, tmp_path / "stopped")
    train(config, tmp_path / "stopped")
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")


def test_documents_that_are_padded_train_too(config, tmp_path):
    train(change(config, "data", packing="none"), tmp_path)
    assert Run.read(tmp_path / "run.jsonl").finished


def test_a_finished_run_is_not_run_again(config, tmp_path):
    train(config, tmp_path)
    before = (tmp_path / "run.jsonl").read_bytes()
    said: list[str] = []
    assert train(config, tmp_path, echo=said.append) == Outcome(12)
    assert (tmp_path / "run.jsonl").read_bytes() == before
    done, where = said
    assert done == f"{tmp_path} is finished already; nothing to do"
    assert where.endswith(f"sinkgd report {tmp_path}")


def test_never_refuses_a_finished_run(config, tmp_path):
    train(config, tmp_path)
    with pytest.raises(RunFolderError, match="already holds a run"):
        train(config, tmp_path, resume="never")


def test_a_run_without_a_checkpoint_begins_again(config, whole, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", fail)
        with pytest.raises(CheckpointError):
            train(config, tmp_path / "failed")
    assert Run.read(tmp_path / "failed" / "run.jsonl").end.status == "failed"
    said: list[str] = []
    train(config, tmp_path / "failed", echo=said.append)
    assert "holds no checkpoint yet; beginning again from the first step" in said[0]
    assert curve(tmp_path / "failed") == curve(whole)


def fail(*_: object, **__: object) -> None:
    raise CheckpointError("no room")


def test_a_damaged_last_checkpoint_falls_back_and_says_so(config, whole, tmp_path):
    with stopping_at(7):
        train(config, tmp_path / "stopped")
    damaged = tmp_path / "stopped" / "checkpoints" / "step-00000007" / "__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    said: list[str] = []
    train(config, tmp_path / "stopped", echo=said.append)
    assert f"warning: {damaged} is damaged" in said[0]
    assert "step-00000005, step 5 of 12" in said[1]
    assert curve(tmp_path / "stopped") == curve(whole)


def test_a_kill_between_the_last_checkpoint_and_the_end_loses_nothing(config, tmp_path):
    train(config, tmp_path)
    whole = curve(tmp_path)
    memory = Run.read(tmp_path / "run.jsonl").end.memory
    lines = (tmp_path / "run.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "run.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    train(config, tmp_path)
    result = Run.read(tmp_path / "run.jsonl")
    assert result.finished
    assert curve(tmp_path) == whole
    assert result.end.memory.gradients_bytes == memory.gradients_bytes


def test_a_nan_fails_the_run_and_names_the_step(config, tmp_path, monkeypatch):
    def poison(job):
        for parameter in job.state.model.parameters():
            parameter.data.fill_(float("nan"))
        return original(job)

    original = loop.training_steps
    monkeypatch.setattr(loop, "training_steps", poison)
    with pytest.raises(NonFiniteLossError, match="step 1 has loss nan"):
        train(config, tmp_path)
    end = Run.read(tmp_path / "run.jsonl").end
    assert end.status == "failed"
    assert "step 1 has loss nan" in end.message
    assert not (tmp_path / "checkpoints").exists()


def test_a_full_disk_does_not_hide_the_first_error(config, tmp_path, monkeypatch):
    def raise_os_error(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_checkpoint", fail)
    monkeypatch.setattr(run, "_end", raise_os_error)
    with pytest.raises(CheckpointError, match="no room"):
        train(config, tmp_path)


def test_logging_may_change_when_a_run_goes_on(config, tmp_path):
    with stopping_at(3):
        train(config, tmp_path)
    train(replace(config, logging=LoggingConfig(print_every_steps=1)), tmp_path)
    assert load_config(tmp_path / "config.toml", RunConfig).logging.print_every_steps == 1


@pytest.mark.parametrize(
    ("table", "values", "error", "message"),
    [
        ("model", {"preset": "llama-nan"}, ModelError, "did you mean 'llama-nano'"),
        ("model", {"vocab_size": 99}, ConfigError, "vocab_size is 99, .* up to 279.* at least 280"),
        ("data", {"vocab_size": 512}, ConfigError, "data.vocab_size is 512, but .* has 280"),
        ("data", {"corpus": "/nowhere/text"}, DataError, "/nowhere/text"),
        ("training", {"batch_size": 4096}, DataError, "too little text for one batch"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    config, tmp_path, table, values, error, message
):
    with pytest.raises(error, match=message):
        train(change(config, table, **values), tmp_path)
    assert not (tmp_path / "run.jsonl").exists()


def test_a_larger_vocabulary_than_the_tokenizers_fits(config, tmp_path):
    train(replace(config, model=ModelConfig(vocab_size=320)), tmp_path)
    assert Run.read(tmp_path / "run.jsonl").finished


def test_text_files_are_prepared_and_said_so(config, tmp_path, monkeypatch):
    monkeypatch.setenv("SINKGD_CACHE", str(tmp_path / "cache"))
    for i in range(40):
        path = tmp_path / "texts" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"the state of the union, year {i}. " * 30, encoding="utf-8")
    text = DataConfig(corpus=str(tmp_path / "texts"), vocab_size=300)
    said: list[str] = []
    train(replace(config, data=text), tmp_path / "run", echo=said.append)
    assert [line.split()[0] for line in said if not line.startswith("note:")] == [
        "training",
        "tokenizing",
        "The",  # results are in …
    ]


@pytest.mark.parametrize(("steps", "tokens"), [(400, 32), (1, 10**6), (400, 10**6), (1, 32)])
def test_a_text_that_is_shorter_than_asked_is_said(config, steps, tokens):
    config = change(change(config, "training", steps=steps), "evaluation", tokens=tokens)
    job = setup.set_up(resolve(config), pytest.fail)
    notes = list(run._text_notes(job))
    passes = [note for note in notes if "reads its text" in note]
    scored = [note for note in notes if f"text has {job.validation.tokens:,} tokens" in note]
    assert (len(passes), len(scored)) == (steps == 400, tokens == 10**6)
    assert len(passes) + len(scored) == len(notes)


def test_after_a_change_of_vocabulary_the_loss_jumps_and_until_then_nothing_differs(
    config, whole, tmp_path
):
    train(change(config, "data", shift_at_step=8), tmp_path)
    plain, shifted = (Run.read(path / "run.jsonl") for path in (whole, tmp_path))
    losses = [[step.loss for step in result.steps] for result in (plain, shifted)]
    assert losses[0][:8] == losses[1][:8]
    assert losses[1][8] > losses[0][8] + 0.05
    scores = [[e.val_loss for e in result.evaluations] for result in (plain, shifted)]
    assert scores[0][:2] == scores[1][:2]  # after steps 4 and 8
    assert scores[1][2] > scores[0][2] + 0.05


@pytest.mark.parametrize("kept", [1, 3])
def test_results_that_lack_steps_of_the_checkpoint_are_refused(config, tmp_path, kept):
    with stopping_at(6):
        train(config, tmp_path)
    results = tmp_path / "run.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)[:kept]
    results.write_bytes(b"".join(lines))
    with pytest.raises(RunFolderError, match=rf"ends at step {kept - 1}, but .*results are lost"):
        train(config, tmp_path)
    assert results.read_bytes() == b"".join(lines)
