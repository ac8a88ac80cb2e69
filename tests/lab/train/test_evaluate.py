"""The score is the mean over tokens, in nats, and leaves the model in training."""

import math

import pytest
import torch
from torch import nn

from sinkgd.lab.data import IGNORE_INDEX, Batch
from sinkgd.lab.train.evaluate import Score, evaluate
from sinkgd.lab.train.parallel import Mesh, World

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
