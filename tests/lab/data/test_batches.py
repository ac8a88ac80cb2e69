"""Batches: a pure function of (seed, step, rank, world size), and every row in its turn."""

import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkgd.lab.data import (
    IGNORE_INDEX,
    Batches,
    DataError,
    TokenDataset,
    evaluation_batches,
)

both = pytest.mark.parametrize("packing", ["concat", "none"])
T = 16


@pytest.fixture(scope="module")
def train(sotu):
    return TokenDataset.open(sotu).split("train")


@pytest.fixture(scope="module")
def validation(sotu):
    return TokenDataset.open(sotu).split("validation")


@pytest.fixture
def numbered(write_shards):
    """23 documents of two tokens: row i of ``none`` begins with 2 + i."""
    return write_shards([[2 + i, 100] for i in range(23)]).split("train")


def batches(split, **changes):
    arguments = {"sequence_length": T, "batch_size": 8, "seed": 3} | changes
    return Batches(split, **arguments)


@both
@pytest.mark.parametrize("world_size", [1, 2, 4])
@settings(deadline=None)
@given(step=st.integers(0, 10**6))
def test_the_global_batch_is_the_same_whatever_the_world_size(train, packing, world_size, step):
    whole = batches(train, packing=packing).at(step)
    shares = [
        batches(train, packing=packing, rank=rank, world_size=world_size).at(step)
        for rank in range(world_size)
    ]
    assert all(share.inputs.shape == (8 // world_size, T) for share in shares)
    assert torch.equal(torch.cat([share.inputs for share in shares]), whole.inputs)
    assert torch.equal(torch.cat([share.targets for share in shares]), whole.targets)


@both
def test_a_batch_depends_on_its_step_and_not_on_what_came_before(train, packing):
    forward = [batches(train, packing=packing).at(step) for step in range(40)]
    once = batches(train, packing=packing)
    for step in reversed(range(40)):
        again = once.at(step)
        assert torch.equal(again.inputs, forward[step].inputs)
        assert torch.equal(again.targets, forward[step].targets)


def test_an_epoch_draws_each_document_once(numbered):
    drawn = Batches(numbered, sequence_length=4, batch_size=5, seed=0, packing="none")
    first = [int(row[0]) - 2 for step in range(23) for row in drawn.at(step).inputs]
    assert drawn.rows_per_epoch == 23
    for epoch in range(5):  # 115 rows; batches of five straddle the ends of the epochs
        assert sorted(first[23 * epoch : 23 * (epoch + 1)]) == list(range(23))
    assert first[:23] != first[23:46]


def test_an_epoch_draws_each_window_of_the_corpus_once(train):
    drawn = Batches(train, sequence_length=1024, batch_size=20, seed=1)
    count = (train.tokens - 1) // 1024
    assert drawn.rows_per_epoch == count > 2000
    rows = [tuple(row) for step in range(count // 20 + 1) for row in drawn.at(step).inputs.tolist()]
    windows = [tuple(train.read(1024 * k, 1024).tolist()) for k in range(count)]
    assert Counter(rows[:count]) == Counter(windows)


def test_a_batch_larger_than_what_is_left_goes_on_with_the_next_epoch(numbered):
    drawn = Batches(numbered, sequence_length=4, batch_size=23, seed=0, packing="none")
    for step in (0, 1, 10**9):
        assert sorted(drawn.at(step).inputs[:, 0].tolist()) == list(range(2, 25))


def test_seeds_have_orders_of_their_own(train):
    first = [batches(train, seed=seed).at(0).inputs for seed in range(5)]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])


@both
def test_targets_are_the_inputs_shifted_by_one(train, packing):
    batch = batches(train, packing=packing).at(5)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.is_contiguous()
    assert batch.targets.is_contiguous()
    scored = batch.targets[:, :-1] != IGNORE_INDEX
    assert torch.equal(batch.targets[:, :-1][scored], batch.inputs[:, 1:][scored])
    assert batch.target_count == int((batch.targets >= 0).sum()) > 0


def test_finding_a_batch_takes_less_than_a_millisecond(train):
    drawn = Batches(train, sequence_length=256, batch_size=16, seed=0)
    seconds = []
    for step in range(100):
        start = time.perf_counter()
        drawn.at(step)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3  # the least, as the machine may be busy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1 sequence, got 0"),
        ({"batch_size": 6, "world_size": 4}, "batch_size 6 cannot be shared by 4 processes"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size = 2\), got 2"),
        ({"rank": -1}, r"rank must be in \[0, world_size = 1\), got -1"),
        ({"world_size": 0}, r"rank must be in \[0, world_size = 0\), got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"sequence_length": 1}, "sequence_length must be at least 2, got 1"),
        ({"packing": "all"}, "packing must be 'concat' or 'none', got 'all'"),
    ],
)
def test_arguments_out_of_range_are_named(numbered, changes, message):
    with pytest.raises(DataError, match=message):
        batches(numbered, **changes)


def test_a_negative_step_is_named(train):
    with pytest.raises(DataError, match="step must be at least 0, got -1"):
        batches(train).at(-1)


@pytest.mark.parametrize(
    ("packing", "length", "message"),
    [
        ("concat", 17, r"train has 69 tokens in 23 documents, which make 4 rows of 17 tokens"),
        ("none", 8, r"train has 69 tokens in 23 documents, which make 23 documents"),
    ],
)
def test_too_little_text_for_one_batch_is_an_error_with_numbers(numbered, packing, length, message):
    remedy = "and a batch takes 24; prepare more text, or lower batch_size or sequence_length"
    with pytest.raises(DataError, match=f"too little text for one batch: {message}, {remedy}"):
        Batches(numbered, sequence_length=length, batch_size=24, seed=0, packing=packing)


def evaluate(split, **changes):
    arguments = {"sequence_length": T, "batch_size": 8, "max_tokens": 1000} | changes
    return list(evaluation_batches(split, **arguments))


def scored(found):
    return [t for batch in found for t in batch.targets.flatten().tolist() if t != IGNORE_INDEX]


@both
@settings(deadline=None)
@given(budget=st.integers(1, 2000), batch_size=st.integers(1, 9))
def test_evaluation_scores_exactly_the_budget_from_the_beginning(
    validation, packing, budget, batch_size
):
    arguments = {"packing": packing, "batch_size": batch_size, "sequence_length": 200}
    found = evaluate(validation, max_tokens=budget, **arguments)
    targets = scored(found)
    assert len(targets) == budget == sum(batch.target_count for batch in found)
    assert targets == scored(evaluate(validation, max_tokens=2100, **arguments))[:budget]
    assert all(len(batch.inputs) == batch_size for batch in found[:-1])
    assert all(bool((batch.targets != IGNORE_INDEX).any(dim=1).all()) for batch in found)


def test_evaluation_of_concat_scores_the_stream_in_its_order(validation):
    targets = scored(evaluate(validation, max_tokens=1001))
    assert targets == validation.read(1, 1001).tolist()


def test_a_budget_beyond_the_text_scores_all_rows_once(numbered):
    found = evaluate(numbered, packing="none", sequence_length=8, max_tokens=10**9)
    assert [len(batch.inputs) for batch in found] == [8, 8, 7]
    assert torch.cat([b.inputs[:, 0] for b in found]).tolist() == list(range(2, 25))
    assert sum(batch.target_count for batch in found) == 23 * 2


@both
def test_evaluation_is_the_same_every_time(validation, packing):
    first, second = (evaluate(validation, packing=packing) for _ in range(2))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a.targets, b.targets) for a, b in zip(first, second, strict=True))


def test_evaluation_refuses_at_once(numbered):
    with pytest.raises(DataError, match="max_tokens must be at least 1, got 0"):
        evaluation_batches(numbered, sequence_length=8, batch_size=1, max_tokens=0)
    with pytest.raises(DataError, match="batch_size must be at least 1 sequence, got 0"):
        evaluation_batches(numbered, sequence_length=8, batch_size=0, max_tokens=1)
    with pytest.raises(DataError, match="too little text for one batch: train has 69 tokens"):
        evaluation_batches(numbered, sequence_length=69, batch_size=1, max_tokens=1)
