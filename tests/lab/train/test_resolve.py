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
from sinkgd.lab.train.resolve import check_micro_batches, check_shares, resolve


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
        ({"optimizer": OptimizerConfig(recipe="adanw")}, "did you mean 'adamw'"),
    ],
)
def test_errors_name_field_and_value(change, message):
    with pytest.raises(ConfigError, match=message):
        resolve(replace(RunConfig(), **change))


@pytest.mark.parametrize(
    ("micro_batch_size", "parts", "message"),
    [
        (None, 4, "batch_size is 6, which cannot be divided into 4 equal parts .* multiple of 4"),
        (
            2,
            2,
            "micro_batch_size is 2, which does not divide a rank's 3 sequences; use one of 1",
        ),
    ],
)
def test_a_batch_that_ranks_cannot_share_is_refused(micro_batch_size, parts, message):
    training = TrainingConfig(batch_size=6, micro_batch_size=micro_batch_size)
    with pytest.raises(ConfigError, match=message):
        check_shares(training, parts)


def test_a_micro_batch_larger_than_a_rank_s_part_is_that_part():
    check_shares(TrainingConfig(batch_size=6, micro_batch_size=6), parts=3)


@pytest.mark.parametrize(
    ("micro", "parts", "message"),
    [
        (None, 1, "micro_batch_size is None, and a rank has 8 sequences; use at most 4"),
        (8, 1, "micro_batch_size is 8, and a rank has 8 sequences; use at most 4"),
        (4, 2, "micro_batch_size is 4, and a rank has 4 sequences; use at most 2"),
        (1, 8, "a rank has a single sequence; use a training.batch_size of at least 16"),
    ],
)
def test_scales_of_half_of_the_batch_need_two_micro_batches(micro, parts, message):
    config = RunConfig(
        training=TrainingConfig(batch_size=8, micro_batch_size=micro),
        optimizer=OptimizerConfig(recipe="sinkgd", cross_fit=True),
    )
    with pytest.raises(ConfigError, match=message):
        check_micro_batches(config, parts)
    if parts == 1:
        with pytest.raises(ConfigError, match=message):
            resolve(config)
    check_micro_batches(replace(config, optimizer=OptimizerConfig(recipe="sinkgd")), parts)


def test_resolving_twice_changes_nothing():
    once = resolve(RunConfig())
    assert resolve(once) == once
