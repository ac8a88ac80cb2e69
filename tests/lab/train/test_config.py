"""Every option explains itself; TOML files and command lines give configurations, both ways."""

import ast
import inspect
import itertools
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from sinkgd.lab.train import config
from sinkgd.lab.train.config import (
    CheckpointConfig,
    ConfigError,
    LoggingConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    command_line,
    load_config,
    save_config,
)
from sinkgd.lab.train.identity import check_unchanged


def documented_fields(kind: type) -> set[str]:
    """Return the fields of a dataclass that a docstring follows."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    pairs = itertools.pairwise(body)
    return {
        line.target.id
        for line, following in pairs
        if isinstance(line, ast.AnnAssign)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }


def test_every_field_has_a_help_text():
    tables = [field.type for field in fields(config.RunConfig)]
    assert len(tables) == 8
    for table in tables:
        assert is_dataclass(table)
        assert documented_fields(table) == {field.name for field in fields(table)}


def test_a_comparison_shares_all_but_the_optimizer():
    shared = {field.name for field in fields(config.SharedConfig)}
    assert shared | {"optimizer"} == {field.name for field in fields(config.RunConfig)}


UNUSUAL = RunConfig(
    optimizer=OptimizerConfig(recipe="adamw", lr=0.5, clip_norm=2.0),
    training=TrainingConfig(steps=7, warmup_fraction=0.25, precision="bf16", device="cpu"),
    logging=LoggingConfig(sinks=("tensorboard", "wandb")),
)


def load(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, RunConfig)


@pytest.mark.parametrize("config", [RunConfig(), UNUSUAL], ids=["default", "unusual"])
def test_what_is_saved_is_loaded_again(tmp_path, config):
    save_config(tmp_path / "config.toml", config)
    assert load_config(tmp_path / "config.toml", RunConfig) == config


def test_what_is_absent_has_its_default(tmp_path):
    assert load(tmp_path, "[training]\nsteps = 7") == RunConfig(training=TrainingConfig(steps=7))


def test_a_whole_number_is_a_float_too(tmp_path):
    assert load(tmp_path, "[optimizer]\nlr = 1").optimizer.lr == 1.0


@pytest.mark.parametrize("config", [RunConfig(), UNUSUAL], ids=["default", "unusual"])
def test_the_command_line_gives_the_same_configuration(config):
    nameless = Annotated[RunConfig, tyro.conf.arg(name="")]
    assert tyro.cli(nameless, args=command_line(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trainign]\nsteps = 3", r"run.toml: unknown key trainign; did you mean training\?"),
        ("[training]\nstep = 3", r"unknown key training.step; did you mean training.steps\?"),
        ("[training]\nsteps = '3'", "training.steps must be of type int, got '3'"),
        ("[training]\nsteps = true", "training.steps must be of type int, got True"),
        ("[training]\nsteps = 3.5", "training.steps must be of type int, got 3.5"),
        ("training = 3", r"training must be a table \[training\], got 3"),
        ("[training]\nprecision = 'fp8'", "training.precision must be one of 'float32', .*'fp8'"),
        ("[logging]\nsinks = ['stdout']", "logging.sinks must be one of .*got 'stdout'"),
        ("[logging]\nsinks = 'wandb'", "logging.sinks must be of type .*got 'wandb'"),
        ("[training", "is no TOML file"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no configuration file .*none.toml"):
        load_config(tmp_path / "none.toml", RunConfig)


def test_a_changed_field_is_named_with_both_values(tmp_path):
    changed = replace(UNUSUAL, training=replace(UNUSUAL.training, seed=3))
    with pytest.raises(ConfigError, match=r"training.seed was 0 and is now 3"):
        check_unchanged(UNUSUAL, changed, tmp_path, text_by_content=False)


def test_the_text_is_named_beside_another_change(tmp_path):
    training = replace(UNUSUAL.training, seed=3)
    other = replace(UNUSUAL, data=replace(UNUSUAL.data, corpus="other"), training=training)
    words = r"data\.corpus was '.*' and is now '.*other'; training\.seed was 0 and is now 3"
    with pytest.raises(ConfigError, match=words):
        check_unchanged(UNUSUAL, other, tmp_path, text_by_content=True)


def test_logging_and_checkpoints_may_change(tmp_path):
    changed = replace(UNUSUAL, logging=LoggingConfig(), checkpoint=CheckpointConfig(keep=9))
    check_unchanged(UNUSUAL, changed, tmp_path, text_by_content=False)
