"""Tokenizers: text survives the round trip, and its special tokens are nobody else's."""

import hashlib
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sinkgd.lab.data import DataError, TokenDataset, Tokenizer, load_tokenizer
from sinkgd.lab.data.tokenizer import _without_endless_words

TEXTS = ["the cat sat on the mat, the dog on the log; " * 20, "naïve café ☃"]
texts = st.text(st.characters(exclude_categories=["Cs"]))


def word_level(vocab, unknown="a"):
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=unknown))


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(TEXTS, vocab_size=280)


@settings(deadline=None)
@given(text=texts)
@example(text="<eos> and <pad>")
@example(text="\x00\r\n \u2028\U0010ffff")
def test_text_survives_and_never_gives_a_special_token(trained, text):
    (ids,) = trained.encode_batch([text])
    assert trained.decode(ids) == text
    assert not np.isin(ids, [trained.eos_id, trained.pad_id]).any()


def test_training_gives_the_vocabulary_that_was_asked_for(trained):
    assert trained.vocab_size == 280
    assert Tokenizer.train(TEXTS, vocab_size=8192).vocab_size < 300  # little text, few merges
    assert (trained.eos_id, trained.pad_id, trained.bos_id) == (0, 1, None)
    (ids,) = trained.encode_batch(["the cat"])
    assert len(ids) < len("the cat")


def test_the_same_texts_give_the_same_tokenizer(trained):
    assert Tokenizer.train(iter(TEXTS), vocab_size=280).sha256 == trained.sha256
    assert Tokenizer.train(TEXTS[:1], vocab_size=280).sha256 != trained.sha256
    assert hashlib.sha256(trained.json).hexdigest() == trained.sha256


def test_a_vocabulary_below_the_bytes_is_refused():
    assert Tokenizer.train([], vocab_size=258).vocab_size == 258
    with pytest.raises(DataError, match=r"vocab_size must be at least 258 .* got 257"):
        Tokenizer.train(TEXTS, vocab_size=257)


def test_a_saved_tokenizer_is_the_same_one(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(trained.json)
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(str(name))
        assert loaded.sha256 == trained.sha256
        np.testing.assert_array_equal(loaded.encode_batch(TEXTS)[1], trained.encode_batch(TEXTS)[1])


def test_the_tokenizer_of_a_dataset_can_be_loaded_from_its_folder(sotu):
    tokenizer = load_tokenizer(str(sotu))
    manifest = TokenDataset.open(sotu).manifest
    assert tokenizer.sha256 == manifest.tokenizer_sha256
    assert tokenizer.vocab_size == manifest.vocab_size == 8192


def test_truncation_padding_and_templates_of_a_published_tokenizer_are_left_out():
    backend = word_level({"a": 0, "b": 1, "</s>": 2, "<s>": 3, "<pad>": 4})
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 2)]
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    tokenizer = Tokenizer(backend, "published")
    assert [ids.tolist() for ids in tokenizer.encode_batch(["a b a b", "b"])] == [[0, 1, 0, 1], [1]]
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (2, 3, 4)


def test_without_a_pad_token_rows_are_filled_with_eos():
    tokenizer = Tokenizer(word_level({"a": 0, "<|endoftext|>": 1}), "gpt")
    assert tokenizer.pad_id == tokenizer.eos_id == 1
    assert tokenizer.bos_id is None


def test_without_an_end_of_text_token_a_tokenizer_is_refused():
    with pytest.raises(DataError, match="tokenizer mine has no end-of-text token; add one of"):
        Tokenizer(word_level({"a": 0}), "mine")


def test_the_vocabulary_counts_up_to_the_largest_id():
    assert Tokenizer(word_level({"a": 0, "</s>": 99}), "holes").vocab_size == 100


def test_files_that_are_no_tokenizer_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer at .*absent\.json"):
        load_tokenizer(str(tmp_path / "absent.json"))
    (tmp_path / "broken.json").write_text('{"model": ')
    with pytest.raises(DataError, match=r"broken\.json is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "broken.json"))
    (tmp_path / "image.json").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError, match=r"image\.json is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "image.json"))


def test_a_hub_name_without_a_connection_says_what_to_do(tmp_path):
    program = (
        "from sinkgd.lab.data import DataError, load_tokenizer\n"
        "try: load_tokenizer('google-t5/t5-base')\n"
        "except DataError as error: print(error)"
    )
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=offline, capture_output=True, text=True, check=True)
    assert "the tokenizer 'google-t5/t5-base' cannot be loaded from the hub" in run.stdout
    assert "or give the path of a tokenizer.json" in run.stdout


@pytest.mark.parametrize(
    "model",
    [
        tokenizers.models.WordLevel({"</s>": 0, "a": 1}, unk_token="<unk>"),
        tokenizers.models.WordPiece({"</s>": 0, "a": 1}, unk_token="<unk>"),
        tokenizers.models.Unigram([("</s>", 0.0), ("a", -1.0)], unk_id=None),
    ],
    ids=["word-level", "word-piece", "unigram"],
)
def test_a_text_that_a_tokenizer_cannot_encode_is_an_error_that_names_it(model):
    tokenizer = Tokenizer(tokenizers.Tokenizer(model), "theirs.json")
    with pytest.raises(DataError, match=r"theirs\.json cannot encode this text: .* unknown token"):
        tokenizer.encode_batch(["zzz"])


@pytest.mark.timeout(40)  # uncut, these take minutes, as training is quadratic in a word
@pytest.mark.parametrize("letters", ["abcdefgh", "0123456789abcdef", "字典語文學書", "€½¾≤≥±×÷"])
def test_a_word_without_an_end_is_learned_from_quickly(letters):
    draw = random.Random(0)
    word = "".join(draw.choice(letters) for _ in range(400_000))
    tokenizer = Tokenizer.train([f"{word} and words"], vocab_size=2000)
    assert tokenizer.decode(tokenizer.encode_batch([word])[0]) == word


@given(text=texts)
def test_cutting_endless_words_loses_nothing(text):
    for content in (text, text * 300, "x" * 1000 + text, text + "x" * 257):
        pieces = _without_endless_words(content)
        assert "".join(pieces) == content
        assert all(len(word) <= 257 for piece in pieces for word in piece.split())


def test_words_of_a_language_are_not_cut():
    assert _without_endless_words("a" * 256 + " b") == ["a" * 256 + " b"]
