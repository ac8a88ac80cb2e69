"""The score is the mean over tokens, in nats; GaLore's is another; the model stays in training."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sinkgd.lab.data import IGNORE_INDEX, Batch
from sinkgd.lab.train.evaluate import Score, evaluate, galore_mean
from sinkgd.lab.train.loop import held_out_batches
from sinkgd.lab.train.mesh import Mesh
from sinkgd.lab.train.resolve import resolve
from sinkgd.lab.train.setup import set_up
from sinkgd.lab.train.world import World

ALONE = Mesh(torch.device("cpu"), World())


class Confident(nn.Module):
    """Gives the token before it probability p, and the rest of four evenly."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.p = probability
        self.modes: list[bool] = []

    def forward(self, tokens: torch.Tensor, readout) -> torch.Tensor:
        self.modes.append(self.training)
        chosen = nn.functional.one_hot(tokens, 4).bool()
        logits = torch.where(chosen, math.log(self.p), math.log((1 - self.p) / 3))
        return readout(logits, nn.Identity())


def batch(rows: int, scored: int) -> Batch:
    inputs = torch.zeros(rows, 8, dtype=torch.long)
    targets = inputs.clone()
    targets.flatten()[scored:] = IGNORE_INDEX
    return Batch(inputs, targets)


def test_every_target_counts_once_whatever_its_batch():
    wrong = batch(1, 2)
    wrong.targets[wrong.targets == 0] = 3
    model = Confident(0.7)
    score = evaluate(model, [batch(4, 30), wrong], precision="float32", mesh=ALONE)
    expected = -(30 * math.log(0.7) + 2 * math.log(0.1)) / 32
    assert score.tokens == 32
    assert score.nats_per_token == pytest.approx(expected, rel=1e-6)
    assert model.modes == [False, False]
    assert model.training


def test_perplexity_and_bits_follow_from_nats():
    score = Score(math.log(16), 10, math.log(15))
    assert score.galore_perplexity == pytest.approx(15)
    assert score.perplexity == pytest.approx(16)
    assert score.bits_per_byte(0.25) == pytest.approx(1.0)


def test_a_perplexity_beyond_floats_is_infinite():
    assert Score(1e4, 1, 1e4).perplexity == math.inf


PROBABILITIES = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]])  # after tokens 0 and 1
INPUTS = [[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]]
TARGETS = [[1, 1, -100, -100], [0, 1, 1, -100], [0, -100, -100, -100], [1, 0, 0, 3]]


def by_hand(rows: list[int]) -> np.ndarray:
    """Float64 losses of the targets in these rows, pads left out."""
    inputs, targets = np.array(INPUTS)[rows], np.array(TARGETS)[rows]
    scored = targets != -100
    return -np.log(PROBABILITIES[inputs[scored], targets[scored]])


def rows_as_batch(rows: list[int]) -> Batch:
    return Batch(torch.tensor(INPUTS)[rows], torch.tensor(TARGETS)[rows])


def test_galores_figure_is_the_sum_of_batch_means_over_one_batch_too_many():
    batches = [[0, 1], [2, 3]]
    score = evaluate(Confident(0.7), map(rows_as_batch, batches), precision="float32", mesh=ALONE)
    means = [by_hand(rows).mean() for rows in batches]
    assert [len(by_hand(rows)) for rows in batches] == [5, 5]
    assert score.galore_nats == pytest.approx(sum(means) / 3, rel=1e-6)
    assert score.nats_per_token == pytest.approx(by_hand([0, 1, 2, 3]).mean(), rel=1e-6)
    assert score.galore_perplexity < score.perplexity


def test_galores_figure_weighs_batches_alike_however_many_targets_they_have():
    batches = [[0, 2], [1, 3]]
    score = evaluate(Confident(0.7), map(rows_as_batch, batches), precision="float32", mesh=ALONE)
    means = [by_hand(rows).mean() for rows in batches]
    assert [len(by_hand(rows)) for rows in batches] == [3, 7]
    assert means[0] != pytest.approx(means[1], rel=0.1)
    assert score.galore_nats == pytest.approx(sum(means) / 3, rel=1e-6)


def test_a_last_batch_of_fewer_rows_counts_as_a_part():
    score = evaluate(
        Confident(0.7), map(rows_as_batch, [[0, 1], [3]]), precision="float32", mesh=ALONE
    )
    expected = (by_hand([0, 1]).mean() + by_hand([3]).mean() / 2) / (1 + 0.5 + 1)
    assert score.galore_nats == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("batches", "percent"), [(186, 1.8), (372, 0.7)])
def test_one_batch_too_many_lowers_perplexity_by_percents(batches, percent):
    # 10M tokens in rows of about 210: batches of 256 rows at the loss of a 60M model, of 128 rows
    # at that of a 1B model
    loss = {186: 3.4, 372: 2.7}[batches]
    found = galore_mean([loss] * batches, [1] * batches, [1] * batches)
    assert (1 - math.exp(found - loss)) * 100 == pytest.approx(percent, abs=0.1)


@pytest.mark.parametrize(
    ("given", "micro", "parts", "rows"),
    [(None, None, 4, 8), (None, 2, 1, 2), (None, 2, 4, 8), (3, 2, 1, 3), (3, 2, 4, 3)],
)
def test_a_batch_has_a_micro_batch_for_every_part(config, given, micro, parts, rows):
    training = replace(config.training, batch_size=8, micro_batch_size=micro)
    evaluation = replace(config.evaluation, batch_size=given, tokens=10_000)
    job = set_up(resolve(replace(config, training=training, evaluation=evaluation)), pytest.fail)
    first = next(held_out_batches(job, job.validation, parts=parts))
    assert len(first.inputs) == rows
