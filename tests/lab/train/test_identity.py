"""A run goes on only with what it began with, compared by content and not by name."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sinkgd.lab.cli import main
from sinkgd.lab.data import DataError, Manifest, Tokenizer, open_corpus, prepare, train_tokenizer
from sinkgd.lab.experiments.studies import find_study
from sinkgd.lab.experiments.study_record import StudyRecord
from sinkgd.lab.models import PRESETS, RotaryScaling, build_model
from sinkgd.lab.results import Run, RunStart
from sinkgd.lab.train import identity
from sinkgd.lab.train.config import ConfigError, DataConfig, OptimizerConfig, RunConfig, load_config
from sinkgd.lab.train.machine import describe_environment
from sinkgd.lab.train.recipes import RECIPES, build_optimizer, resolve_optimizer
from sinkgd.lab.train.run import train
from stopping import stopping_at

ROOT = Path(__file__).parents[3]

VOCAB_SIZE = 280


def write_texts(folder: Path, seed: int = 0) -> Path:
    draw = random.Random(seed)
    folder.mkdir()
    for i in range(12):
        words = (draw.choice(("law", "of", "the", "people", "in", "war")) for _ in range(300))
        (folder / f"{i:02d}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


def make_shards(texts: Path, out: Path, *, vocab_size: int = VOCAB_SIZE, fraction=0.3) -> None:
    corpus = open_corpus([str(texts)], validation_fraction=fraction)
    prepare(corpus, out, train_tokenizer(corpus, vocab_size))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `here` copies."""
    folder = tmp_path_factory.mktemp("prepared")
    make_shards(write_texts(folder / "texts"), folder / "shards")
    return folder


@pytest.fixture
def here(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the texts ``texts`` and the shards ``shards``."""
    monkeypatch.setenv("SINKGD_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(prepared, tmp_path / "here")
    monkeypatch.chdir(folder)
    return folder


def stopped(config: RunConfig, path: Path) -> RunConfig:
    """Begin a run and stop it after step 6."""
    with stopping_at(6):
        assert train(config, path).step == 6
    return config


def with_corpus(config: RunConfig, corpus: str, vocab_size: int | None = None) -> RunConfig:
    return replace(config, data=DataConfig(corpus=corpus, vocab_size=vocab_size))


def other_text(folder: Path) -> None:
    shutil.rmtree(folder / "shards")
    make_shards(write_texts(folder / "others", seed=1), folder / "shards")


def other_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "shards")
    make_shards(folder / "texts", folder / "shards", vocab_size=270)


def other_split(folder: Path) -> None:
    shutil.rmtree(folder / "shards")
    make_shards(folder / "texts", folder / "shards", fraction=0.2)


def renamed_token(folder: Path) -> None:
    """The same ids under a tokenizer that spells one of them otherwise."""
    content = json.loads((folder / "shards" / "tokenizer.json").read_text("utf-8"))
    vocab = content["model"]["vocab"]
    vocab["~swapped~"] = vocab.pop("~")
    (folder / "other.json").write_text(json.dumps(content), encoding="utf-8")
    shutil.rmtree(folder / "shards")
    corpus = open_corpus([str(folder / "texts")], validation_fraction=0.3)
    prepare(corpus, folder / "shards", Tokenizer.from_file(folder / "other.json"))


CHANGES = [other_text, other_tokenizer, other_split, renamed_token]


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_data_under_the_same_name_is_refused_with_both_hashes(
    config: RunConfig, here: Path, change: Callable[[Path], None], finished: bool
):
    config = with_corpus(config, "shards")
    if finished:
        train(config, here / "run")
    else:
        stopped(config, here / "run")
    before = Manifest.read(here / "shards").content_sha256
    lines = (here / "run" / "run.jsonl").read_bytes()
    change(here)
    now = Manifest.read(here / "shards").content_sha256
    with pytest.raises(ConfigError, match=f"{before}.*{now}.*give another --out"):
        train(config, here / "run")
    assert (here / "run" / "run.jsonl").read_bytes() == lines


def test_texts_that_are_no_shards_are_compared_too(config, here):
    config = stopped(with_corpus(config, "texts", VOCAB_SIZE), here / "run")
    (here / "texts" / "03.txt").write_text("another text " * 200, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"trained on data with the hash .* now has the hash"):
        train(config, here / "run")


def test_the_same_data_may_lie_elsewhere(config, here):
    stopped(with_corpus(config, "shards"), here / "run")
    (here / "shards").rename(here / "moved")
    assert train(with_corpus(config, "moved"), here / "run").step == 12


def test_the_same_data_may_be_made_again(config, here):
    config = stopped(with_corpus(config, "shards"), here / "run")
    shutil.rmtree(here / "shards")
    shutil.copytree(here / "texts", here / "copy")
    make_shards(here / "copy", here / "shards")
    assert train(config, here / "run").step == 12


@pytest.mark.parametrize("corpus", ["shards", "texts", "texts/*.txt"])
def test_a_run_goes_on_from_another_folder_by_its_config_file(config, here, tmp_path, corpus):
    vocab_size = None if corpus == "shards" else VOCAB_SIZE
    stopped(with_corpus(config, corpus, vocab_size), here / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.chdir(elsewhere)
    saved = load_config(here / "run" / "config.toml", RunConfig)
    assert train(saved, here / "run").step == 12


def test_a_relative_corpus_elsewhere_is_an_error_that_says_where_it_looked(
    config, here, tmp_path, capsys
):
    stopped(with_corpus(config, "shards"), here / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.chdir(elsewhere)
    capsys.readouterr()
    options = ["--config", str(here / "run" / "config.toml"), "--out", str(here / "run")]
    assert main(["train", *options, "--data.corpus", "shards"]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"error: nothing found at 'shards' in {elsewhere}; give a file, a folder, a glob in "
        "quotes, or 'sotu' for the embedded corpus\n"
    )


def test_another_text_of_the_same_relative_name_elsewhere_is_refused(config, here, tmp_path):
    config = stopped(with_corpus(config, "shards"), here / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    make_shards(write_texts(elsewhere / "texts", seed=1), elsewhere / "shards")
    os.chdir(elsewhere)
    with pytest.raises(ConfigError, match="now has the hash"):
        train(config, here / "run")


def test_a_finished_run_does_not_miss_its_text(config, here):
    config = with_corpus(config, "shards")
    train(config, here / "run")
    shutil.rmtree(here / "shards")
    assert train(config, here / "run").step == 12


@pytest.mark.parametrize("given", ["config file", "another relative path"])
def test_a_finished_run_does_not_miss_its_text_in_another_folder(config, here, tmp_path, given):
    train(with_corpus(config, "shards"), here / "run")
    saved = load_config(here / "run" / "config.toml", RunConfig)
    shutil.rmtree(here / "shards")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.chdir(elsewhere)
    if given == "config file":
        assert train(saved, here / "run").step == 12
    else:
        with pytest.raises(DataError, match="nothing found at 'shards'"):
            train(with_corpus(config, "shards"), here / "run")


@pytest.mark.parametrize("size", ["norm_eps", "rope_theta", "initializer_std"])
def test_another_model_under_the_name_of_the_preset_is_refused(config, here, monkeypatch, size):
    config = stopped(with_corpus(config, "shards"), here / "run")
    preset = PRESETS["llama-nano"]
    changed = replace(preset, **{size: 2 * getattr(preset, size)})
    presets = "sinkgd.lab.models.presets.PRESETS"
    monkeypatch.setattr(presets, {**PRESETS, "llama-nano": changed})
    with pytest.raises(ConfigError, match=f"another model under the same name: {size} was"):
        train(config, here / "run")


def test_another_recipe_under_the_same_name_is_refused(config, here, monkeypatch):
    config = stopped(with_corpus(config, "shards"), here / "run")
    original = identity.content_of

    def changed(manifest, model, optimizer, **more):
        optimizer.param_groups[0]["eps"] = 0.5
        return original(manifest, model, optimizer, **more)

    monkeypatch.setattr("sinkgd.lab.train.setup.content_of", changed)
    with pytest.raises(ConfigError, match=r"had other parameter groups or options \(hash"):
        train(config, here / "run")


@pytest.mark.parametrize(
    "name", ["torch", "sinkgd", "commit", "source", "threads", "cpu", "device"]
)
def test_what_changes_the_last_bits_is_said(config, here, monkeypatch, name):
    config = stopped(with_corpus(config, "shards"), here / "run")
    before = Run.read(here / "run" / "run.jsonl").start.environment[name]
    described = "sinkgd.lab.train.run.describe_environment"
    monkeypatch.setattr(described, lambda device: describe_environment(device) | {name: "another"})
    said: list[str] = []
    assert train(config, here / "run", echo=said.append).step == 12
    assert any(f"{name} was {before} and is now another" in line for line in said)
    [resume] = Run.read(here / "run" / "run.jsonl").resumes
    assert resume.changed == {name: [before, "another"]}


def test_a_run_goes_on_with_other_threads_and_says_so(config, here):
    config = stopped(with_corpus(config, "shards"), here / "run")
    training = replace(config.training, threads=2, device="cpu")
    said: list[str] = []
    assert train(replace(config, training=training), here / "run", echo=said.append).step == 12
    assert any("threads was 1 and is now 2. The losses from here on may differ" in s for s in said)
    [resume] = Run.read(here / "run" / "run.jsonl").resumes
    assert resume.changed == {"threads": [1, 2]}


@pytest.mark.parametrize("then", ["0.1", None])
@pytest.mark.parametrize("now", ["0.2", None])
def test_a_package_that_was_added_or_removed_is_said(then, now):
    def environment(version):
        return {"sinkgd": "1"} | ({"numba": version} if version else {})

    start = replace(recorded(RECORDED), environment=environment(then))
    notes = identity.environment_warnings(start, environment(now))
    words = [version or "not installed" for version in (then, now)]
    said = f"numba was {words[0]} and is now {words[1]}. The losses from here on"
    assert any(said in note for note in notes) == (then != now)
    changes = identity.environment_changes(start, environment(now))
    assert changes == ({} if then == now else {"numba": [then, now]})


def test_nothing_is_said_where_nothing_changed(config, here):
    config = stopped(with_corpus(config, "shards"), here / "run")
    said: list[str] = []
    train(config, here / "run", echo=said.append)
    assert not [line for line in said if "warning" in line]


def rewrite_start(path: Path, change: Callable[[dict], object]) -> None:
    first, *rest = path.read_text("utf-8").splitlines(keepends=True)
    start = json.loads(first)
    change(start)
    path.write_text(json.dumps(start) + "\n" + "".join(rest), encoding="utf-8")


@pytest.fixture
def with_other(config, here) -> RunConfig:
    """Settings that also score ``other``, a text with the tokenizer of ``shards``."""
    shutil.copytree(here / "shards", here / "other")
    evaluation = replace(config.evaluation, other_corpus="other")
    return replace(with_corpus(config, "shards"), evaluation=evaluation)


def prepare_other_anew(here: Path) -> None:
    """Put another text, with the same tokenizer, into the folder ``other``."""
    shutil.rmtree(here / "other")
    corpus = open_corpus([str(write_texts(here / "others", seed=1))], validation_fraction=0.3)
    prepare(corpus, here / "other", Tokenizer.from_file(here / "shards" / "tokenizer.json"))


def test_another_second_text_under_the_same_name_is_refused_with_both_hashes(with_other, here):
    stopped(with_other, here / "run")
    before = Manifest.read(here / "other").content_sha256
    prepare_other_anew(here)
    now = Manifest.read(here / "other").content_sha256
    with pytest.raises(ConfigError, match=rf"{before}.*evaluation\.other_corpus .*{now}.*--out"):
        train(with_other, here / "run")


def test_a_run_that_recorded_no_hash_of_its_second_text_goes_on(with_other, here):
    stopped(with_other, here / "run")
    rewrite_start(here / "run" / "run.jsonl", lambda start: start["inputs"].pop("other_data"))
    prepare_other_anew(here)
    assert train(with_other, here / "run").step == 12


def test_a_run_of_an_older_version_goes_on_with_a_warning(config, here):
    config = stopped(with_corpus(config, "shards"), here / "run")
    rewrite_start(here / "run" / "run.jsonl", lambda start: start.pop("inputs"))
    with pytest.raises(ConfigError, match=r"data\.corpus was '.*shards' and is now '.*others'"):
        train(with_corpus(config, "others"), here / "run")
    said: list[str] = []
    assert train(config, here / "run", echo=said.append).step == 12
    assert any("did not record its text" in line for line in said)


@pytest.mark.parametrize("content", ["", " \n", "[data]\ncorpus = 'sotu'\n"])
def test_a_configuration_that_was_cut_short_is_no_other_configuration(config, here, content):
    config = stopped(with_corpus(config, "shards"), here / "run")
    whole = (here / "run" / "config.toml").read_text("utf-8")
    (here / "run" / "config.toml").write_text(content, encoding="utf-8")
    assert train(config, here / "run").step == 12
    assert (here / "run" / "config.toml").read_text("utf-8") == whole


SMALL = [
    *("--data.corpus", "shards", "--training.steps", "2", "--training.batch-size", "4"),
    *("--training.sequence-length", "16", "--evaluation.tokens", "100"),
]


def test_a_finished_comparison_does_not_miss_its_text_in_another_folder(here, tmp_path):
    assert main(["train", "--out", "c/sgd-seed0", "--optimizer.recipe", "sgd", *SMALL]) == 0
    shutil.rmtree(here / "shards")
    os.chdir(tmp_path)
    compare = ["compare", "--out", str(here / "c"), "--optimizers", "sgd", *SMALL]
    assert main([*compare, "--data.corpus", str(here / "shards")]) == 0
    assert main(compare) == 2


def test_comparisons_refuse_runs_of_another_text(here, capsys):
    assert main(["train", "--out", "c/sgd-seed0", "--optimizer.recipe", "sgd", *SMALL]) == 0
    before = Manifest.read(here / "shards").content_sha256
    other_text(here)
    now = Manifest.read(here / "shards").content_sha256
    capsys.readouterr()
    for optimizers in ("sgd", "sgd,adamw"):
        assert main(["compare", "--out", "c", "--optimizers", optimizers, *SMALL]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: the run 'sgd-seed0' was trained on data with the hash")
        assert before in said
        assert now in said


def test_the_hash_of_the_data_is_of_its_content(here):
    first = Manifest.read(here / "shards")
    assert replace(first, sources=("elsewhere",)).content_sha256 == first.content_sha256
    for field, value in {"eos_id": 5, "pad_id": 5, "vocab_size": 999, "shard_tokens": 7}.items():
        assert replace(first, **{field: value}).content_sha256 != first.content_sha256


def content(shards: Path, recipe: str, **options: float) -> dict[str, object]:
    model = build_model("llama-nano", vocab_size=64, max_sequence_length=16)
    taken = resolve_optimizer(OptimizerConfig(recipe=recipe, **options))
    return identity.content_of(Manifest.read(shards), model, build_optimizer(model, taken))


@pytest.fixture(scope="module")
def contents(shards):
    return {recipe: content(shards, recipe) for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_equal_to_itself_and_to_no_other(shards, contents, recipe):
    first = content(shards, recipe)
    assert contents[recipe] == first
    assert json.loads(json.dumps(first)) == first
    assert content(shards, recipe, lr=0.123)["optimizer"] != first["optimizer"]
    alike = {name for name in RECIPES if contents[name] == first}
    # Fira's and GaLore's groups are alike; the names of the recipes tell them apart.
    assert alike <= ({"galore", "fira"} if recipe in ("galore", "fira") else {recipe})


@pytest.fixture(scope="module")
def recorded_runs():
    """One run of each arm of the study `table1`, as recorded on 30 November 2026."""
    record = StudyRecord.read(ROOT / "benchmarks/studies/table1/study.jsonl")
    return {result.arm: result.run.start for result in record.runs.values()}


@pytest.mark.parametrize("arm", [arm.name for arm in find_study("table1").settings["machine"].arms])
def test_model_and_parameter_groups_are_those_of_recorded_runs(shards, recorded_runs, arm):
    """Otherwise a run that an older version began could not be resumed.

    If this fails because a method has a new option, add the option to `ADDED_LATER`.
    """
    start = recorded_runs[arm]
    model = build_model("llama-nano", vocab_size=2048, max_sequence_length=128)
    taken = resolve_optimizer(OptimizerConfig(**start.config["optimizer"]))
    now = identity.content_of(Manifest.read(shards), model, build_optimizer(model, taken))
    for part in ("model", "optimizer"):
        assert now[part] == start.inputs[part]


# What a run of llama-nano recorded before LLaMA 3 was known.
RECORDED = {
    "kind": "LlamaConfig",
    "vocab_size": 32_000,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_layers": 4,
    "num_heads": 4,
    "max_sequence_length": 1024,
    "norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "initializer_std": 0.02,
}
LLAMA_3 = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_scaling": RotaryScaling(8.0, 1.0, 4.0, 8192),
    "tied_head": True,
}


def recorded(model: object) -> RunStart:
    return RunStart("r", "sgd", 0, "", {}, {}, 1, 1, inputs={"model": model})


def test_a_record_without_the_sizes_of_llama_3_is_that_of_the_same_model():
    sizes = PRESETS["llama-nano"]
    assert identity.model_content(sizes) == RECORDED
    assert identity.recorded_sizes(recorded(RECORDED)) == sizes


@pytest.mark.parametrize("names", [[name] for name in LLAMA_3] + [[*LLAMA_3]], ids=str)
def test_the_sizes_of_llama_3_are_recorded_and_read_back(names):
    sizes = replace(PRESETS["llama-nano"], **{name: LLAMA_3[name] for name in names})
    content = identity.model_content(sizes)
    assert content.keys() == {*RECORDED, *names}
    start = recorded(json.loads(json.dumps(content)))
    assert identity.recorded_sizes(start) == sizes
    said = identity.changed_sizes(RECORDED, content)
    assert [part.split()[0] for part in said.split("; ")] == names


def test_a_change_of_a_size_that_older_runs_lack_names_both_values():
    now = identity.model_content(replace(PRESETS["llama-nano"], tied_head=True))
    assert identity.changed_sizes(RECORDED, now) == "tied_head was False and is now True"


@pytest.mark.parametrize("scaling", [3, {"factor": 8.0}, {"odd": 1}])
def test_a_damaged_record_of_scaled_positions_is_refused(scaling):
    with pytest.raises(ConfigError, match="its results are damaged"):
        identity.recorded_sizes(recorded({**RECORDED, "rope_scaling": scaling}))


@pytest.mark.parametrize("model", [[1], "llama", 3, True])
def test_a_damaged_record_of_the_model_is_refused(model):
    with pytest.raises(ConfigError, match="its results are damaged"):
        identity.check_content(recorded(model), {"model": {"kind": "x"}, "optimizer": ""})
