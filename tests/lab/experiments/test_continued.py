"""A study is continued by the same command: with other jobs or cores, and by a later version."""

import json
import os
from dataclasses import replace

import pytest

from sinkgd.lab.commands.experiment import Experiment
from sinkgd.lab.experiments.engine import read_begun
from sinkgd.lab.experiments.study import check_same_plan
from sinkgd.lab.experiments.study_record import StudyWriter
from sinkgd.lab.train.config import ConfigError


def command(folder, jobs, threads=None):
    default = Experiment.defaults(["iterations"])
    training = replace(default.shared.training, threads=threads)
    shared = replace(default.shared, training=training)
    return replace(default, name="iterations", out=folder, jobs=jobs, shared=shared)


def begin(folder, plan):
    writer = StudyWriter(folder / "study.jsonl")
    writer.begin(plan.as_json(), "sinkgd experiment iterations")
    writer.close()


@pytest.mark.parametrize(
    ("first", "then", "kept", "words"),
    [
        (2, 4, 4, "4 threads for each run, which it keeps; a new study with --jobs 4 would have 2"),
        (8, 1, 1, "1 thread for each run, which it keeps; a new study with --jobs 1 would have to"),
        (1, 8, None, "torch's number of threads for each run, which it keeps"),
        (4, 4, 2, None),
    ],
)
def test_a_study_keeps_the_threads_it_began_with(
    tmp_path, monkeypatch, capsys, first, then, kept, words
):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    begin(tmp_path, command(tmp_path, first)._plan())
    assert capsys.readouterr().err == ""
    plan = command(tmp_path, then)._plan()
    assert plan.shared.training.threads == kept
    said = capsys.readouterr().err
    assert said == "" if words is None else words in said


def test_a_study_on_another_machine_keeps_its_threads(tmp_path, monkeypatch):
    for cores in (2, 16):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        plan = command(tmp_path, None)._plan()
        assert plan.shared.training.threads == 1
        begin(tmp_path, plan)


def test_other_threads_that_are_asked_for_are_refused(tmp_path):
    begin(tmp_path, command(tmp_path, 2, threads=1)._plan())
    plan = command(tmp_path, 2, threads=2)._plan()
    with pytest.raises(ConfigError, match=r"training\.threads was 1 and is now 2"):
        read_begun(plan, tmp_path)


def saved_by_an_older_version(plan):
    """Return a plan without an option, a table of options and a property of arms."""
    saved = json.loads(json.dumps(plan.as_json()))
    del saved["shared"]["model"]["lora_rank"]
    del saved["shared"]["mesh"]
    for arm in saved["arms"].values():
        del arm["series"]
    return saved


def test_an_option_that_was_added_later_is_no_difference(tmp_path):
    plan = command(tmp_path, 1)._plan()
    saved = saved_by_an_older_version(plan)
    check_same_plan(saved, plan.as_json(), "runs/old")
    del saved["shared"]["training"]["steps"]  # whose default is not that of the study
    with pytest.raises(ConfigError, match=r"options: training\.steps was 400 and is now "):
        check_same_plan(saved, plan.as_json(), "runs/old")


def test_an_option_that_was_added_later_and_is_now_given_is_a_difference(tmp_path):
    plan = command(tmp_path, 1)._plan()
    model = replace(plan.shared.model, lora_rank=8)
    now = replace(plan, shared=replace(plan.shared, model=model)).as_json()
    with pytest.raises(ConfigError, match=r"options: model\.lora_rank was 0 and is now 8\."):
        check_same_plan(saved_by_an_older_version(plan), now, "runs/old")
