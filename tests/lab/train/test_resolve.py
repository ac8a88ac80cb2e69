"""A configuration that cannot run is refused with the field, its value and the remedy."""

from dataclasses import replace

import pytest

from sinkgd.lab.train.config import (
    CheckpointConfig,
    ConfigError,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from sinkgd.lab.train.resolve import resolve


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": TrainingConfig(steps=0)}, "training.steps is 0; it must be at least 1"),
        ({"training": TrainingConfig(batch_size=-1)}, "training.batch_size is -1"),
        (
            {"training": TrainingConfig(batch_size=6, micro_batch_size=4)},
            "micro_batch_size is 4, which does not divide training.batch_size 6; "
            "use one of 1, 2, 3, 6",
        ),
        ({"training": TrainingConfig(sequence_length=0)}, "training.sequence_length is 0"),
        ({"training": TrainingConfig(threads=0)}, "training.threads is 0"),
        ({"training": TrainingConfig(seed=-2)}, "training.seed is -2; give a whole number from 0"),
        ({"training": TrainingConfig(warmup_fraction=1.0)}, "training.warmup_fraction is 1.0"),
        ({"training": TrainingConfig(final_lr_fraction=1.5)}, "training.final_lr_fraction is 1.5"),
        ({"evaluation": EvaluationConfig(every_steps=0)}, "evaluation.every_steps is 0"),
        ({"evaluation": EvaluationConfig(tokens=0)}, "evaluation.tokens is 0"),
        ({"checkpoint": CheckpointConfig(keep=0)}, "checkpoint.keep is 0"),
        ({"checkpoint": CheckpointConfig(every_steps=0)}, "checkpoint.every_steps is 0"),
        ({"logging": LoggingConfig(print_every_steps=0)}, "logging.print_every_steps is 0"),
        ({"model": ModelConfig(vocab_size=0)}, "model.vocab_size is 0"),
        ({"optimizer": OptimizerConfig(recipe="adamv")}, "did you mean 'adamw'"),
    ],
)
def test_errors_name_field_and_value(change, message):
    with pytest.raises(ConfigError, match=message):
        resolve(replace(RunConfig(), **change))


def test_the_micro_batch_is_the_whole_batch_by_default():
    assert resolve(RunConfig()).training.micro_batch_size == RunConfig().training.batch_size


def test_resolving_twice_changes_nothing():
    once = resolve(RunConfig())
    assert resolve(once) == once
