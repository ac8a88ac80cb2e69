"""Every study can be built, at both scales."""

from dataclasses import replace

import pytest
import tyro

from sinkgd.lab.cli import main
from sinkgd.lab.commands.experiment import Experiment
from sinkgd.lab.experiments.studies import STUDIES
from sinkgd.lab.experiments.studies.common import paper

# Those at machine scale are run; two of them stand for all.
BUILT = [*((name, "paper") for name in STUDIES), ("iterations", "machine"), ("lens", "machine")]


@pytest.mark.parametrize(("study", "scale"), BUILT)
def test_every_study_is_built_without_training(capsys, study, scale):
    assert main(["experiment", study, "--scale", scale, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for arm in STUDIES[study].settings[scale].arms:
        assert arm.name in shown
    if scale == "paper" and study == "alpha":
        assert "58.1M" in shown  # llama-60m as published
        assert "1.31B" in shown  # 10,000 steps of 131,072 tokens


def test_without_a_name_every_study_is_listed_with_its_question(capsys):
    assert main(["experiment"]) == 0
    shown = capsys.readouterr().out
    for name, study in STUDIES.items():
        assert f"  {name}" in shown
        assert study.question in shown


def test_an_error_is_one_line(capsys):
    assert main(["experiment", "iteratons"]) == 2
    assert "did you mean 'iterations'" in capsys.readouterr().err
    assert main(["experiment", "iterations", "--tau", "0.1"]) == 2
    assert "its axis is --iterations" in capsys.readouterr().err
    assert main(["experiment", "iterations", "--report", "--out", "/nowhere"]) == 1
    assert "no study at /nowhere/study.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["iterations", "--scale", "paper"],
        ["--scale", "paper", "iterations"],
        ["--no-tune", "iterations", "--scale", "paper", "--out", "alpha"],
        ["--out", "alpha", "iterations", "--scale", "paper"],
    ],
)
def test_the_studys_own_values_are_the_defaults_wherever_its_name_stands(arguments):
    assert Experiment.defaults(arguments).shared == paper("llama-130m")


def test_the_command_on_the_page_repeats_the_study():
    given = replace(Experiment.defaults(["batch"]), name="batch", seeds=4, lr="0.01", tune=False)
    training = replace(given.shared.training, device="auto", threads=2)
    given = replace(given, shared=replace(given.shared, training=training))
    words = given._command().split()
    assert words[:3] == ["sinkgd", "experiment", "batch"]
    again = tyro.cli(Experiment, args=words[2:], default=Experiment.defaults(words[2:]))
    assert again == given
