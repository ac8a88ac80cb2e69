"""Batches: rows by hand, an order of (seed, step, rank, world size), and a shift of token ids."""

import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkgd.lab.data import (
    IGNORE_INDEX,
    Batch,
    Batches,
    DataError,
    TokenDataset,
    VocabularyShift,
    evaluation_batches,
    open_corpus,
    prepare,
)
from sinkgd.lab.data.batches import rows_of

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


EOS, PAD = 0, 1  # of the byte tokenizer
X = IGNORE_INDEX


def gather(split, length, packing):
    rows = rows_of(split, length, packing)
    inputs, targets = rows.gather(np.arange(rows.count))
    return inputs.tolist(), targets.tolist()


def test_concat_joins_documents_by_eos_and_overlaps_windows_in_one_token(write_shards):
    split = write_shards([[5, 6, 7], [8], [9, 10, 11]], shard_tokens=4).split("train")
    # 5 6 7 eos 8 eos 9 10 11 eos: ten tokens, so two rows of four and a tail of one target
    inputs, targets = gather(split, 4, "concat")
    assert inputs == [[5, 6, 7, EOS], [8, EOS, 9, 10]]
    assert targets == [[6, 7, EOS, 8], [EOS, 9, 10, 11]]


@pytest.mark.parametrize(("tokens", "rows"), [(4, 0), (5, 1), (8, 1), (9, 2)])
def test_concat_has_as_many_rows_as_targets_allow(write_shards, tokens, rows):
    split = write_shards([[7] * (tokens - 1)]).split("train")
    assert rows_of(split, 4, "concat").count == rows


def test_none_gives_each_document_a_row_with_s_minus_1_targets(write_shards):
    split = write_shards([[5, 6, 7], [8], [9, 10, 11, 12, 13]], shard_tokens=4).split("train")
    inputs, targets = gather(split, 4, "none")
    assert inputs == [[5, 6, 7, EOS], [8, EOS, PAD, PAD], [9, 10, 11, EOS]]
    assert targets == [[6, 7, EOS, X], [EOS, X, X, X], [10, 11, EOS, X]]


def test_masks_on_c4s_layout_by_hand(c4_folder, tmp_path, byte_tokenizer):
    prepare(open_corpus([str(c4_folder)]), tmp_path / "out", byte_tokenizer)
    split = TokenDataset.open(tmp_path / "out").split("train")
    a, b, c, d, e, f, x, y, z = byte_tokenizer.encode_batch(["abcdefxyz"])[0].tolist()
    e1, e2 = byte_tokenizer.encode_batch(["é"])[0].tolist()  # two bytes
    inputs, targets = gather(split, 5, "none")
    assert inputs == [[a, b, c, d, EOS], [e1, e2, EOS, PAD, PAD], [x, y, z, EOS, PAD]]
    assert targets == [[b, c, d, EOS, X], [e2, EOS, X, X, X], [y, z, EOS, X, X]]
    inputs, targets = gather(split, 7, "concat")
    assert inputs == [[a, b, c, d, e, f, EOS]]
    assert targets == [[b, c, d, e, f, EOS, e1]]


def test_pads_are_masked_by_position_so_eos_may_serve_as_pad(write_shards, byte_tokenizer):
    split = write_shards([[5, 6]]).split("train")
    same = type(split)(**{**vars(split), "pad_id": EOS})
    inputs, targets = gather(same, 5, "none")
    assert inputs == [[5, 6, EOS, EOS, EOS]]
    assert targets == [[6, EOS, X, X, X]]


@pytest.mark.parametrize("packing", ["concat", "none"])
def test_rows_come_in_the_order_asked_for(write_shards, packing):
    split = write_shards([[5, 6, 7], [8, 9], [10, 11]]).split("train")
    rows = rows_of(split, 3, packing)
    backward = rows.gather(np.array([2, 0, 2]))
    forward = rows.gather(np.arange(3))
    np.testing.assert_array_equal(backward.inputs, forward.inputs[[2, 0, 2]])
    np.testing.assert_array_equal(backward.targets, forward.targets[[2, 0, 2]])


def test_impossible_rows_are_refused(write_shards):
    split = write_shards([[5, 6, 7]]).split("train")
    with pytest.raises(DataError, match="sequence_length must be at least 2, got 1"):
        rows_of(split, 1, "concat")
    with pytest.raises(DataError, match="packing must be 'concat' or 'none', got 'dense'"):
        rows_of(split, 4, "dense")


SIZE, END_OF_TEXT = 50, 7


def shifted(at_step=10, seed=0):
    return VocabularyShift.drawn(at_step, vocab_size=SIZE, keep={END_OF_TEXT}, seed=seed)


def random_batch():
    ids = torch.randint(SIZE, (3, 8), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    return Batch(ids, targets)


def test_every_token_has_one_new_id_and_the_special_ones_keep_theirs():
    new_ids = shifted().new_ids
    assert sorted(new_ids.tolist()) == list(range(SIZE))
    assert new_ids[END_OF_TEXT] == END_OF_TEXT
    assert (new_ids != torch.arange(SIZE)).float().mean() > 0.9


def test_a_seed_is_a_permutation():
    assert torch.equal(shifted(seed=3).new_ids, shifted(seed=3).new_ids)
    assert not torch.equal(shifted(seed=3).new_ids, shifted(seed=4).new_ids)


def test_inputs_and_targets_are_renamed_alike_and_padding_is_not():
    shift, before = shifted(), random_batch()
    after = shift.of_training(before, 10)
    names = dict(enumerate(shift.new_ids.tolist())) | {IGNORE_INDEX: IGNORE_INDEX}
    assert after.inputs.tolist() == [[names[i] for i in row] for row in before.inputs.tolist()]
    assert after.targets.tolist() == [[names[i] for i in row] for row in before.targets.tolist()]


@pytest.mark.parametrize(
    ("step", "trained", "scored"), [(9, False, False), (10, True, False), (11, True, True)]
)
def test_it_is_trained_on_first_and_scored_from_the_next_step(step, trained, scored):
    shift, before = shifted(at_step=10), random_batch()
    assert (shift.of_training(before, step) is not before) == trained
    assert (shift.of_evaluation(before, step) is not before) == scored
