"""Packing: rows by hand, token by token."""

import numpy as np
import pytest

from sinkgd.lab.data import IGNORE_INDEX, DataError, TokenDataset, open_corpus, prepare
from sinkgd.lab.data.batches import rows_of

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
