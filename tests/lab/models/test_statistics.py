"""Attention entropy and reciprocity equal their formulas, written as loops."""

import math

import numpy as np
import pytest
import torch

from sinkgd.lab.models.language_model import attention_entropy, reciprocity


@pytest.fixture
def scores():
    return 3 * torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))


def test_entropy_is_the_mean_over_queries_of_the_visible_keys(scores):
    for head, found in zip(scores.double(), attention_entropy(scores), strict=True):
        entropies = []
        for i in range(5):
            weights = [math.exp(head[i, j]) for j in range(i + 1)]
            shares = [weight / sum(weights) for weight in weights]
            entropies.append(-sum(p * math.log(p) for p in shares))
        assert found.item() == pytest.approx(sum(entropies) / 5, rel=1e-5)


def test_attention_that_is_sure_has_no_entropy():
    assert attention_entropy(1e4 * torch.eye(6)).item() == 0


def test_reciprocity_is_pearsons_correlation(scores):
    for head, found in zip(scores.double(), reciprocity(scores), strict=True):
        pairs = [(head[i, j].item(), head[j, i].item()) for i in range(5) for j in range(i)]
        assert found.item() == pytest.approx(np.corrcoef(np.array(pairs).T)[0, 1], rel=1e-4)


def test_antisymmetric_scores_are_the_opposite_of_reciprocal(scores):
    assert reciprocity(scores - scores.mT).tolist() == pytest.approx([-1, -1])


def test_where_there_is_nothing_to_correlate_reciprocity_is_zero():
    assert reciprocity(torch.ones(1, 2, 2)).item() == 0
