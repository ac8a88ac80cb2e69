"""A run that begins with another run's weights: what it takes over, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lab.train.conftest import twelve_steps
from lab.train.test_run import change, curve
from sinkgd.lab.data import load_tokenizer, open_corpus, prepare, train_tokenizer
from sinkgd.lab.models.lora import base_name
from sinkgd.lab.results import Run
from sinkgd.lab.train.config import ConfigError, OptimizerConfig, RunConfig
from sinkgd.lab.train.loop import training_steps
from sinkgd.lab.train.resolve import resolve
from sinkgd.lab.train.run import train
from sinkgd.lab.train.setup import set_up
from sinkgd.lab.train.starting_weights import _tokenizer_of
from stopping import stopping_at


@pytest.fixture(scope="module")
def other_shards(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another text with the tokenizer of ``shards``."""
    text = tmp_path_factory.mktemp("other") / "other.txt"
    text.write_text("a year of war and a year of law " * 200, encoding="utf-8")
    folder = tmp_path_factory.mktemp("other-shards") / "words"
    tokenizer = load_tokenizer(str(shards / "tokenizer.json"))
    prepare(open_corpus([str(text)], validation_fraction=0.3), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that `first` copies."""
    folder = tmp_path_factory.mktemp("finished") / "first"
    train(twelve_steps(shards), folder)
    return folder


@pytest.fixture
def first(finished: Path, tmp_path: Path) -> Path:
    """A finished run."""
    return shutil.copytree(finished, tmp_path / "first")


def tuned(config: RunConfig, first: Path, text: Path, **model: object) -> RunConfig:
    """Return a configuration that fine-tunes ``first`` on another text."""
    old = config.data.corpus
    config = change(config, "model", weights=str(first), **model)
    config = change(config, "evaluation", other_corpus=old)
    config = replace(config, optimizer=OptimizerConfig(recipe="sinkgd-finetune", lr=1e-3))
    return change(config, "data", corpus=str(text))


def quiet(_: str) -> None:
    pass


def test_with_adapters_the_weights_of_the_other_run_stay(config, first, other_shards):
    job = set_up(resolve(tuned(config, first, other_shards, lora_rank=2)), quiet)
    model = job.state.model
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for _ in training_steps(job):
        pass
    changed = {name for name, param in model.named_parameters() if not param.equal(before[name])}
    assert changed == {name for name in before if base_name(name) is None}


@pytest.mark.parametrize("rank", [0, 2])
def test_the_first_loss_is_the_last_one_of_the_other_run(config, first, other_shards, rank):
    before = Run.read(first / "run.jsonl").evaluations[-1].val_loss
    out = first.parent / "second"
    train(tuned(config, first, other_shards, lora_rank=rank), out)
    evaluations = Run.read(out / "run.jsonl").evaluations
    assert [one.step for one in evaluations] == [0, 4, 8, 12]
    assert evaluations[0].other_val_loss == before
    assert evaluations[-1].val_loss < evaluations[0].val_loss
    assert evaluations[-1].other_val_loss != before


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("at", [3, 8])
def test_a_stopped_run_goes_on_to_the_same_bits(config, first, other_shards, rank, at):
    tuning = tuned(config, first, other_shards, lora_rank=rank)
    whole, stopped = first.parent / "whole", first.parent / "stopped"
    train(tuning, whole)
    with stopping_at(at):
        train(tuning, stopped)
    train(tuning, stopped)
    assert curve(stopped) == curve(whole)


@pytest.mark.parametrize("preset", [None, "llama-nano"])
def test_a_run_with_a_checkpoint_goes_on_without_the_folder_of_its_weights(
    config, first, other_shards, preset
):
    tuning = tuned(config, first, other_shards, preset=preset, lora_rank=2)
    whole, stopped = first.parent / "whole", first.parent / "stopped"
    train(tuning, whole)
    with stopping_at(6):
        train(tuning, stopped)
    shutil.rmtree(first)
    train(tuning, stopped)
    assert curve(stopped) == curve(whole)


def test_a_run_without_a_checkpoint_refuses_weights_that_changed_since(config, first, other_shards):
    tuning = tuned(config, first, other_shards)
    out = first.parent / "second"
    with stopping_at(6):
        train(tuning, out)
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(first)
    train(change(config, "training", seed=1), first)
    with pytest.raises(ConfigError, match="was begun from the weights with the hash"):
        train(tuning, out)


def test_what_holds_no_finished_run_is_refused(config, first, other_shards):
    empty = first.parent / "empty"
    with pytest.raises(ConfigError, match=r"model\.weights is .*empty', which holds no run"):
        train(tuned(config, empty, other_shards), first.parent / "second")
    with stopping_at(6):
        train(config, empty)
    with pytest.raises(ConfigError, match=r"has not finished\. Go on with it first: sinkgd train"):
        train(tuned(config, empty, other_shards), first.parent / "second")
    shutil.rmtree(first / "checkpoints")
    with pytest.raises(ConfigError, match="lacks the checkpoint of its last step: there is none"):
        train(tuned(config, first, other_shards), first.parent / "second")


def test_a_run_that_trained_adapters_is_refused_with_the_weights_it_began_with(
    config, first, other_shards
):
    adapted = first.parent / "adapted"
    train(tuned(config, first, other_shards, lora_rank=2), adapted)
    for rank in (0, 2):
        with pytest.raises(
            ConfigError, match=rf"adapted'.*model\.lora_rank 2\).*Give the folder .*'{first}'"
        ):
            train(tuned(config, adapted, other_shards, lora_rank=rank), first.parent / "second")
    assert not (first.parent / "second").exists()


@pytest.mark.parametrize("model", [None, {"kind": "Odd"}, {"kind": "LlamaConfig", "width": 3}])
def test_a_run_with_a_damaged_record_of_its_model_is_refused(config, first, other_shards, model):
    path = first / "run.jsonl"
    begin, *others = path.read_text(encoding="utf-8").splitlines(keepends=True)
    record = json.loads(begin)
    record["inputs"]["model"] = model
    path.write_text(json.dumps(record) + "\n" + "".join(others), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the run 'first' records (None instead of|a model of)"):
        train(tuned(config, first, other_shards), first.parent / "second")


def test_another_model_or_tokenizer_is_refused(config, first, other_shards, tmp_path):
    other = tuned(config, first, other_shards, preset="llama-nano-64")
    with pytest.raises(ConfigError, match="hidden_size was 128 and is now 64"):
        train(other, tmp_path / "second")
    text = tmp_path / "text.txt"
    text.write_text("people and the union " * 300, encoding="utf-8")
    corpus = open_corpus([str(text)], validation_fraction=0.3)
    prepare(corpus, tmp_path / "shards", train_tokenizer(corpus, 280))
    with pytest.raises(ConfigError, match=r"evaluation\.other_corpus is .* tokenizer differs"):
        train(tuned(config, first, tmp_path / "shards"), tmp_path / "second")
    alone = change(tuned(config, first, tmp_path / "shards"), "evaluation", other_corpus=None)
    rows = Run.read(first / "run.jsonl").start.inputs["model"]["vocab_size"]
    alone = change(alone, "model", vocab_size=rows)
    with pytest.raises(ConfigError, match="Prepare the text with that tokenizer: sinkgd prep"):
        train(alone, tmp_path / "second")


@pytest.mark.parametrize(
    ("data", "tokenizer", "commands"),
    [
        (
            {"corpus": "sotu", "vocab_size": None},
            "of sotu",
            "sinkgd prepare sotu --out FIRST, then sinkgd prepare TEXT --tokenizer "
            "FIRST/tokenizer.json --out SHARDS",
        ),
        (
            {"corpus": "books/*.txt", "vocab_size": 2048},
            "of books/*.txt",
            "sinkgd prepare 'books/*.txt' --out FIRST --vocab-size 2048, then sinkgd prepare TEXT "
            "--tokenizer FIRST/tokenizer.json --out SHARDS",
        ),
        (
            {"corpus": "shards/elsewhere"},
            "shards/elsewhere/tokenizer.json",
            "sinkgd prepare TEXT --tokenizer shards/elsewhere/tokenizer.json --out SHARDS",
        ),
    ],
)
def test_the_commands_that_prepare_another_text_exist(data, tokenizer, commands):
    assert _tokenizer_of(data) == (tokenizer, commands)


@pytest.mark.parametrize(
    ("table", "values", "words"),
    [
        ("model", {"lora_rank": -1}, "model.lora_rank is -1; it must be at least 0"),
        ("model", {"lora_rank": 2}, "model.weights is not given"),
        ("mesh", {"tp": 2}, "tp cannot shard adapters"),
    ],
)
def test_adapters_that_cannot_be_are_refused(config, table, values, words):
    asked = change(config, table, **values)
    if table == "mesh":
        asked = change(asked, "model", weights="runs/first", lora_rank=2)
    with pytest.raises(ConfigError, match=words):
        resolve(asked)


def test_an_algorithm_of_adapters_needs_adapters(config):
    asked = replace(config, optimizer=OptimizerConfig(recipe="sinkgd-finetune", adapters="sinkgd"))
    with pytest.raises(ConfigError, match="the model has no adapters"):
        resolve(asked)
