"""A study is continued by the same command: with other jobs or cores, and by a later version."""

import os
from dataclasses import replace

import pytest

from sinkgd.lab.commands.experiment import Experiment
from sinkgd.lab.experiments.engine import read_begun
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
